"""Verifies task sets through a running sandbox service.

- `python -m regreen.tasks.verify --sandbox HOST:PORT` judges the shipped set; `--tasks DIR` others.
- Verdicts are appended to a file as they come; what is in it already is not judged again.
- `--update DIR` writes the task set with what was seen: counts, digests, status, interpreters,
  evidence.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common.v1 import common_pb2
from regreen.pkgindex import PackageIndex, index_urls
from regreen.rpc.errors import RegreenError, Unavailable
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.sandbox.v1 import state_service_pb2 as state_pb
from regreen.tasks.evidence import evidence_of, is_evidence, renewed
from regreen.tasks.gate import SHIPPED_REPEATS, Gate, judge_steadily
from regreen.tasks.jsonl import (
    SHIPPED,
    load_distributions,
    load_evidence,
    load_tasks,
    write_lines,
)
from regreen.tasks.model import TaskRecord, ids_sha256
from regreen.tasks.trial import FAILS
from regreen.tasks.verdict import Verdict, of_fields

VALIDATION_S = 1800.0


class ServiceGateClient:
    """`gate.GateClient` over the sandbox service."""

    def __init__(self, states: StateClient, sandboxes: SandboxClient) -> None:
        self.states, self.sandboxes = states, sandboxes

    async def prepare(self, spec: pb.EnvironmentSpec) -> pb.State:
        """The state of an environment."""
        await self.ready()
        async for event in self.states.prepare_state(spec):
            if event.HasField("state"):
                state: pb.State = event.state
                return state
            self.prepared(event.progress)
        raise Unavailable("the sandbox service ended the preparation without a state")

    async def ready(self) -> None:
        """Wait until a unit of work may begin; here it always may."""

    def prepared(self, progress: state_pb.PrepareProgress) -> None:
        """Hear how far a preparation is; nothing is done with it here."""

    async def validate(
        self,
        state_id: str,
        changes: Sequence[common_pb2.FileChange],
        *,
        held_pins: Mapping[str, str],
        required_tests: Sequence[str],
        skip_cache_lookup: bool,
        conditions: pb.Conditions | None = None,
    ) -> pb.Validation:
        """The verdict on a diff."""
        await self.ready()
        return await self.sandboxes.validate(
            state_id,
            changes,
            held_pins=held_pins,
            required_tests=required_tests,
            skip_cache_lookup=skip_cache_lookup,
            conditions=conditions,
            timeout_s=VALIDATION_S,
        )

    async def read_files(self, state_id: str, paths: Sequence[str]) -> Mapping[str, bytes]:
        """Files of a state's repository."""
        box = await self.sandboxes.create_sandbox(state_id, labels={"for": "gate"})
        try:
            found = {}
            for path in paths:
                answer = await self.sandboxes.read_file(
                    box.id, f"/work/repo/{path}", max_bytes=8 << 20
                )
                found[path] = answer.content
            return found
        finally:
            await self.sandboxes.delete_sandbox(box.id)


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, and of what it is."""

    verdict: Verdict
    judged_sha256: str
    """`TaskRecord.judged_sha256` of the record; empty in files of older versions."""
    day: str

    def is_of(self, task: TaskRecord) -> bool:
        """Whether it is of a record as it is."""
        known = self.judged_sha256 in ("", task.judged_sha256)
        return known and self.verdict.task_id == task.id


def read_judged(path: Path) -> list[Judged]:
    """What `verify_all` wrote; the part of a line that a killed process left is none."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text("utf-8", "replace").rpartition("\n")
    rows = [json.loads(line) for line in whole.splitlines() if line.strip()]
    told = [(row.pop("judged_sha256", ""), row.pop("judged", "")) for row in rows]
    return [Judged(of_fields(row), *one) for row, one in zip(rows, told, strict=True)]


def _drop_part(path: Path) -> None:
    """Take away the part of a line at the end, so that the next begins anew."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


async def verify_all(
    gate: Gate, tasks: Sequence[TaskRecord], out: Path, *, python: str = "", workers: int = 2
) -> int:
    """Judge what is not in `out` yet, shortest first; returns how many could not be judged."""
    _drop_part(out)
    done = [one for one in read_judged(out) if one.verdict.status != "waiting"]
    left = [task for task in tasks if not any(one.is_of(task) for one in done)]
    todo = sorted(left, key=lambda task: task.tests.timeout_s)
    queue = list(reversed(todo))
    failed = 0

    async def work() -> None:
        nonlocal failed
        while queue:
            task = queue.pop()
            started = time.monotonic()
            try:
                _, verdict = await judge_steadily(gate, task, python)
            except RegreenError as error:
                failed += 1
                sys.stderr.write(f"{task.id}: could not be judged: {error}\n")
                continue
            day = datetime.now(UTC).date().isoformat()
            row = {**asdict(verdict), "judged_sha256": task.judged_sha256, "judged": day}
            with out.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(row) + "\n")
            took = time.monotonic() - started
            told = f"{took:.0f}s {len(queue)} left: {verdict.reason}"
            sys.stderr.write(f"{verdict.status} {task.id} {told}\n")

    await asyncio.gather(*(work() for _ in range(workers)))
    return failed


def refreshed(task: TaskRecord, verdict: Verdict) -> TaskRecord:
    """The record with what the gate saw on the record's own interpreter."""
    if verdict.status == "waiting":
        return task
    if not verdict.admitted:
        return task.model_copy(update={"status": verdict.status, "reason": verdict.reason[:300]})
    tests = task.tests.model_copy(
        update={
            "fail_to_pass": list(verdict.fail_to_pass),
            "fail_to_pass_count": len(verdict.fail_to_pass),
            "fail_to_pass_sha256": ids_sha256(verdict.fail_to_pass),
            "pass_to_pass_count": len(verdict.pass_to_pass),
            "pass_to_pass_sha256": ids_sha256(verdict.pass_to_pass),
            "unstable": sorted(set(task.tests.unstable) | set(verdict.flaky)),
        }
    )
    good_words = (FAILS,) if task.control else ("ok",)
    good = [f for f in task.fixes if verdict.fixes.get(f"{f.mode}/{f.origin}") in good_words]
    modes = [mode for mode in ("any_fix", "keep_new") if any(f.mode == mode for f in good)]
    pythons = sorted({*task.pythons, verdict.python}, key=lambda v: int(v.partition(".")[2]))
    return task.model_copy(
        update={
            "tests": tests,
            "fixes": good,
            "modes": modes,
            "status": "admitted",
            "reason": "",
            "pythons": pythons,
            "seconds": round(verdict.seconds, 1),
        }
    )


async def run(options: argparse.Namespace) -> int:
    """Judge, and update the task set if asked to."""
    folder = options.tasks or SHIPPED
    tasks = load_tasks(folder / "tasks.jsonl")
    releases = load_distributions(folder / "distributions.jsonl")
    chosen = [task for task in tasks if not options.only or task.id in options.only]
    channel = connect(options.sandbox)
    try:
        client = ServiceGateClient(StateClient(channel), SandboxClient(channel))
        async with PackageIndex(index_urls()) as index:
            gate = Gate(client, releases, index, repeats=options.repeats, learn=not options.strict)
            failed = await verify_all(
                gate, chosen, options.out, python=options.python, workers=options.workers
            )
    finally:
        await channel.close()
    if options.update:
        await asyncio.to_thread(_update, folder, options.update, tasks, read_judged(options.out))
    return failed


def _update(folder: Path, out: Path, tasks: Sequence[TaskRecord], judged: Sequence[Judged]) -> None:
    """Write the set of `folder` with what was seen of its records."""
    last = {task.id: one for task in tasks for one in judged if one.is_of(task)}
    new = [refreshed(t, last[t.id].verdict) if t.id in last else t for t in tasks]
    seen = [
        evidence_of(one.verdict, task, date.fromisoformat(one.day))
        for task in new
        if (one := last.get(task.id)) and one.judged_sha256 and is_evidence(one.verdict, task)
    ]
    every = renewed(load_evidence(folder / "evidence.jsonl"), seen, new)
    write_lines(out / "tasks.jsonl", new)
    write_lines(out / "evidence.jsonl", every)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m regreen.tasks.verify", description=__doc__
    )
    parser.add_argument("--sandbox", default="127.0.0.1:50052", help="address of the service")
    parser.add_argument("--tasks", type=Path, help="directory of a task set; default: the shipped")
    parser.add_argument("--only", action="append", default=[], help="id of one task; repeatable")
    parser.add_argument("--python", default="", help="judge on this interpreter instead")
    parser.add_argument("--repeats", type=int, default=SHIPPED_REPEATS, help="runs of every check")
    parser.add_argument(
        "--strict", action="store_true", help="refuse other failing tests than recorded"
    )
    parser.add_argument("--workers", type=int, default=2, help="tasks judged at a time")
    parser.add_argument("--out", type=Path, default=Path("verdicts.jsonl"), help="verdict file")
    parser.add_argument("--update", type=Path, help="directory to write the task set to")
    sys.exit(1 if asyncio.run(run(parser.parse_args())) else 0)


if __name__ == "__main__":
    main()
