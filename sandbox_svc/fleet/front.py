"""The sandbox contracts, served by passing every call to the worker that it concerns.

- A call goes by what its request names: a sandbox to its worker, a state to a worker that has it
  or is given it, a spec to the worker that its digest prefers; lists are those of all workers.
- Requests and answers pass unchanged, request ids included, so a worker sees a repeat as one.
- Workers are told whose a call is, and guard what they have; the front's own knowledge is guarded
  by its registry, router and bounds (`fleet.bounds`).
- What an answer tells of new states and sandboxes is learned on the way.
- A worker that drops a call, or has no room, costs the call only where no other can do it: a
  preparation begins anew elsewhere, a call on a sandbox is the client's to repeat.
- A state that is deleted while it is prepared is gone, and its preparation fails.
- Deleting what is gone succeeds, here as on a worker; what is on a worker that cannot be asked now
  is not gone.
"""

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc

from regreen.ids import check_id
from regreen.rpc.errors import (
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.rpc.idempotency import Leaving
from regreen.rpc.logging import TRACE_HEADER, TRAJECTORY_HEADER
from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import for_all, own
from regreen.sandbox import v1 as pb
from sandbox_svc.fleet.bounds import Bounds
from sandbox_svc.fleet.calls import METHODS, PACKAGE, SERVICES, Metadata, Method, Worker
from sandbox_svc.fleet.listing import merged_page, place
from sandbox_svc.fleet.router import Router
from sandbox_svc.manners import LEAVING
from sandbox_svc.servicer import page
from sandbox_svc.specs import spec_from_proto
from sandbox_svc.state_records import state_id

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Any]
_CALL_S, _STREAM_S = 3600.0, 24 * 3600.0
"""Deadlines of calls that come without one."""
_CREATE_S = 20.0
"""A worker that makes no sandbox within so long hangs; the next is asked, and what the first may
still make ends with its time."""
_END = object()
_PASSED_ON = (TRACE_HEADER, TRAJECTORY_HEADER)
_LISTS = {
    "StateService/ListStates": "states",
    "SandboxService/ListSandboxes": "sandboxes",
    "ActionService/ListQuarantined": "actions",
}


class Front:
    """Handlers of every method, over one router."""

    def __init__(self, router: Router, quotas: Quotas | None = None) -> None:
        self._router, self._registry = router, router.registry
        self._bounds = Bounds(router.registry, quotas or Quotas())
        self._special: dict[str, Handler] = {
            "StateService/PrepareState": self._prepare,
            "StateService/GetState": self._get_state,
            "StateService/DeleteState": self._delete_state,
            "SandboxService/DeleteSandbox": self._delete_sandbox,
            "SandboxService/GetCapabilities": self._capabilities,
            "SandboxService/ListQuotas": self._list_quotas,
            "EgressService/ListEgress": self._list_egress,
        }

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve every method of the contracts."""
        for service in SERVICES:
            short = service.removeprefix(PACKAGE + ".")
            handlers = {
                method.name: _rpc(method, self._handler(name, method))
                for name, method in METHODS.items()
                if name.startswith(short + "/")
            }
            generic = grpc.method_handlers_generic_handler(service, handlers)
            server.add_generic_rpc_handlers((generic,))

    def _handler(self, name: str, method: Method) -> Handler:
        if name in self._special:
            return self._special[name]
        if method.streams_in:
            return self._passed_in(name, method)
        field, prefix = _subject(name, method)
        if prefix == "sbx" and name not in _LISTS:
            return self._to_sandbox(name, method, field)
        if prefix == "st" and name not in _LISTS:
            return self._to_state(name, method, field)
        return self._merged(name, method)

    def _to_sandbox(self, name: str, method: Method, field: str) -> Handler:
        """Calls on one sandbox."""
        wants_state = next((f for f in ("state_id", "base_state_id") if method.has(f)), "")

        async def on_worker(request: Any, call: Callable[[Worker], Awaitable[Any]]) -> Any:
            sandbox_id = check_id(getattr(request, field), "sbx", field)
            wanted = getattr(request, wants_state) if wants_state else ""
            if wanted:
                check_id(wanted, "st", wants_state)
            worker = await self._registry.worker_of(sandbox_id)
            try:
                if wanted:
                    return await self._router.with_state(worker, wanted, call)
                return await call(worker)
            except NotFound as error:
                self._gone(error, sandbox_id)
                raise

        async def unary(request: Any, context: Context) -> Any:
            async def call(worker: Worker) -> Any:
                response = await worker.call(method, request, *_terms(context, method, request))
                self._learn(worker, response)
                return response

            async with self._bounds.kept(name, request):
                return await on_worker(request, call)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            begun = await on_worker(request, _opener(method, request, context))
            async with contextlib.aclosing(_rest(*begun)) as responses:
                async for response in responses:
                    yield response

        return stream if method.streams_out else unary

    def _gone(self, error: NotFound, sandbox_id: str) -> None:
        if error.metadata.get("id") == sandbox_id:
            self._registry.forget_sandbox(sandbox_id)

    def _to_state(self, name: str, method: Method, field: str) -> Handler:
        """Calls on one state."""
        takes_place = method.name == "CreateSandbox"

        async def unary(request: Any, context: Context) -> Any:
            wanted = check_id(getattr(request, field), "st", field)

            async def call(worker: Worker) -> Any:
                timeout_s, headers = _terms(context, method, request)
                if takes_place and timeout_s > _CREATE_S:
                    response = await worker.ask(method, request, _CREATE_S, headers)
                else:
                    response = await worker.call(method, request, timeout_s, headers)
                self._learn(worker, response)
                return response

            async with self._bounds.kept(name, request):
                return await self._router.on_state(wanted, call, takes_place=takes_place)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            wanted = check_id(getattr(request, field), "st", field)
            begun = await self._router.on_state(wanted, _opener(method, request, context))
            async with contextlib.aclosing(_rest(*begun)) as responses:
                async for response in responses:
                    yield response

        return stream if method.streams_out else unary

    def _passed_in(self, name: str, method: Method) -> Handler:
        """Uploads: to any worker, since only the upload says what it holds."""

        async def handle(requests: AsyncIterator[Any], context: Context) -> Any:
            worker = self._registry.ranked(secrets.token_hex(8))[0]
            async with self._bounds.kept(name):
                response = await worker.send(method, requests, *_terms(context, method))
            self._learn(worker, response)
            return response

        return handle

    def _merged(self, name: str, method: Method) -> Handler:
        """Lists: of all workers."""
        entries = _LISTS[name]

        async def handle(request: Any, context: Context) -> Any:
            page([], place, request.page_size, request.page_token)  # refuses bad ones at once
            filters = {
                set_field.name: value
                for set_field, value in request.ListFields()
                if set_field.name not in ("page_size", "page_token")
            }
            size, token = request.page_size, request.page_token
            found = await merged_page(self._registry, name, entries, filters, size, token)
            return method.response(**{entries: found[0], "next_page_token": found[1]})

        return handle

    async def _prepare(
        self, request: pb.PrepareStateRequest, context: Context
    ) -> AsyncIterator[pb.PrepareStateResponse]:
        """Build or find the state of a spec, where its digest prefers it."""
        wanted = state_id("", spec_from_proto(request.spec).digest)
        if request.rebuild or not self._registry.holders(wanted):
            async with self._bounds.kept("StateService/PrepareState"):
                pass
        with for_all():
            held = self._registry.holders(wanted)
        order = sorted(self._registry.ranked(wanted), key=lambda worker: worker.name not in held)
        first: RegreenError | None = None
        for worker in order:
            try:
                async with contextlib.aclosing(self._prepare_on(worker, request, context)) as told:
                    async for event in told:
                        yield event
                return
            except (ResourceExhausted, Unavailable) as error:
                first = first or error
        raise first or self._router.missing(wanted)

    async def _prepare_on(
        self, worker: Worker, request: pb.PrepareStateRequest, context: Context
    ) -> AsyncGenerator[pb.PrepareStateResponse, None]:
        method = METHODS["StateService/PrepareState"]
        wanted = state_id("", spec_from_proto(request.spec).digest)
        if own() or not request.rebuild:  # others may have it there, and are to have it on
            await self._router.offer(worker, wanted)
        events = worker.stream(method, request, *_terms(context, method))
        made: pb.PrepareStateResponse | None = None
        async with self._router.preparing(worker, wanted) as turn, contextlib.aclosing(events):
            async for event in events:
                if not event.HasField("state"):
                    yield event
                    continue
                turn.check()
                if request.rebuild:
                    await self._router.replaced(worker, event.state)
                    turn.check()
                self._router.made(worker, event.state, replace=request.rebuild)
                made = event
                break
        if made is not None:
            yield made

    async def _get_state(
        self, request: pb.GetStateRequest, context: Context
    ) -> pb.GetStateResponse:
        """Read a state, wherever it is."""
        wanted = check_id(request.id, "st", "id")
        method = METHODS["StateService/GetState"]
        silent: Unavailable | None = None
        try:
            while holders := await self._registry.find_state(wanted):
                worker = self._registry.ready[min(holders)]
                try:
                    response: pb.GetStateResponse = await worker.ask(method, request)
                    return response
                except NotFound:
                    self._registry.forget_state(wanted, worker.name)
        except Unavailable as error:
            silent = error  # it may still be in the blob store
        archived = await self._router.archived(wanted)
        if archived is None:
            raise silent or self._router.missing(wanted)
        state = pb.State.FromString(archived.state)
        if own():
            if state.tenants[:1] != [own()]:
                state.ClearField("labels")
            state.ClearField("tenants")
        return pb.GetStateResponse(state=state)

    async def _delete_state(
        self, request: pb.DeleteStateRequest, context: Context
    ) -> pb.DeleteStateResponse:
        """Forget a state everywhere.

        Raises:
            Unavailable: a worker that holds it cannot be told; it would bring the state back.
        """
        wanted = check_id(request.id, "st", "id")
        method = METHODS["StateService/DeleteState"]
        if own() and not await self._router.has(wanted):
            return pb.DeleteStateResponse()
        async with self._router.deleting(wanted):
            workers = self._registry.ranked(wanted)
            if self._registry.holders(wanted) - {worker.name for worker in workers}:
                raise self._router.missing(wanted)
            if unknown := self._registry.not_known_yet():
                raise unknown
            shared = await self._router.withdraw(workers[0], wanted)
            for worker in workers:
                await worker.call(method, request, *_terms(context, method, request))
                await self._router.look_again(worker, wanted)
            if shared:
                await self._router.keep_for_others(wanted)
            else:
                await self._router.forget(wanted)
        return pb.DeleteStateResponse()

    async def _delete_sandbox(
        self, request: pb.DeleteSandboxRequest, context: Context
    ) -> pb.DeleteSandboxResponse:
        """Remove a sandbox; one that is gone is fine."""
        wanted = check_id(request.id, "sbx", "id")
        try:
            worker = await self._registry.worker_of(wanted)
        except NotFound:
            return pb.DeleteSandboxResponse()
        method = METHODS["SandboxService/DeleteSandbox"]
        await worker.call(method, request, *_terms(context, method, request))
        self._registry.forget_sandbox(wanted)
        return pb.DeleteSandboxResponse()

    async def _list_egress(
        self, request: pb.ListEgressRequest, context: Context
    ) -> pb.ListEgressResponse:
        """What a sandbox or a preparation asked of the network.

        A sandbox's worker knows for a while after its end, and so does that of a preparation that
        failed; what led to a state goes with the state.
        """
        if bool(request.sandbox_id) == bool(request.state_id):
            raise InvalidArgument("sandbox_id", "and state_id: one must be given", "give one")
        method = METHODS["EgressService/ListEgress"]
        try:
            if request.state_id:
                to_state = self._to_state("EgressService/ListEgress", method, "state_id")
                found: pb.ListEgressResponse = await to_state(request, context)
                return found
            wanted = check_id(request.sandbox_id, "sbx", "sandbox_id")
            worker = await self._registry.worker_of(wanted)
        except NotFound:
            fields = {field.name: value for field, value in request.ListFields()}
            for _, response in await self._registry.ask_all("EgressService/ListEgress", **fields):
                kept: pb.ListEgressResponse = response
                return kept
            raise
        response = await worker.call(method, request, *_terms(context, method, request))
        listed: pb.ListEgressResponse = response
        return listed

    async def _capabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        """What every worker was proven to enforce; one that went away enforces nothing."""
        answers = await self._registry.ask_all("SandboxService/GetCapabilities", timeout_s=60.0)
        if not answers:
            raise self._registry.none_ready()
        return merged_capabilities([answer for _, answer in answers])

    async def _list_quotas(
        self, request: pb.ListQuotasRequest, context: Context
    ) -> pb.ListQuotasResponse:
        """What tenants have in the whole fleet, and their bounds."""
        return pb.ListQuotasResponse(quotas=await self._bounds.uses())

    def _learn(self, worker: Worker, response: Any) -> None:
        """Take note of the states and sandboxes in an answer."""
        fields = response.DESCRIPTOR.fields_by_name
        if "state" in fields and response.HasField("state") and response.state.id:
            self._router.made(worker, response.state)
        if "sandbox" in fields and response.HasField("sandbox"):
            self._registry.learn_sandbox(worker, response.sandbox)
        for sandbox in response.sandboxes if "sandboxes" in fields else ():
            self._registry.learn_sandbox(worker, sandbox)


def merged_capabilities(
    answers: Sequence[pb.GetCapabilitiesResponse],
) -> pb.GetCapabilitiesResponse:
    """Only what all workers have proven, and interpreters that all of them have."""
    found: dict[str, pb.Capability] = {}
    for number, answer in enumerate(answers):
        named = {capability.name: capability for capability in answer.capabilities}
        for name in {*found, *named}:
            capability = named.get(name) or pb.Capability(name=name, detail="not everywhere")
            known = found.setdefault(name, pb.Capability() if number else capability)
            if not (known.proven and capability.proven):
                worse = known if known.name and not known.proven else capability
                found[name] = pb.Capability(
                    name=name, proven=False, driver=worse.driver, detail=worse.detail
                )
    interpreters = dict(answers[0].interpreters)
    for answer in answers[1:]:
        interpreters = {v: path for v, path in interpreters.items() if v in answer.interpreters}
    return pb.GetCapabilitiesResponse(
        runtime=answers[0].runtime,
        capabilities=[found[name] for name in sorted(found)],
        interpreters=interpreters,
    )


def _subject(name: str, method: Method) -> tuple[str, str]:
    """The field that names what a call is about, and the prefix of its ids."""
    if method.has("sandbox_id"):
        return "sandbox_id", "sbx"
    if method.has("id"):
        return "id", "st" if name.startswith("StateService/") else "sbx"
    if method.has("state_id"):
        return "state_id", "st"
    if name in _LISTS:
        return "", ""
    raise RuntimeError(f"no rule says where {name} goes")


def _opener(
    method: Method, request: Any, context: Context
) -> Callable[[Worker], Awaitable[tuple[AsyncGenerator[Any, None], Any]]]:
    """Begins a stream on a worker: the stream, and its first response or `_END`.

    What is wrong with a worker shows before the first response, when another can still be asked.
    """

    async def opened(worker: Worker) -> tuple[AsyncGenerator[Any, None], Any]:
        responses = worker.stream(method, request, *_terms(context, method))
        try:
            return responses, await anext(responses, _END)
        except BaseException:
            await responses.aclose()
            raise

    return opened


async def _rest(responses: AsyncGenerator[Any, None], first: Any) -> AsyncGenerator[Any, None]:
    """A stream from its first response on."""
    async with contextlib.aclosing(responses):
        response = first
        while response is not _END:
            yield response
            response = await anext(responses, _END)


def _terms(context: Context, method: Method, request: Any = None) -> tuple[float, Metadata]:
    """Deadline and headers for the call that a call is passed on as.

    What goes on though its callers leave does so here too: who asks again is told by the worker
    that did it, and none else does it anew.
    """
    most_s = _STREAM_S if method.streams_out else _CALL_S
    headers = [
        (str(key), str(value))
        for key, value in context.invocation_metadata() or ()
        if key in _PASSED_ON
    ]
    goes_on = LEAVING.get(method.path.lstrip("/"), Leaving.GOES_ON) is Leaving.GOES_ON
    if goes_on and str(getattr(request, "request_id", "")) and not method.streams_out:
        return most_s, headers
    left_s = context.time_remaining()
    return most_s if left_s is None else min(left_s, most_s), headers


def _rpc(method: Method, handler: Handler) -> Any:
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
    }
    make = makers[method.streams_in, method.streams_out]
    return make(
        handler,
        request_deserializer=method.request.FromString,
        response_serializer=method.response.SerializeToString,
    )
