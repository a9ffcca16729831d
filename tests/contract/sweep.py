"""Bad requests sent to every method of a service, and what is wrong with how they are refused."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from regreen.client.channel import new_request_id
from regreen.rpc.errors import InvalidArgument
from regreen.rpc.wire import from_rpc_error
from tests.contract.mutations import mutants

Goods = Mapping[str, Message | Sequence[Message]]
Answers = list[Any]
After = Callable[[str, Answers], Awaitable[None]]

_SHALLOW = ("JudgeGroup", "Calibrate", "CommitRollout", "CommitTrajectories")
"""What is inside these is read as Judge and CommitTrajectory read it."""
_WHOLE = ("request", "archive")
"""What is wrong with a request as such, and with the archive that an upload's messages make."""
_AT_ONCE = 8
_CALL_S = 20.0
_STREAM_S = 3.0
_OUR_FAULT = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)


class Sweep:
    """Sends bad requests to the services of one address and collects what went wrong."""

    def __init__(self, channel: grpc.aio.Channel, after: After | None = None) -> None:
        self._channel, self._after = channel, after
        self._room = asyncio.Semaphore(_AT_ONCE)
        self.sent = 0
        self.faults: list[str] = []

    async def all(self, services: Sequence[ServiceDescriptor], goods: Goods) -> None:
        """Every method of the services: from its good requests, or from an empty one."""
        for service in services:
            for method in service.methods:
                await self.method(method, goods.get(method.name))

    async def method(
        self, method: MethodDescriptor, good: Message | Sequence[Message] | None = None
    ) -> None:
        """Every bad form of a method's requests, then bytes that are no message at all."""
        request_type = message_factory.GetMessageClass(method.input_type)
        goods = [good or request_type()] if good is None or isinstance(good, Message) else good
        work = [
            self._try(method, path, bad.SerializeToString())
            for one in goods
            for path, bad in _once_each(one, shallow=method.name in _SHALLOW)
        ]
        await asyncio.gather(*work)
        code = await self._try(method, "no message", b"\xff" * 9)
        if code is not grpc.StatusCode.INVALID_ARGUMENT:
            self.faults.append(f"{method.name} no message: {code}")

    async def _try(
        self, method: MethodDescriptor, path: str, content: bytes
    ) -> grpc.StatusCode | None:
        async with self._room:
            self.sent += 1
            try:
                answers = await self._call(method, content)
            except grpc.aio.AioRpcError as error:
                if error.code() in _OUR_FAULT:
                    said = f"{error.code().name}: {error.details()}"
                    self.faults.append(f"{method.name} {path}: {said}")
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    self._judge(method, path, error)
                return error.code()
            if self._after is not None:
                await self._after(method.name, answers)
            return None

    def _judge(self, method: MethodDescriptor, path: str, error: grpc.aio.AioRpcError) -> None:
        """A refusal names a field that the request has, and a remedy."""
        refused = from_rpc_error(error)
        assert isinstance(refused, InvalidArgument)
        field = refused.field
        if method.client_streaming:  # the place of a message in the stream
            field = re.sub(r"^trajectories\[\d+\]", "trajectory", field)
        if not _is_field(field, method.input_type):
            self.faults.append(f"{method.name} {path}: no such field: {error.details()}")
        if not refused.remedy:
            self.faults.append(f"{method.name} {path}: no remedy: {error.details()}")

    async def _call(self, method: MethodDescriptor, content: bytes) -> Answers:
        name = f"/{method.containing_service.full_name}/{method.name}"
        decode = message_factory.GetMessageClass(method.output_type).FromString
        if method.client_streaming:
            call = self._channel.stream_unary(name, None, decode)
            return [await call(iter([content]), timeout=_CALL_S)]
        if not method.server_streaming:
            return [await self._channel.unary_unary(name, None, decode)(content, timeout=_CALL_S)]
        call = self._channel.unary_stream(name, None, decode)(content, timeout=_STREAM_S)
        return [answer async for answer in call]


def _is_field(path: str, message: Descriptor | None) -> bool:
    """Whether a path leads to a field of a message; the whole of one is a field too."""
    if path in _WHOLE:
        return True
    for part in re.sub(r"\[.*?\](?=\.|$)", "[]", path, flags=re.DOTALL).split("."):
        name, bracket, _ = part.partition("[")
        field = message.fields_by_name.get(name) if message is not None else None
        if field is None or (bracket and not field.is_repeated):
            return False
        message = field.message_type
        if message is not None and message.full_name == "google.protobuf.Struct":
            return True
    return True


def _once_each(good: Message, *, shallow: bool) -> list[tuple[str, Message]]:
    """Bad forms of a request, each under an id of its own, lest the answers be remembered ones."""
    found = []
    for path, bad in mutants(good, shallow=shallow):
        if "request_id" in bad.DESCRIPTOR.fields_by_name and not path.startswith("request_id"):
            bad.request_id = new_request_id()  # type: ignore[attr-defined]
        found.append((path, bad))
    return found


def check(sweep: Sweep, least: int) -> None:
    """No fault, and the sweep was a real one."""
    assert not sweep.faults, f"{len(sweep.faults)} of {sweep.sent}:\n" + "\n".join(
        sweep.faults[:40]
    )
    assert sweep.sent >= least
