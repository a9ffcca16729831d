"""Calls from a front to a worker: what ends them, and what their caller is told."""

import asyncio
import contextlib

import grpc
import pytest

from regreen.rpc.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    Unavailable,
)
from regreen.sandbox import v1 as pb
from sandbox_svc.fleet.calls import METHODS, Endpoint, Worker
from sandbox_svc.fleet.registry import Registry

_RUN, _EXEC = METHODS["SandboxService/Run"], METHODS["SandboxService/Exec"]
_IMPORT = METHODS["StateService/ImportState"]


@contextlib.asynccontextmanager
async def serving(**handlers):
    """A gRPC server with these methods, and how often each was begun."""
    begun = dict.fromkeys(handlers, 0)
    server = grpc.aio.server()

    def counted(method, handler):
        async def one(request, context):
            begun[method.name] += 1
            return await handler(request, context)

        async def many(request, context):
            begun[method.name] += 1
            async for response in handler(request, context):
                yield response

        kind = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }[method.streams_in, method.streams_out]
        return kind(
            many if method.streams_out else one,
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )

    for method in METHODS.values():
        if method.name in handlers:
            found = {method.name: counted(method, handlers[method.name])}
            generic = grpc.method_handlers_generic_handler(method.service, found)
            server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", begun
    finally:
        await server.stop(0)


async def _forever(request, context):
    await asyncio.Event().wait()


async def _drips(request, context):
    yield pb.ExecResponse(stdout=b"first")
    await asyncio.Event().wait()


async def _takes(requests, context):
    async for _ in requests:
        pass
    return pb.ImportStateResponse(state=pb.State(id="st_1"))


async def until(begun, name):
    async with asyncio.timeout(10):
        while not begun[name]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_the_requests_raise_is_raised_and_not_a_cancellation():
    async def damaged():
        yield pb.ImportStateRequest(chunk=b"x")
        raise DataLoss("blob is damaged")

    async def whole():
        yield pb.ImportStateRequest(chunk=b"x")

    async with serving(ImportState=_takes) as (address, _):
        worker = Worker(Endpoint("w", "1", "0", address))
        with pytest.raises(DataLoss, match="blob is damaged"):
            await worker.send(_IMPORT, damaged(), 20.0)
        assert (await worker.send(_IMPORT, whole(), 20.0)).state.id == "st_1"
        await worker.close()


async def test_a_worker_that_is_left_ends_its_calls_as_unavailable():
    async with serving(Run=_forever, Exec=_drips) as (address, begun):
        worker = Worker(Endpoint("w", "1", "0", address))

        async def read():
            return [e async for e in worker.stream(_EXEC, pb.ExecRequest(), 60.0)]

        calls = [
            asyncio.create_task(worker.call(_RUN, pb.RunRequest(), 60.0)),
            asyncio.create_task(read()),
        ]
        await until(begun, "Run")
        await until(begun, "Exec")
        async with asyncio.timeout(10):
            await worker.close()
            ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in ended] == [Unavailable, Unavailable]
        assert {error.metadata["worker"] for error in ended} == {"w"}
        with pytest.raises(Unavailable, match="worker w"):
            await worker.call(_RUN, pb.RunRequest())


async def test_a_call_in_progress_may_end_while_its_worker_is_left():
    more = asyncio.Event()

    async def answers(request, context):
        await more.wait()
        return pb.RunResponse()

    async with serving(Run=answers) as (address, begun):
        worker = Worker(Endpoint("w", "1", "0", address))
        call = asyncio.create_task(worker.call(_RUN, pb.RunRequest(), 60.0))
        await until(begun, "Run")
        closing = asyncio.create_task(worker.close(grace_s=60.0))
        await asyncio.sleep(0.1)
        assert not closing.done()
        with pytest.raises(Unavailable):
            await worker.call(_RUN, pb.RunRequest())
        more.set()
        assert await call == pb.RunResponse()
        async with asyncio.timeout(10):
            await closing


async def test_a_cancelled_caller_is_cancelled():
    async with serving(Run=_forever) as (address, begun):
        worker = Worker(Endpoint("w", "1", "0", address))
        call = asyncio.create_task(worker.call(_RUN, pb.RunRequest(), 60.0))
        await until(begun, "Run")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await worker.call(_RUN, pb.RunRequest(), 60.0)
        await worker.close()


async def test_a_worker_that_does_not_answer_a_question_is_unavailable():
    async with serving(Run=_forever) as (address, _):
        worker = Worker(Endpoint("w", "1", "0", address))
        with pytest.raises(Unavailable, match="does not answer within"):
            await worker.ask(_RUN, pb.RunRequest(), 0.2)
        with pytest.raises(DeadlineExceeded):
            await worker.call(_RUN, pb.RunRequest(), 0.2)
        await worker.close()


async def test_an_unknown_method_is_no_mystery():
    async with serving(Run=_forever) as (address, _):
        worker = Worker(Endpoint("w", "1", "0", address))
        with pytest.raises(FailedPrecondition, match="run front and workers from one image"):
            await worker.send(_IMPORT, _nothing(), 20.0)
        await worker.close()


async def _nothing():
    return
    yield


async def test_what_a_worker_has_that_gets_ready_while_others_are_asked_is_found():
    asked, answer = asyncio.Event(), asyncio.Event()

    async def missing(request, context):
        asked.set()
        await answer.wait()
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no such sandbox: {request.id}")

    async def no_states(request, context):
        return pb.ListStatesResponse()

    async def nothing(request, context):
        return pb.ListSandboxesResponse()

    async def one_box(request, context):
        return pb.ListSandboxesResponse(sandboxes=[pb.Sandbox(id="sbx_1")])

    async with (
        serving(ListStates=no_states, ListSandboxes=nothing, GetSandbox=missing) as (first, _),
        serving(ListStates=no_states, ListSandboxes=one_box, GetSandbox=missing) as (second, _),
    ):
        registry = Registry()
        registry.update([Endpoint("a", "1", "0", first), Endpoint("b", "1", "0", second, False)])
        assert await registry.wait_ready(10.0)
        found = asyncio.create_task(registry.worker_of("sbx_1"))
        await asked.wait()
        registry.update([Endpoint("a", "1", "0", first), Endpoint("b", "1", "0", second)])
        async with asyncio.timeout(10):
            while "b" not in registry.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        answer.set()
        assert (await found).name == "b"
        with pytest.raises(NotFound):
            await registry.worker_of("sbx_2")
        await registry.close()


async def test_what_a_lost_worker_answers_late_is_lost_too():
    registry = Registry()
    here = Endpoint("w", "1", "0", "127.0.0.1:1", ready=False)
    registry.update([here])
    worker = Worker(here)
    registry.learn_state(worker, pb.State(id="st_1"))
    registry.learn_sandbox(worker, pb.Sandbox(id="sbx_1"))
    assert registry.holders("st_1") == {"w"}
    registry.update([Endpoint("w", "1", "1", "127.0.0.1:1", ready=False)])
    assert registry.holders("st_1") == {"w"}
    assert registry.lost_with("sbx_1") == "w"
    registry.learn_sandbox(worker, pb.Sandbox(id="sbx_2"))
    assert registry.lost_with("sbx_2") == "w"
    registry.update([])
    registry.learn_state(worker, pb.State(id="st_2"))
    for state_id in ("st_1", "st_2"):
        assert registry.holders(state_id) == set()
        assert registry.lost_with(state_id) == "w"
    await worker.close()
    await registry.close()
