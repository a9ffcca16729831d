"""The sandbox contracts, served by passing every call to the worker that it concerns.

- A call goes by what its request names: a sandbox to its worker, a state to a worker that has it
  or is given it, a spec to the worker that its digest prefers; lists are those of all workers.
- Requests and answers pass unchanged, request ids included, so a worker sees a repeat as one.
- What an answer tells of new states and sandboxes is learned on the way.
- Deleting what is gone succeeds, here as on a worker.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from regreen.ids import check_id
from regreen.rpc.errors import NotFound, Unavailable
from regreen.rpc.logging import TRACE_HEADER, TRAJECTORY_HEADER
from regreen.sandbox import v1 as pb
from sandbox_svc.fleet.calls import METHODS, PACKAGE, SERVICES, Metadata, Method, Worker
from sandbox_svc.fleet.registry import pages
from sandbox_svc.fleet.router import Router
from sandbox_svc.servicer import page
from sandbox_svc.specs import spec_from_proto
from sandbox_svc.states import state_id

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Any]
_CALL_S = 3600.0
_PASSED_ON = (TRACE_HEADER, TRAJECTORY_HEADER)
_LISTS = {
    "StateService/ListStates": "states",
    "SandboxService/ListSandboxes": "sandboxes",
    "ActionService/ListQuarantined": "actions",
    "EgressService/ListEgress": "records",
}


class Front:
    """Handlers of every method, over one router."""

    def __init__(self, router: Router) -> None:
        self._router, self._registry = router, router.registry
        self._special: dict[str, Handler] = {
            "StateService/PrepareState": self._prepare,
            "StateService/GetState": self._get_state,
            "StateService/DeleteState": self._delete_state,
            "SandboxService/DeleteSandbox": self._delete_sandbox,
            "SandboxService/GetCapabilities": self._capabilities,
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
            return self._passed_in(method)
        field, prefix = _subject(name, method)
        if prefix == "sbx" and name not in _LISTS:
            return self._to_sandbox(method, field)
        if prefix == "st" and name not in _LISTS:
            return self._to_state(method, field)
        return self._merged(name, method, field)

    def _to_sandbox(self, method: Method, field: str) -> Handler:
        """Calls on one sandbox."""
        wants_state = next((f for f in ("state_id", "base_state_id") if method.has(f)), "")

        async def worker_for(request: Any) -> Worker:
            sandbox_id = check_id(getattr(request, field), "sbx", field)
            worker = await self._registry.worker_of(sandbox_id)
            if wants_state and (wanted := getattr(request, wants_state)):
                check_id(wanted, "st", wants_state)
                await self._router.ensure(worker, wanted)
            return worker

        async def unary(request: Any, context: Context) -> Any:
            worker = await worker_for(request)
            try:
                response = await worker.call(method, request, *_terms(context))
            except NotFound as error:
                self._gone(error, getattr(request, field))
                raise
            self._learn(worker, response)
            return response

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            worker = await worker_for(request)
            try:
                async for response in worker.stream(method, request, *_terms(context)):
                    yield response
            except NotFound as error:
                self._gone(error, getattr(request, field))
                raise

        return stream if method.streams_out else unary

    def _gone(self, error: NotFound, sandbox_id: str) -> None:
        if error.metadata.get("id") == sandbox_id:
            self._registry.forget_sandbox(sandbox_id)

    def _to_state(self, method: Method, field: str) -> Handler:
        """Calls on one state."""

        async def unary(request: Any, context: Context) -> Any:
            wanted = check_id(getattr(request, field), "st", field)

            async def call(worker: Worker) -> Any:
                response = await worker.call(method, request, *_terms(context))
                self._learn(worker, response)
                return response

            return await self._router.on_state(wanted, call)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            wanted = check_id(getattr(request, field), "st", field)
            worker = (await self._router.candidates(wanted))[0]
            await self._router.ensure(worker, wanted)
            async for response in worker.stream(method, request, *_terms(context)):
                yield response

        return stream if method.streams_out else unary

    def _passed_in(self, method: Method) -> Handler:
        """Uploads: to any worker, since only the upload says what it holds."""

        async def handle(requests: AsyncIterator[Any], context: Context) -> Any:
            worker = self._registry.ranked(secrets.token_hex(8))[0]
            response = await worker.send(method, requests, *_terms(context))
            self._learn(worker, response)
            return response

        return handle

    def _merged(self, name: str, method: Method, field: str) -> Handler:
        """Lists: of all workers, or of that of the sandbox which the request names."""
        entries = _LISTS[name]

        async def handle(request: Any, context: Context) -> Any:
            if method.has("sandbox_id") and request.sandbox_id:
                return await self._to_sandbox(method, "sandbox_id")(request, context)
            page([], _place, request.page_size, request.page_token)  # refuses bad ones at once
            filters = {
                set_field.name: value
                for set_field, value in request.ListFields()
                if set_field.name not in ("page_size", "page_token")
            }
            found = await asyncio.gather(
                *(_all(worker, name, entries, filters) for worker in self._registry.ranked(""))
            )
            merged: dict[str, Any] = {}
            for entry in sorted((e for listed in found for e in listed), key=_place):
                merged.setdefault(_name(entry), entry)
            ordered = list(merged.values())
            chosen, token = page(ordered, _place, request.page_size, request.page_token)
            return method.response(**{entries: list(chosen), "next_page_token": token})

        return handle

    async def _prepare(
        self, request: pb.PrepareStateRequest, context: Context
    ) -> AsyncIterator[pb.PrepareStateResponse]:
        """Build or find the state of a spec, where its digest prefers it."""
        wanted = state_id("", spec_from_proto(request.spec).digest)
        method = METHODS["StateService/PrepareState"]
        held = self._registry.holders(wanted)
        order = sorted(self._registry.ranked(wanted), key=lambda worker: worker.name not in held)
        for number, worker in enumerate(order):
            began = False
            try:
                if not request.rebuild and await self._router.archive.find(wanted):
                    await self._router.ensure(worker, wanted)
                async for event in worker.stream(method, request, *_terms(context)):
                    began = True
                    if event.HasField("state"):
                        self._router.made(worker, event.state, replace=request.rebuild)
                    yield event
                return
            except Unavailable:
                if began or number == len(order) - 1:
                    raise

    async def _get_state(
        self, request: pb.GetStateRequest, context: Context
    ) -> pb.GetStateResponse:
        """Read a state, wherever it is."""
        wanted = check_id(request.id, "st", "id")
        holders = await self._registry.find_state(wanted)
        if holders:
            worker = self._registry.ready[min(holders)]
            method = METHODS["StateService/GetState"]
            response: pb.GetStateResponse = await worker.call(method, request, *_terms(context))
            return response
        archived = await self._router.archive.find(wanted)
        if archived is None:
            raise self._router.missing(wanted)
        return pb.GetStateResponse(state=pb.State.FromString(archived.state))

    async def _delete_state(
        self, request: pb.DeleteStateRequest, context: Context
    ) -> pb.DeleteStateResponse:
        """Forget a state everywhere."""
        wanted = check_id(request.id, "st", "id")
        method = METHODS["StateService/DeleteState"]
        for worker in self._registry.ranked(wanted):
            await worker.call(method, request, *_terms(context))
            self._registry.forget_state(wanted, worker.name)
        await self._router.archive.forget(wanted)
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
        await worker.call(method, request, *_terms(context))
        self._registry.forget_sandbox(wanted)
        return pb.DeleteSandboxResponse()

    async def _capabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        """What every worker was proven to enforce."""
        method = METHODS["SandboxService/GetCapabilities"]
        workers = self._registry.ranked("")
        answers = await asyncio.gather(*(w.call(method, request, 60.0) for w in workers))
        return merged_capabilities(answers)

    def _learn(self, worker: Worker, response: Any) -> None:
        """Take note of the states and sandboxes in an answer."""
        fields = response.DESCRIPTOR.fields_by_name
        if "state" in fields and response.HasField("state") and response.state.id:
            self._router.made(worker, response.state)
        if "sandbox" in fields and response.HasField("sandbox"):
            self._registry.learn_sandbox(worker, response.sandbox.id)
        for sandbox in response.sandboxes if "sandboxes" in fields else ():
            self._registry.learn_sandbox(worker, sandbox.id)


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


def _terms(context: Context) -> tuple[float, Metadata]:
    """Deadline and headers for the call that a call is passed on as."""
    headers = [
        (str(key), str(value))
        for key, value in context.invocation_metadata() or ()
        if key in _PASSED_ON
    ]
    return min(context.time_remaining() or _CALL_S, _CALL_S), headers


async def _all(worker: Worker, name: str, field: str, filters: dict[str, Any]) -> Sequence[Any]:
    try:
        return [entry async for entry in pages(worker, name, field, **filters)]
    except Unavailable:
        return []  # a worker that went away has nothing to list


def _place(entry: Any) -> tuple[float, str]:
    return float(entry.create_time.ToNanoseconds()), _name(entry)


def _name(entry: Any) -> str:
    """What tells entries of one moment apart."""
    fields = entry.DESCRIPTOR.fields_by_name
    if "id" in fields:
        return str(entry.id)
    return (
        str(entry.action_sha256) if "action_sha256" in fields else entry.SerializeToString().hex()
    )


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
