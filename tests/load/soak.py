"""Soak: thousands of sandboxes under random operations and `kill -9`, and what is left of them.

- One real service, restarted when it is killed; the killed are the service, its spawner, and first
  processes of sandboxes, at random moments.
- A State that was answered must be there, whole and with its own content, whatever was killed.
- What is done with the sandboxes, and what it may end in, is `operations`.
- While one service lives, its memory and its open descriptors do not grow with the sandboxes made;
  with the last one deleted, no more descriptors are open than before the first.
- At the very end nothing is killed: what is refused then is a fault, and so is an operation that
  has hardly ever worked, then or before.
- The last part spares the service and its spawner, so that one service makes them all: over the
  second half of it, when everything is warm, its resident memory has a slope, in bytes for each
  sandbox, that is told and has a bound.
- In the end, with the service stopped: no process, mount, control group or directory of a sandbox
  is left. Every service, spawner and first process that was seen while it ran is looked for by its
  process id and start time, because a spawner's environment and arguments do not name its home.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regreen.client.channel import connect
from regreen.common.v1 import CHANGE_KIND_ADD, FileChange
from regreen.rpc.errors import RegreenError
from regreen.sandbox import v1 as pb
from sandbox_svc.backends import leftovers
from tests.load import processes
from tests.load.operations import BRIEF, MARK, Operations, Record

_LANES = 8
_SETTLED_S = 10.0
"""Age from which a service has its modules, threads and seats."""
_MOST_TRIES = 2
"""For each sandbox; a service that makes none any more would never come to the end."""
_CALM_SHARE = 2
"""One in so many sandboxes is made while the service is spared."""
_QUIET_SHARE = 10
"""One in so many is made while nothing is killed."""
_SLOPE_BYTES = 500
"""Resident bytes that one service may keep of each sandbox, by its slope. What has no bound of its
own shows: an answer that was remembered as a message took 1,600, and a sandbox has three."""
_SLOPE_OVER = 1000
"""Sandboxes from which a slope tells more than chance."""
_GROWTH_BYTES, _GROWTH_FDS = 48 << 20, 64
"""How much more one service may have of each at a look than at an earlier one."""
_IDLE_FDS = 8
_SEE_S = 0.2
"""Between two looks at which processes there are."""
_GONE_S = 10.0
"""Within which what was killed has been reaped, as `test_crash` has it."""
_BRIEF_GONE_S = 10.0
"""Within which a sandbox is gone whose time is over, on a busy host too."""


def _target(descriptor: Path) -> str:
    """What an open descriptor leads to; nothing if it is closed by now."""
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(descriptor)
    return ""


@dataclass
class Soak:
    """One run and what it has seen."""

    home: Path
    count: int
    rng: random.Random
    kill_s: float = 3.0
    """Mean time between two kills."""
    record: Record = field(default_factory=Record)
    killed: Counter[str] = field(default_factory=Counter)
    looks: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    """By process: sandboxes made so far, its resident bytes and open descriptors."""
    calm: list[tuple[int, int]] = field(default_factory=list)
    """Of the service that is spared: sandboxes made so far and its resident bytes."""
    seen: dict[processes.Lived, str] = field(default_factory=dict)
    """Processes of the service, by process id and start time."""
    checked: int = 0
    """States whose content was compared in the end."""
    _spared: bool = False
    _calm_pids: set[int] = field(default_factory=set)
    _process: asyncio.subprocess.Process | None = None
    _born_s: float = 0.0
    _done_at_kill: int = -1
    _idle_kills: int = 0
    """Services killed one after the other without an operation in between, but for the first."""

    async def run(self) -> dict[str, Any]:
        """All of it; the report."""
        ended = asyncio.Event()
        keeper = asyncio.create_task(self._keep_running(ended))
        seer = asyncio.create_task(self._see_all())
        try:
            async with connect(self._address) as channel:
                self.operations = Operations(channel, self.record, self.rng)
                self.sandboxes, self.state = self.operations.sandboxes, self.operations.state
                self.root = await self._root()
                idle_fds = self._usage()[1]
                killer = asyncio.create_task(self._kill())
                stormy = self.count - self.count // _CALM_SHARE
                await asyncio.gather(*(self._lane(stormy) for _ in range(_LANES)))
                self._spared = True
                await self.sandboxes.get_capabilities()  # one that was killed last is back
                quiet = self.count - self.count // _QUIET_SHARE
                await asyncio.gather(*(self._lane(quiet) for _ in range(_LANES)))
                killer.cancel()
                self.record.calm = True
                await asyncio.gather(*(self._lane(self.count) for _ in range(_LANES)))
                await self._check_states()
                self.record.check_work()
                if self.record.made < self.count:
                    self.record.faults.append(f"{self.record.made} of {self.count} were made")
                await self._check_brief()
                await self._clear()
                await self._check_growth(idle_fds)
        finally:
            seer.cancel()
            self._see()
            ended.set()
            await keeper
        return self._report(await self._left(_GONE_S))

    @property
    def _address(self) -> str:
        return f"unix:{self.home / 's.sock'}"

    async def _keep_running(self, ended: asyncio.Event) -> None:
        """Start the service as often as it ends, until asked to stop it."""
        command = [sys.executable, "-m", "sandbox_svc", "--home", str(self.home)]
        command += ["--listen", self._address, "--metrics", "127.0.0.1:0"]
        command += ["--max-sandboxes", "64", "--log-level", "error"]
        with (self.home / "service.log").open("ab") as log:
            while True:
                self._process = await asyncio.create_subprocess_exec(
                    *command, stdout=log, stderr=log
                )
                self._born_s = time.monotonic()
                waiting = [asyncio.create_task(self._process.wait())]
                waiting.append(asyncio.create_task(ended.wait()))
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if ended.is_set():
                    with contextlib.suppress(ProcessLookupError):
                        self._process.terminate()
                    await self._process.wait()
                    return
                waiting[1].cancel()

    async def _root(self) -> str:
        await self.sandboxes.get_capabilities()  # waits until it serves
        mark = FileChange(path="file", kind=CHANGE_KIND_ADD, content=b"x")
        spec = pb.EnvironmentSpec(builder="system", overlay=[mark])
        async for event in self.state.prepare_state(spec):
            if event.HasField("state"):
                return event.state.id
        raise AssertionError("no state came")

    async def _see_all(self) -> None:
        while True:
            self._see()
            await asyncio.sleep(_SEE_S)

    def _see(self) -> None:
        """Remember the processes that there are, and forget those that have ended."""
        self.seen = processes.still(self.seen)
        if self._process is not None:
            self.seen |= processes.family(self._process.pid)

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / self.kill_s))
            assert self._process is not None
            self._see()  # who loses its parent is not found by it any more
            service = self._process.pid
            spawners = processes.children(service)
            boxes = [box for spawner in spawners for box in processes.children(spawner)]
            weights = (1, 0, 0) if self._spared else (6, 2, 1)
            kind = self.rng.choices(("box", "spawner", "service"), weights)[0]
            victims = {"box": boxes, "spawner": spawners, "service": [service]}[kind]
            if kind == "service" and self._must_come_up():
                continue
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(victims), signal.SIGKILL)
                    self.killed[kind] += 1

    def _must_come_up(self) -> bool:
        """Whether the last two services were killed before they did anything.

        Without it a host on which a start takes as long as the time between two kills would have
        no service for minutes, and the soak would measure that.
        """
        done = sum(self.record.done.values())
        self._idle_kills = self._idle_kills + 1 if done == self._done_at_kill else 0
        self._done_at_kill = done
        return self._idle_kills > 1

    async def _lane(self, until: int) -> None:
        """Sandboxes one after the other, with a few random operations on each."""
        while self.record.made < until and self.record.tries < _MOST_TRIES * self.count:
            self.record.tries += 1
            if self._spared and self.record.tries % 10 == 0:
                self._look_calmly()
            if self.record.tries % 50 == 0:
                self._look()
            await self.operations.life(self.root)

    def _look_calmly(self) -> None:
        """Note the memory of the service that is spared; it has to be one and the same."""
        assert self._process is not None
        with contextlib.suppress(OSError):
            self.calm.append((self.record.made, self._usage()[0]))
            self._calm_pids.add(self._process.pid)

    def _look(self) -> None:
        """Note what a service holds that has lived for a while."""
        sys.stderr.write(
            f"\r{self.record.made} of {self.count} sandboxes, killed {dict(self.killed)} "
        )
        sys.stderr.flush()
        if self._process is not None and time.monotonic() - self._born_s > _SETTLED_S:
            with contextlib.suppress(OSError):
                self.looks.setdefault(self._process.pid, []).append(
                    (self.record.made, *self._usage())
                )

    def _usage(self) -> tuple[int, int]:
        """Resident bytes and open descriptors of the service.

        Those of networks that it keeps with a name for the next sandbox do not count.
        """
        assert self._process is not None
        process = Path(f"/proc/{self._process.pid}")
        pages = int((process / "statm").read_text("ascii").split()[1])
        opened = [_target(entry) for entry in (process / "fd").iterdir()]
        networks = sum(target.startswith("net:[") for target in opened)
        kept = min(networks, len(os.listdir(self.home / "sandbox/run")))
        return pages * os.sysconf("SC_PAGE_SIZE"), len(opened) - kept

    async def _check_growth(self, idle_fds: int) -> None:
        """No service has grown, and the last one, idle again, has its descriptors back."""
        for pid, looks in self.looks.items():
            (made, *first), (made_then, *last) = looks[0], looks[-1]
            for name, most, before, after in zip(
                ("resident bytes", "descriptors"), (_GROWTH_BYTES, _GROWTH_FDS), first, last,
                strict=True,
            ):  # fmt: skip
                if after - before > most:
                    self.record.faults.append(
                        f"service {pid} went from {before} to {after} {name} over "
                        f"{made_then - made} sandboxes"
                    )
        if len(self._calm_pids) > 1:
            self.record.faults.append("the service that was spared has ended all the same")
        if (slope := self._flatness()) and slope["checked"] and not slope["flat"]:
            self.record.faults.append(f"the service that was spared grew: {slope}")
        until_s = time.monotonic() + 30.0
        while (now_fds := self._usage()[1]) > idle_fds + _IDLE_FDS:
            if time.monotonic() > until_s:
                self.record.faults.append(f"{now_fds} descriptors are open, {idle_fds} at first")
                break
            await asyncio.sleep(0.2)

    def _flatness(self) -> dict[str, Any]:
        """How the resident memory of the service that was spared went, once it was warm."""
        warm = self.calm[len(self.calm) // 2 :]
        if len(warm) < 2:
            return {}
        sandboxes = warm[-1][0] - warm[0][0]
        slope = statistics.linear_regression(*zip(*warm, strict=True)).slope
        return {
            "sandboxes": sandboxes,
            "resident_bytes": [warm[0][1], warm[-1][1]],
            "bytes_per_sandbox": round(slope, 1),
            "bound": _SLOPE_BYTES,
            "flat": slope <= _SLOPE_BYTES,
            "checked": sandboxes >= _SLOPE_OVER,
        }

    async def _check_states(self) -> None:
        """Every State that was answered and not deleted shows its own content."""
        for state_id, content in self.record.states.items():
            try:
                box = await self.sandboxes.create_sandbox(state_id)
                found = (await self.sandboxes.read_file(box.id, MARK)).content.decode()
                await self.sandboxes.delete_sandbox(box.id)
            except RegreenError as error:
                found = f"{type(error).__name__}: {error}"
            self.record.check(f"state {state_id}", found, content)
            self.checked += 1
        if not self.checked:
            self.record.faults.append("no state was there to be checked")

    async def _check_brief(self) -> None:
        """Sandboxes whose time was short are gone, though nobody has deleted them."""
        until_s = time.monotonic() + _BRIEF_GONE_S
        while left := (await self.sandboxes.list_sandboxes(labels=BRIEF)).sandboxes:
            if time.monotonic() > until_s:
                self.record.faults.append(f"{len(left)} sandboxes have outlived their time")
                return
            await asyncio.sleep(0.2)

    async def _clear(self) -> None:
        for box in (await self.sandboxes.list_sandboxes(page_size=1000)).sandboxes:
            await self.sandboxes.delete_sandbox(box.id)

    def _alive(self, home: Path, instance: str) -> dict[int, str]:
        """Processes of the service and its sandboxes, and how each was found."""
        alive = {
            int(path.parent.name): "names the home"
            for path in Path("/proc").glob("[0-9]*/environ")
            if str(self.home).encode() in _read(path) + _read(path.parent / "cmdline")
        }
        alive |= processes.of_instance(home, instance)
        alive |= {pid: role for (pid, _), role in processes.still(self.seen).items()}
        alive.pop(os.getpid(), None)
        return alive

    async def _left(self, within_s: float = 0.0) -> dict[str, list[str]]:
        """What of sandboxes is on this host, once no process is, or that time has passed."""
        home = self.home / "sandbox"
        instance = hashlib.sha256(os.fsencode(home.absolute())).hexdigest()[:8]
        until_s = time.monotonic() + within_s
        while alive := self._alive(home, instance):
            if time.monotonic() > until_s:
                break
            await asyncio.sleep(0.05)  # what was killed is still to be reaped, by init perhaps
        files = Path("/sys/fs/cgroup").glob(f"**/regreen-{instance}/*/cgroup.procs")
        groups = frozenset(str(path.parent) for path in files)
        found = leftovers.look(home, groups=lambda: groups, spawner=0)
        seen_by = processes.mounts(home)
        return {
            **{kind: sorted(names) for kind, names in found.items()},
            "mount": [f"{point} in the view of {pid}" for point, pid in sorted(seen_by.items())],
            "process": [
                f"{pid}: {why}, {processes.state(pid)}" for pid, why in sorted(alive.items())
            ],
        }

    def _report(self, left: dict[str, list[str]]) -> dict[str, Any]:
        return {
            "soak": "sandbox",
            "sandboxes": self.record.made,
            "done": dict(self.record.done),
            "refused": dict(self.record.refused),
            "done_while_nothing_is_killed": dict(self.record.calm_done),
            "killed": dict(self.killed),
            "states_checked": self.checked,
            "flatness": self._flatness(),
            "looks": {pid: [looks[0], looks[-1]] for pid, looks in self.looks.items()},
            "left": {kind: names for kind, names in left.items() if names},
            "faults": self.record.faults[:50],
        }


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


async def soak(count: int, seed: int, kill_s: float) -> dict[str, Any]:
    """One soak in a fresh home; its report."""
    home = Path(tempfile.mkdtemp(prefix="regreen-soak-"))
    home.chmod(0o711)
    try:
        return await Soak(home, count, random.Random(seed), kill_s).run()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    """Run it; 1 if anything was left, lost or faulty."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="tests.load.soak", description=__doc__
    )
    parser.add_argument("--sandboxes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-s", type=float, default=3.0, help="mean time between kills")
    parser.add_argument("--out", type=Path, default=Path("build/bench/soak.json"))
    options = parser.parse_args()
    report = asyncio.run(soak(options.sandboxes, options.seed, options.kill_s))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write("\n" + json.dumps(report, indent=1) + "\n")
    return 1 if report["left"] or report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
