"""A front over workers that stand in for real ones by their wire contract, a moment at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import pytest

from regreen.blobs import open_blobs
from regreen.client.channel import connect
from regreen.client.egress import EgressClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common import v1 as common_pb
from regreen.rpc import wire
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
)
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings
from sandbox_svc.fleet.archive import Archive
from sandbox_svc.fleet.calls import METHODS, SERVICES, Endpoint
from sandbox_svc.fleet.front import Front
from sandbox_svc.fleet.registry import Registry
from sandbox_svc.fleet.ring import ranked
from sandbox_svc.fleet.router import Router
from sandbox_svc.manners import LEAVING
from sandbox_svc.servicer import page
from sandbox_svc.specs import spec_from_proto
from sandbox_svc.state_records import state_id
from tests.unit.sandbox.test_fleet import archive_of


@dataclass
class Holder:
    """A worker that holds states as bytes; its methods are those of the contract that matter."""

    states: dict[str, tuple[float, bytes]] = field(default_factory=dict)
    """By id: when it was made, and its archive."""
    full: bool = False
    build: bytes = b""
    """What a preparation makes."""
    building: asyncio.Event = field(default_factory=asyncio.Event)
    build_on: asyncio.Event = field(default_factory=asyncio.Event)
    deleted: asyncio.Event = field(default_factory=asyncio.Event)
    delete_on: asyncio.Event | None = None
    create_on: asyncio.Event | None = None
    created: int = 0
    failed: tuple[str, ...] = ()
    """States whose preparation failed here not long ago."""
    listed: list[int] = field(default_factory=list)
    """How many states each of its answers to ListStates had."""

    def message(self, wanted: str) -> pb.State:
        if wanted not in self.states:
            raise NotFound(f"no such state: {wanted}", metadata={"id": wanted})
        state = pb.State(id=wanted)
        state.create_time.FromNanoseconds(int(self.states[wanted][0] * 1e9))
        return state

    async def GetState(self, request, context):
        return pb.GetStateResponse(state=self.message(request.id))

    async def ListStates(self, request, context):
        ordered = sorted((made_s, name) for name, (made_s, _) in self.states.items())
        chosen, token = page(ordered, lambda item: item, request.page_size, request.page_token)
        self.listed.append(len(chosen))
        states = [self.message(name) for _, name in chosen]
        return pb.ListStatesResponse(states=states, next_page_token=token)

    async def ListSandboxes(self, request, context):
        return pb.ListSandboxesResponse()

    async def DeleteState(self, request, context):
        self.states.pop(request.id, None)
        self.deleted.set()
        if self.delete_on is not None:
            await self.delete_on.wait()
        return pb.DeleteStateResponse()

    async def PrepareState(self, request, context):
        yield pb.PrepareStateResponse(progress=pb.PrepareProgress(stage="build"))
        self.building.set()
        await self.build_on.wait()
        wanted = state_id("", spec_from_proto(request.spec).digest)
        self.states[wanted] = (2.0, self.build)
        yield pb.PrepareStateResponse(state=self.message(wanted))

    async def CreateSandbox(self, request, context):
        if self.full:
            raise ResourceExhausted("no room", retry_after_s=1.0)
        self.message(request.state_id)
        self.created += 1
        if self.create_on is not None:
            await self.create_on.wait()
        sandbox = pb.Sandbox(id="sbx_" + "1" * 32, state_id=request.state_id)
        return pb.CreateSandboxResponse(sandbox=sandbox)

    async def ListEgress(self, request, context):
        if request.state_id not in self.failed:
            self.message(request.state_id)
        record = pb.EgressRecord(state_id=request.state_id, host="index.test")
        return pb.ListEgressResponse(records=[record])

    async def ExportState(self, request, context):
        self.message(request.id)
        yield pb.ExportStateResponse(chunk=self.states[request.id][1])

    async def ImportState(self, requests, context):
        content = b"".join([request.chunk async for request in requests])
        wanted = content.partition(b"st_")[2][:32].decode()
        self.states[f"st_{wanted}"] = (3.0, content)
        return pb.ImportStateResponse(state=self.message(f"st_{wanted}"))


def _typed(handler):
    """A handler whose errors go out as any service's."""

    async def one(request, context):
        try:
            return await handler(request, context)
        except RegreenError as error:
            await context.abort_with_status(wire.to_status(error))

    return one


@contextlib.asynccontextmanager
async def serving(holder: Holder) -> AsyncIterator[str]:
    """The address of a worker."""
    server = grpc.aio.server()
    for method in METHODS.values():
        handler = getattr(holder, method.name, None)
        if handler is None:
            continue
        kind = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }[method.streams_in, method.streams_out]
        wrapped = kind(
            handler if method.streams_out else _typed(handler),
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )
        generic = grpc.method_handlers_generic_handler(method.service, {method.name: wrapped})
        server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@dataclass
class Fleet:
    """A front and its clients."""

    states: StateClient
    sandboxes: SandboxClient
    archive: Archive
    records: EgressClient


@contextlib.asynccontextmanager
async def fronted(tmp_path, *holders: Holder, remember: bool = False) -> AsyncIterator[Fleet]:
    """A front over workers, named w0, w1, ..."""
    async with contextlib.AsyncExitStack() as stack:
        registry = Registry()
        archive = Archive(open_blobs(tmp_path / "blobs", fsync=False), tmp_path / "scratch")
        router = Router(registry, archive, keep="none")
        endpoints = []
        for number, holder in enumerate(holders):
            address = await stack.enter_async_context(serving(holder))
            endpoints.append(Endpoint(f"w{number}", "1", "1", address))
        stack.push_async_callback(registry.close)
        stack.push_async_callback(router.close)
        registry.update(endpoints)
        async with asyncio.timeout(10):
            while len(registry.ready) < len(holders):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        settings = ServiceSettings(
            listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, drain_s=0.2
        )
        server = Server(settings, SERVICES, remember=remember, leaving=LEAVING)
        Front(router).add_to(server.grpc)
        await stack.enter_async_context(server)
        channel = connect(server.address)
        stack.push_async_callback(channel.close)
        yield Fleet(
            StateClient(channel, patience_s=0.0),
            SandboxClient(channel, patience_s=0.0),
            archive,
            EgressClient(channel, patience_s=0.0),
        )


SPEC = pb.EnvironmentSpec(
    builder="system",
    overlay=[
        common_pb.FileChange(path="a", kind=common_pb.CHANGE_KIND_ADD, content=b"a"),
    ],
)
STATE = state_id("", spec_from_proto(SPEC).digest)


async def prepare(fleet: Fleet, *, rebuild: bool = False) -> pb.State:
    events = [event async for event in fleet.states.prepare_state(SPEC, rebuild=rebuild)]
    return events[-1].state


async def pieces(data: bytes):
    yield data


async def test_a_state_deleted_while_it_is_prepared_does_not_come_back(tmp_path):
    worker = Holder()
    async with fronted(tmp_path, worker) as fleet:
        preparing = asyncio.create_task(prepare(fleet))
        await worker.building.wait()
        await fleet.states.delete_state(STATE)
        worker.build_on.set()
        with pytest.raises(FailedPrecondition, match="deleted while it was prepared"):
            await preparing
        assert worker.states == {}
        assert (await prepare(fleet)).id == STATE, "it can be made again"
        assert STATE in worker.states


async def test_who_asks_again_after_a_short_deadline_gets_what_was_begun(tmp_path):
    worker = Holder(states={STATE: (1.0, b"")}, create_on=asyncio.Event())
    async with fronted(tmp_path, worker, remember=True) as fleet:
        request = pb.CreateSandboxRequest(state_id=STATE, request_id="r")
        create = fleet.sandboxes._stub.CreateSandbox
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                await create(request, timeout=0.2)
        worker.create_on.set()
        assert (await create(request, timeout=10)).sandbox.state_id == STATE
        assert (await create(request, timeout=10)).sandbox.state_id == STATE
        assert worker.created == 1


async def test_what_a_preparation_fetched_is_known_where_the_state_is_or_where_it_failed(tmp_path):
    failed, nowhere = "st_" + "e" * 32, "st_" + "f" * 32
    holder, other = Holder(states={STATE: (1.0, b"")}), Holder(failed=(failed,))
    async with fronted(tmp_path, holder, other) as fleet:
        for wanted in (STATE, failed):
            (record,) = [record async for record in fleet.records.egress_records(state_id=wanted)]
            assert (record.state_id, record.host) == (wanted, "index.test")
        with pytest.raises(NotFound):
            await fleet.records.list_egress(state_id=nowhere)
        for fields in ({}, {"sandbox_id": "sbx_" + "0" * 32, "state_id": STATE}):
            with pytest.raises(InvalidArgument, match="sandbox_id"):
                await fleet.records.list_egress(**fields)


async def test_who_asks_again_after_a_deletion_keeps_what_both_waited_for(tmp_path):
    worker = Holder()
    async with fronted(tmp_path, worker) as fleet:
        first = asyncio.create_task(prepare(fleet))
        await worker.building.wait()
        await fleet.states.delete_state(STATE)
        worker.building.clear()
        second = asyncio.create_task(prepare(fleet))
        await worker.building.wait()
        worker.build_on.set()
        with pytest.raises(FailedPrecondition):
            await first
        assert (await second).id == STATE
        assert STATE in worker.states


async def test_nobody_is_given_an_old_copy_while_a_state_is_replaced(tmp_path):
    old = archive_of({"a": b"old"}, record=b'{"id": "%s"}' % STATE.encode())
    new = archive_of({"a": b"new"}, record=b'{"id": "%s"}' % STATE.encode())
    holders = {f"w{n}": Holder({STATE: (1.0, old)}, full=True, build=new) for n in range(2)}
    builder, other = (holders[name] for name in ranked(STATE, holders))
    builder.build_on.set()
    other.delete_on = asyncio.Event()
    async with fronted(tmp_path, *holders.values()) as fleet:
        message = other.message(STATE).SerializeToString()
        await fleet.archive.store(STATE, message, STATE, pieces(old))
        rebuilding = asyncio.create_task(prepare(fleet, rebuild=True))
        async with asyncio.timeout(10):
            await other.deleted.wait()
        other.full = False
        creating = asyncio.create_task(fleet.sandboxes.create_sandbox(STATE))
        await asyncio.sleep(0.3)  # for what an old copy would be brought by
        other.delete_on.set()
        async with asyncio.timeout(10):
            await rebuilding
            assert (await creating).state_id == STATE
        assert builder.states[STATE][1] == new
        assert other.states[STATE][1] == new


async def test_a_page_of_a_list_costs_each_worker_a_page(tmp_path):
    name = "st_{:032d}".format
    few = Holder({name(n): (float(n), b"") for n in range(0, 600, 3)})
    many = Holder({name(n): (float(n), b"") for n in range(600) if n % 3})
    copies = Holder({name(n): (1000.0 + n, b"") for n in range(0, 600, 2)})
    copies.states[name(700)] = (900.0, b"")
    async with fronted(tmp_path, few, many, copies) as fleet:
        holders = (few, many, copies)
        seen, token, turns = [], "", 0
        while turns == 0 or token:
            for holder in holders:
                holder.listed.clear()
            answer = await fleet.states.list_states(page_size=20, page_token=token)
            seen += [state.id for state in answer.states]
            token, turns = answer.next_page_token, turns + 1
            if answer.states and answer.states[0].id < name(700):
                assert all(sum(holder.listed) <= 40 for holder in holders)
            assert len(answer.states) <= 20
        assert seen == [*(name(n) for n in range(600)), name(700)]
        assert turns <= 60
