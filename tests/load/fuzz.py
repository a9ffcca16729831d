"""Fuzz: random and mutated requests against the sandbox service; each ends in a gRPC status.

- Every RPC of every service that the process offers: half of the requests have one or two fields
  gone bad, the others had their bytes flipped, cut, doubled, spliced with others, or replaced.
- INTERNAL without the reason INFRA, UNKNOWN, a deadline, or an answer that cannot be decoded is a
  fault; so is a service that ended, or that does not serve an honest request afterwards.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from regreen.rpc.errors import InfraError, RegreenError, ResourceExhausted
from regreen.rpc.wire import from_rpc_error
from regreen.sandbox import v1 as pb
from regreen.sandbox.v1 import (
    action_service_pb2,
    egress_service_pb2,
    exec_service_pb2,
    image_service_pb2,
    sandbox_service_pb2,
    state_service_pb2,
)
from sandbox_svc.bench_service import Service
from tests.contract.mutations import mutants

_MODULES = (
    state_service_pb2,
    sandbox_service_pb2,
    action_service_pb2,
    exec_service_pb2,
    image_service_pb2,
    egress_service_pb2,
)
_AT_ONCE, _CALL_S = 24, 20.0
_LEFT_OUT = ("PrepareState",)
"""Would fetch and build; its spec is fuzzed by the contract tests."""


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
class Fuzz:
    """One run and what came of it."""

    service: Service
    rng: random.Random
    codes: Counter[str] = field(default_factory=Counter)
    infra: Counter[str] = field(default_factory=Counter)
    """What the service called its own trouble."""
    faults: list[str] = field(default_factory=list)

    async def run(self, count: int) -> None:
        """Send `count` requests."""
        methods = [
            method
            for module in _MODULES
            for service in module.DESCRIPTOR.services_by_name.values()
            for method in service.methods
            if method.name not in _LEFT_OUT
        ]
        for start in range(0, count, 1000):
            state = await self.service.root_state()  # it may have been deleted meanwhile
            box = await self._box(state)
            goods = {m.name: _good(m, box, state) for m in methods}
            await self._some(methods, goods, min(1000, count - start))
            sys.stderr.write(f"\r{start + 1000} of {count} ")
        box = await self._box(await self.service.root_state())
        assert (await self.service.run(box, "/bin/true")).exit_code == 0
        await self.service.delete(box)

    async def _box(self, state: str) -> str:
        """A sandbox of our own, as soon as those that the requests made have expired."""
        async with asyncio.timeout(60.0):
            while True:
                try:
                    return await self.service.create(state)
                except grpc.aio.AioRpcError as raw:
                    error = from_rpc_error(raw)
                    if not isinstance(error, ResourceExhausted):
                        raise
                    await asyncio.sleep(error.retry_after_s or 1.0)

    async def _some(
        self, methods: Sequence[MethodDescriptor], goods: dict[str, Message], count: int
    ) -> None:
        room = asyncio.Semaphore(_AT_ONCE)
        plain = {name: good.SerializeToString() for name, good in goods.items()}
        bad = {n: [good, *(one for _, one in mutants(good))] for n, good in goods.items()}

        async def one() -> None:
            method = self.rng.choice(methods)
            if self.rng.random() < 0.5:
                data = self.rng.choice(bad[method.name]).SerializeToString()
                if self.rng.random() < 0.5:  # a second bad field: the last one given counts
                    data += self.rng.choice(bad[method.name]).SerializeToString()
            else:
                data = mutated(plain[method.name], list(plain.values()), self.rng)
            async with room:
                await self._send(method, data)

        await asyncio.gather(*(one() for _ in range(count)))

    async def _send(self, method: MethodDescriptor, data: bytes) -> None:
        try:
            await self._call(method, data)
            self.codes["OK"] += 1
        except grpc.aio.AioRpcError as raw:
            self.codes[raw.code().name] += 1
            error: RegreenError = from_rpc_error(raw)
            frozen = "is being frozen or ended" in str(error)
            ours = not frozen and raw.code() in (
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.UNKNOWN,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
            if isinstance(error, InfraError):
                self.infra[f"{method.name}: {error}"[:160]] += 1
            elif ours:
                self.faults.append(f"{method.name} {data.hex()[:400]}: {raw.code().name}: {error}")

    async def _call(self, method: MethodDescriptor, data: bytes) -> None:
        channel: Any = self.service.channel
        name = f"/{method.containing_service.full_name}/{method.name}"
        decode = message_factory.GetMessageClass(method.output_type).FromString
        if method.client_streaming:
            await channel.stream_unary(name, None, decode)(iter([data]), timeout=_CALL_S)
        elif method.server_streaming:
            call = channel.unary_stream(name, None, decode)(data, timeout=_CALL_S)
            async for _ in call:
                pass
        else:
            await channel.unary_unary(name, None, decode)(data, timeout=_CALL_S)


def _good(method: MethodDescriptor, box: str, state: str) -> Message:
    """A request of a method with the fields that every caller would set."""
    request = message_factory.GetMessageClass(method.input_type)()
    fields = request.DESCRIPTOR.fields_by_name
    for name, value in (("sandbox_id", box), ("state_id", state)):
        if name in fields:
            setattr(request, name, value)
    if "id" in fields:
        request.id = state if "State" in method.containing_service.name else box
    if "command" in fields:
        request.command.CopyFrom(pb.Command(argv=["true"], cwd="/"))
    if "path" in fields:
        request.path = "/work/file"
    if "count" in fields:
        request.count = 1
    if "text" in fields:
        request.text = "x"
    return request


async def fuzz(count: int, seed: int) -> dict[str, Any]:
    """A fuzz of a fresh service; its report."""
    with tempfile.TemporaryDirectory(prefix="regreen-fuzz-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        home.chmod(0o711)
        flags = ("--default-ttl-s", "5", "--max-ttl-s", "5", "--command-s", "5")
        async with Service(home, *flags, "--self-check-s", "3600") as service:
            run = Fuzz(service, random.Random(seed))
            await run.run(count)
        return {
            "fuzz": "sandbox",
            "sent": count,
            "codes": dict(run.codes),
            "infra": dict(run.infra.most_common(20)),
            "faults": run.faults,
        }


def main() -> int:
    """Run it; 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="tests.load.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = asyncio.run(fuzz(options.requests, options.seed))
    sys.stdout.write(
        "\n" + json.dumps({**report, "faults": report["faults"][:20]}, indent=1) + "\n"
    )
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
