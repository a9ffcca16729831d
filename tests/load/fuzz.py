"""Fuzz: random and mutated requests against the sandbox service; each ends in a gRPC status.

- Every RPC of every service that the process offers: half of the requests have one or two fields
  gone bad, the others had their bytes flipped, cut, doubled, spliced with others, or replaced. One
  in eight goes out as it is, so that what the others name is in every state that it can be in.
- INTERNAL (INFRA too: nothing here is beyond the service), UNKNOWN, a deadline, a connection that
  was lost, or an answer that cannot be decoded is a fault; so is a service that ended, or that
  does not serve an honest request afterwards.
- A service that refuses everything is at fault too: of the good requests of each method a share
  must be answered, though the others may have taken the ground from under them.
- UNAVAILABLE is no fault where it asks to come again: a sandbox is frozen, restored or ended.
- Each round has sandboxes and commands of its own, and leaves none.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from regreen.sandbox import v1 as pb
from sandbox_svc.bench_service import Service
from tests.contract.mutations import mutants
from tests.load import scene

_AT_ONCE, _CALL_S = 24, 20.0
_ROUND = 250
_AS_IT_IS, _BAD_FIELD = 0.125, 0.5
"""Shares of the requests that are good, and of those that are bad in a field or two."""
_ANSWERED, _ENOUGH = 0.1, 20
"""Share of the good requests of a method that must be answered, and from how many on."""
_NO_TESTS = "Validate"
"""Its good requests end in FAILED_PRECONDITION: a State with tests would have to be built."""
_AGAIN = "; try again"
"""How the service asks to come again when something was taken from under a call."""
_LOST = "Internal error from Core"
"""What grpc.aio says where a server answered before it had read all of a stream, and a write came
too late: it forgets the answer (grpc#36066). Such a request is sent again for its answer."""
_TRIES = 5
_FAULTS = ("no status", "INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS")


def mutated(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A request's bytes after one to four changes."""
    data = bytearray(good)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                del data[place : place + rng.randrange(1, 9)]
            case 3:
                data += data[place:]
            case 4:
                del data[place:]
            case 5:
                other = rng.choice(others)
                data += other[rng.randrange(len(other) + 1) :]
            case _:
                data = bytearray(rng.randbytes(rng.randrange(64)))
    return bytes(data[: 1 << 20])


@dataclass
class Requests:
    """The requests of one round: good ones by method, and what becomes of them."""

    goods: Mapping[str, Sequence[scene.Sent]]
    rng: random.Random
    _plain: dict[str, list[bytes]] = field(default_factory=dict)
    _bad: dict[tuple[str, int, int], list[Message]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, requests in self.goods.items():
            self._plain[name] = [m.SerializeToString() for sent in requests for m in sent]

    def draw(self, method: str) -> tuple[Sequence[bytes], bool]:
        """The messages of one request, and whether it is good."""
        number = self.rng.randrange(len(self.goods[method]))
        sent = self.goods[method][number]
        found = [message.SerializeToString() for message in sent]
        place = self.rng.randrange(len(found))
        chance = self.rng.random()
        if chance < _AS_IT_IS:
            return found, True
        if chance < _AS_IT_IS + (1 - _AS_IT_IS) * _BAD_FIELD:
            found[place] = self._bad_field(method, number, place)
        else:
            found[place] = mutated(
                found[place], self.rng.choice(list(self._plain.values())), self.rng
            )
        if len(found) > 1 and self.rng.random() < 0.2:  # a stream of another order or length
            chosen = self.rng.randrange(len(found))
            found[chosen:] = self.rng.choice(([], found[chosen:] * 2, found[:chosen]))
        return found, False

    def _bad_field(self, method: str, number: int, place: int) -> bytes:
        key = method, number, place
        if key not in self._bad:
            good = self.goods[method][number][place]
            self._bad[key] = [good, *(one for _, one in mutants(good))]
        data = self.rng.choice(self._bad[key]).SerializeToString()
        if self.rng.random() < 0.5:  # a second bad field: the last one given counts
            data += self.rng.choice(self._bad[key]).SerializeToString()
        return data


@dataclass
class Fuzz:
    """One run and what came of it."""

    service: Service
    rng: random.Random
    codes: dict[str, Counter[str]] = field(default_factory=dict)
    """By method: how many of its requests ended in which status."""
    goods: dict[str, Counter[str]] = field(default_factory=dict)
    """The same of those that were good."""
    faults: list[str] = field(default_factory=list)

    async def run(self, count: int) -> None:
        """Send `count` requests."""
        methods = scene.methods()
        for start in range(0, count, _ROUND):
            state = await self.service.root_state()  # it may have been deleted meanwhile
            there = await scene.made(self.service.channel, state)
            requests = Requests(scene.goods(there), self.rng)
            await self._round(methods, requests, min(_ROUND, count - start))
            await self._clear()
            sys.stderr.write(f"\r{start + _ROUND} of {count}, {len(self.faults)} faults ")
        self.check_answers(method.name for method in methods)
        box = await self.service.create(await self.service.root_state())
        assert (await self.service.run(box, "/bin/true")).exit_code == 0
        await self.service.delete(box)

    async def _clear(self) -> None:
        """Delete every sandbox, so that the next round has room."""
        stub = pb.SandboxServiceStub(self.service.channel)
        request = pb.ListSandboxesRequest(page_size=1000)
        found = (await stub.ListSandboxes(request, timeout=_CALL_S)).sandboxes
        await asyncio.gather(*(self.service.delete(box.id) for box in found))

    async def _round(
        self, methods: Sequence[MethodDescriptor], requests: Requests, count: int
    ) -> None:
        room = asyncio.Semaphore(_AT_ONCE)

        async def one() -> None:
            async with room:
                method = self.rng.choice(methods)
                sent, good = requests.draw(method.name)
                code = await self._send(method, sent)
                self.codes.setdefault(method.name, Counter())[code] += 1
                if good:
                    self.goods.setdefault(method.name, Counter())[code] += 1

        await asyncio.gather(*(one() for _ in range(count)))

    async def _send(self, method: MethodDescriptor, sent: Sequence[bytes]) -> str:
        """The status of a request."""
        code, told = "no status", ""
        for _ in range(_TRIES):
            try:
                await self._call(method, sent)
                code = "OK"
            except grpc.aio.AioRpcError as raw:
                code, told = raw.code().name, str(raw.details())
            except Exception as error:  # whatever it is, it is no status
                told = f"{type(error).__name__}: {error}"
            if told != _LOST or not method.client_streaming:
                break
        asked = code == "UNAVAILABLE" and told.endswith(_AGAIN)
        if code in _FAULTS and not asked:
            shown = b" | ".join(sent).hex()[:400]
            self.faults.append(f"{method.name} {shown}: {code}: {told}")
        return code

    def check_answers(self, methods: Iterable[str]) -> None:
        """A fault for every method whose good requests are hardly ever answered."""
        for name in methods:
            codes = self.goods.get(name, Counter())
            sent = codes.total()
            answered = codes["FAILED_PRECONDITION" if name == _NO_TESTS else "OK"]
            if sent >= _ENOUGH and answered < _ANSWERED * sent:
                self.faults.append(f"{name}: {answered} of {sent} good requests were answered")

    async def _call(self, method: MethodDescriptor, sent: Sequence[bytes]) -> None:
        channel: Any = self.service.channel
        name = f"/{method.containing_service.full_name}/{method.name}"
        decode = message_factory.GetMessageClass(method.output_type).FromString
        if method.client_streaming:
            await channel.stream_unary(name, None, decode)(iter(sent), timeout=_CALL_S)
        elif method.server_streaming:
            call = channel.unary_stream(name, None, decode)(sent[0], timeout=_CALL_S)
            async for _ in call:
                pass
        else:
            await channel.unary_unary(name, None, decode)(sent[0], timeout=_CALL_S)


async def fuzz(count: int, seed: int) -> dict[str, Any]:
    """A fuzz of a fresh service; its report."""
    with tempfile.TemporaryDirectory(prefix="regreen-fuzz-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        home.chmod(0o711)
        flags = ("--default-ttl-s", "60", "--max-ttl-s", "60", "--command-s", "5")
        async with Service(home, *flags, "--self-check-s", "3600") as service:
            run = Fuzz(service, random.Random(seed))
            await run.run(count)
        return {
            "fuzz": "sandbox",
            "sent": count,
            "seed": seed,
            "codes": dict(sum(run.codes.values(), Counter())),
            "calls": {name: dict(codes) for name, codes in sorted(run.codes.items())},
            "goods": {name: dict(codes) for name, codes in sorted(run.goods.items())},
            "faults": run.faults,
        }


def table(calls: Mapping[str, Mapping[str, int]]) -> str:
    """Calls by statuses, one line a call."""
    sums: Counter[str] = sum((Counter(codes) for codes in calls.values()), Counter())
    statuses = [status for status, _ in sums.most_common()]
    names = max(map(len, calls), default=0)
    lines = [" ".join([" " * names, *statuses])]
    for name, codes in {**calls, "all": sums}.items():
        cells = [f"{codes.get(status) or '':>{len(status)}}" for status in statuses]
        lines.append(" ".join([f"{name:{names}}", *cells]))
    return "\n".join(lines)


def main() -> int:
    """Run it; 1 if there was a fault."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="tests.load.fuzz", description=__doc__
    )
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/bench/fuzz.json"))
    options = parser.parse_args()
    report = asyncio.run(fuzz(options.requests, options.seed))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write("\n" + table(report["calls"]) + "\n")
    sys.stdout.write("\nof these, good ones:\n" + table(report["goods"]) + "\n")
    del report["calls"], report["goods"]
    sys.stdout.write(json.dumps({**report, "faults": report["faults"][:20]}, indent=1) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
