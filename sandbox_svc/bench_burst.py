"""256 forks of one State at once: how long each takes, and what becomes of those without room.

- `python -m sandbox_svc.bench_burst` runs this part of `bench_service` alone.
- With room for all, each fork is admitted. With room for 64 the others are refused; once those 64
  are deleted, the refused ones come again, each after the delay that it was given, until they are
  in.
- One fork alone is the mean of rows of forks without a pause, in the same service just before and
  after: what is made ahead for the next sandbox counts.
- 256 reads at once, of the State itself, say what as many calls take that do nothing: most of the
  time of a refusal is that of the caller's own 256 calls.
- Targets compare times of one run, so a slow machine meets them too: nobody waits longer than the
  forks before it take one after the other (a quarter more, for load that comes), and a refusal
  costs about what a read does, long before half of the forks would be made if there were room.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import uvloop

from regreen.rpc.errors import ResourceExhausted
from regreen.rpc.wire import from_rpc_error
from sandbox_svc.bench_warm import target

if TYPE_CHECKING:
    from sandbox_svc.bench_service import Service

BURST = 256
_FEW = 64
_ALONE = 32
_READS = 3
_GIVE_UP_S = 120.0
TARGETS: dict[str, tuple[str, float]] = {
    "success, room for all": ("at least", 1.0),
    "p99 over forks at once x one alone, room for all": ("at most", 1.25),
    "refusals with a delay, room for 64": ("at least", 1.0),
    "success after the delay, room for 64": ("at least", 1.0),
    "refused p99 over p99 of as many reads, room for 64": ("at most", 3.0),
    "refused p99 over p50 of the forks with room for all": ("at most", 0.5),
    "p99 over forks at once x one alone, room for 64": ("at most", 1.25),
}
"""What each figure of `ratios` is to keep."""


@dataclass(slots=True)
class _Burst:
    """What came of the forks of one burst, milliseconds each."""

    admitted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    """What refusals said; 0 where one said nothing."""
    later: int = 0
    """Forks that were refused at first and admitted in the end."""
    tries: int = 0
    """Their calls until then."""
    live: list[str] = field(default_factory=list)


async def burst(home: Path, start: "Callable[..., Service]") -> dict[str, Any]:
    """256 forks of one State at once, with room for all, then with room for 64."""
    found: dict[str, Any] = {}
    for name, room in (("room for all", BURST + 1), (f"room for {_FEW}", _FEW)):
        folder = home / f"burst{room}"
        folder.mkdir()
        async with start(folder, "--max-sandboxes", str(room)) as service:
            found[name] = await _one(service, min(room, BURST))
        _say(f"burst, {name}")
    return found


async def _one(service: "Service", at_once: int) -> dict[str, Any]:
    state = await service.root_state()
    await service.cycle(state)
    alone_ms = await _alone(service, state)
    reads = await _reads(service, state)
    before = service.resident_bytes
    done = _Burst()
    await asyncio.gather(*(_fork(service, state, done) for _ in range(BURST)))
    grown = service.resident_bytes - before
    coming = asyncio.gather(*(_again(service, state, delay, done) for delay in done.delays_s))
    for box in done.live:
        await service.delete(box)
    await coming
    alone_ms = (alone_ms + await _alone(service, state)) / 2
    row: dict[str, Any] = {
        "admitted": len(done.admitted),
        "alone_ms": round(alone_ms, 2),
        **percentiles(done.admitted),
        "p99_of_row": round(percentiles(done.admitted)["p99_ms"] / (at_once * alone_ms), 3),
        "reads": percentiles(reads),
        "success": (len(done.admitted) + done.later) / BURST,
        "grown_mb": round(grown / 1e6, 1),
    }
    if done.refused:
        row["refused"] = percentiles(done.refused)
        row["told_delay"] = sum(delay > 0 for delay in done.delays_s) / len(done.delays_s)
        row["calls_until_admitted"] = round(done.tries / max(1, len(done.refused)), 2)
    return row


async def _alone(service: "Service", state: str) -> float:
    """Milliseconds of one fork where they come one after the other, without a pause."""
    live = []
    began = time.perf_counter()
    for _ in range(_ALONE):
        live.append(await service.create(state))
    spent = (time.perf_counter() - began) * 1e3
    await asyncio.gather(*(service.delete(box) for box in live))
    return spent / _ALONE


async def _reads(service: "Service", state: str) -> list[float]:
    """Milliseconds of calls that only look something up, 256 at once."""
    found: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        await service.read(state)
        found.append((time.perf_counter() - began) * 1e3)

    for _ in range(_READS):
        await asyncio.gather(*(one() for _ in range(BURST)))
    return found


async def _fork(service: "Service", state: str, done: _Burst) -> None:
    began = time.perf_counter()
    box, delay_s = await _try(service, state)
    spent = (time.perf_counter() - began) * 1e3
    if box:
        done.live.append(box)
        done.admitted.append(spent)
        return
    done.refused.append(spent)
    done.delays_s.append(delay_s)


async def _try(service: "Service", state: str) -> tuple[str, float]:
    """The sandbox, or an empty id and the delay that the refusal told; no other error passes."""
    try:
        return await service.create(state), 0.0
    except grpc.aio.AioRpcError as raw:
        error = from_rpc_error(raw)
        if not isinstance(error, ResourceExhausted):
            raise error from raw
        return "", error.retry_after_s or 0.0


async def _again(service: "Service", state: str, delay_s: float, done: _Burst) -> None:
    """Come again when told to, until admitted; one that was told nothing has given up."""
    give_up = time.monotonic() + _GIVE_UP_S
    while delay_s and time.monotonic() < give_up:
        await asyncio.sleep(delay_s)
        done.tries += 1
        box, delay_s = await _try(service, state)
        if box:
            done.later += 1
            await service.delete(box)


def ratios(bursts: dict[str, Any]) -> dict[str, float]:
    """The figures that have a target, by its name."""
    found = {}
    for room, row in bursts.items():
        found[f"p99 over forks at once x one alone, {room}"] = row["p99_of_row"]
        if "refused" not in row:
            found[f"success, {room}"] = row["success"]
            continue
        found[f"refusals with a delay, {room}"] = row["told_delay"]
        found[f"success after the delay, {room}"] = row["success"]
        late = row["refused"]["p99_ms"]
        over = late / row["reads"]["p99_ms"]
        found[f"refused p99 over p99 of as many reads, {room}"] = round(over, 2)
        over = late / bursts["room for all"]["p50_ms"]
        found["refused p99 over p50 of the forks with room for all"] = round(over, 2)
    return found


def targets(bursts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each figure with its target, and whether it is met; one that is missing is missed."""
    found = ratios(bursts)
    missing = {"ratio": None, "met": False}
    return {
        name: target(found[name], side, bound)
        if name in found
        else {**missing, "target": f"{side} {bound:g}"}
        for name, (side, bound) in TARGETS.items()
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The middle and the tail of some times."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

    return {"p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99)}


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    """Run the bursts alone; the exit code is 1 if a target is missed."""
    from sandbox_svc.bench_service import Service

    parser = argparse.ArgumentParser(prog="sandbox_svc.bench_burst", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    home = Path(tempfile.mkdtemp(prefix="regreen-bench-"))
    home.chmod(0o711)
    try:
        bursts = uvloop.run(burst(home, Service))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    met = targets(bursts)
    if options.json:
        report = {"bench": "sandbox-burst", "bursts": bursts, "targets": met}
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        for name, row in bursts.items():
            sys.stdout.write(f"{BURST} forks at once, {name}: {row}\n")
        for name, one in met.items():
            told = "met" if one["met"] else "missed"
            sys.stdout.write(f"{name}: {one['ratio']}, {one['target']}: {told}\n")
    return 0 if all(one["met"] for one in met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
