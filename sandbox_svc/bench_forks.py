"""Time to fork a State by its size, its layers and the children that it has already.

- `python -m sandbox_svc.bench_forks` runs this part of `bench_service` alone.
- Every axis is what it says, or the run ends: the service tells the bytes and layers of each State
  and how many sandboxes live, and a fork what lies below its root.
- What the forks of a service without sandboxes take beside the children of another is not the
  service's doing (`children elsewhere`).
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox_svc.bench_service import Service

FLAGS = ("--max-sandboxes", "1100", "--warm-seats", "8", "--flatten-layers", "0")
"""Of a service that has room for the children, and keeps layers as they are."""
_REST_S = 1.0
_LAYERS = (1, 10, 40)
_CHILDREN = (1, 10, 100, 1000)
_FILES = "mkdir -p {at} && cd {at} && head -c {size} /dev/zero | split -a 5 -b {each} -"
_MOUNTED = "grep -m 1 ' / / ' /proc/self/mountinfo | grep -o layers/ | wc -l"
"""How many layers lie below the root of a sandbox: names in the options of its overlay."""
Samples = dict[str, list[float]]


async def forks(
    service: "Service", root: str, other: "Service", turns: int, *, large: bool
) -> dict[str, Samples]:
    """Milliseconds of each fork, by kind and place on its axis.

    `other` has no sandboxes.

    Raises:
        RuntimeError: a State or the service is not what its row says.
    """
    by_size = await _by_size(service, root, large=large)
    by_layers = await _by_layers(service, root)
    found: dict[str, Samples] = {"size": {}, "layers": {}, "children": {}}
    for _ in range(max(3, turns // 10)):
        for kind, states in (("size", by_size), ("layers", by_layers)):
            for name, chosen in states.items():
                found[kind].setdefault(name, []).extend(await _forks_of(service, chosen, 5))
    state = by_size["350 MB, 20,000 files"]
    found["children"], found["children elsewhere"] = await _children(service, state, other)
    return found


async def _by_size(service: "Service", root: str, *, large: bool) -> dict[str, str]:
    sizes = {"1 MB": (1_000_000, 50_000), "350 MB, 20,000 files": (350_000_000, 17_500)}
    if large:
        sizes["1 GB, 20,000 files"] = (1_000_000_000, 50_000)
    found = {}
    for name, (size, each) in sizes.items():
        script = _FILES.format(at="/work/data", size=size, each=each)
        found[name] = await service.grown(root, script)
        told = (await service.read(found[name])).size_bytes
        seen = int(await _said(service, found[name], "cat /work/data/* | wc -c"))
        _must(seen == size <= told < 2 * size, f"{name}: {seen} bytes seen, {told} told")
        _say(f"state of {name}")
    return found


async def _by_layers(service: "Service", root: str) -> dict[str, str]:
    found, state = {}, root
    for number in range(1, max(_LAYERS) + 1):
        if number > 1:
            state = await service.grown(state, f"echo {number} > /work/layer{number}")
        if number in _LAYERS:
            told = len((await service.read(state)).layers)
            mounted = int(await _said(service, state, _MOUNTED))
            _must(told == mounted == number, f"{number} layers: {told} told, {mounted} mounted")
            found[str(number)] = state
    _say(f"states of {', '.join(found)} layers")
    return found


async def _children(service: "Service", state: str, other: "Service") -> tuple[Samples, Samples]:
    """Time of one more fork while so many children of the State live; there and in another
    service of this host, which has none.

    Counted up and down again, so that a host that gets slower or faster meanwhile favours none.
    """
    live: list[str] = []
    found: Samples = {}
    elsewhere: Samples = {}
    empty = await other.root_state()
    await _forks_of(other, empty, 5)
    for wanted in (*_CHILDREN, *reversed(_CHILDREN)):
        while len(live) < wanted:
            more = min(16, wanted - len(live))
            live += await asyncio.gather(*(service.create(state) for _ in range(more)))
        await _delete(service, live, wanted)
        await asyncio.sleep(_REST_S)
        for _ in range(5):
            found.setdefault(str(wanted), []).extend(await _forks_of(service, state, 10))
            elsewhere.setdefault(str(wanted), []).extend(await _forks_of(other, empty, 10))
        told, others = await service.live(), await other.live()
        _must((told, others) == (wanted, 0), f"{wanted} children: {told} live, {others} elsewhere")
        _say(f"{wanted} children")
    await _delete(service, live, 0)
    return found, elsewhere


async def _delete(service: "Service", live: list[str], left: int) -> None:
    """Delete the sandboxes that were made last, until so many are left."""
    while len(live) > left:
        gone = live[max(left, len(live) - 16) :]
        await asyncio.gather(*(service.delete(box) for box in gone))
        del live[len(live) - len(gone) :]


async def _forks_of(service: "Service", state: str, count: int) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        box = await service.create(state)
        found.append((time.perf_counter() - began) * 1e3)
        await service.delete(box)
    return found


async def _said(service: "Service", state: str, script: str) -> str:
    """What a script prints in a fork."""
    box = await service.create(state)
    try:
        return (await service.run(box, "sh", "-ec", script)).stdout.head.decode()
    finally:
        await service.delete(box)


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"a row is not what it says: {what}")


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


async def measure(home: Path, turns: int, *, large: bool) -> dict[str, Samples]:
    """This part alone, with services of its own."""
    from sandbox_svc.bench_service import Service

    for name in ("service", "other"):
        (home / name).mkdir()
    async with (
        Service(home / "service", *FLAGS) as service,
        Service(home / "other", "--warm-seats", "8") as other,
    ):
        return await forks(service, await service.root_state(), other, turns, large=large)


def main(argv: list[str] | None = None) -> int:
    """Run the forks alone; the exit code."""
    parser = argparse.ArgumentParser(prog="sandbox_svc.bench_forks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--turns", type=int, default=100, help="half as many forks of each State")
    parser.add_argument("--no-large", action="store_true", help="leave out the state of 1 GB")
    options = parser.parse_args(argv)
    home = Path(tempfile.mkdtemp(prefix="regreen-bench-"))
    home.chmod(0o711)
    try:
        found = asyncio.run(measure(home, options.turns, large=not options.no_large))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if options.json:
        sys.stdout.write(json.dumps({"bench": "sandbox-forks", "forks": found}, indent=1) + "\n")
        return 0
    for kind, rows in found.items():
        middles = {name: statistics.median(values) for name, values in rows.items()}
        for name, values in rows.items():
            least = f"fastest {min(values):.2f}, {len(values)} samples"
            sys.stdout.write(f"{kind:18} {name:22} {middles[name]:8.2f} ms  ({least})\n")
        ratio = max(middles.values()) / min(middles.values())
        sys.stdout.write(f"{kind:18} slowest over fastest   {ratio:8.2f}x\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
