"""The OpenAI-compatible HTTP endpoint, which records the exact tokens behind every answer.

- A session (header `x-regreen-session`, `metadata.session_id`, or `user`) keeps what the policy
  was shown and what it sampled; its next request continues those ids and re-encodes nothing.
- Without a session the answer is the same and nothing is recorded.
- Requests of one session run one after another; a branch holds only ids that were really shown.
- A client that goes away ends its request in the engine.
- What changes something is written to the service's audit, before it begins and when it has ended.
"""

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from policy_svc.engines.base import Completion, FinishReason, Generation, Request
from policy_svc.openai_body import MAX_BODY_BYTES, Asked, parse
from policy_svc.policy import Policy
from policy_svc.sessions import Prompt, Session, Sessions
from regreen.ids import new_id
from regreen.rpc.audit import Audit
from regreen.rpc.errors import DeadlineExceeded, InvalidArgument, RegreenError, Unauthenticated
from regreen.rpc.tenants import CHARGED
from regreen.rpc.tokens import Guard, caller

_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}

_CHAT, _SESSIONS = "/v1/chat/completions", "/v1/sessions/{session_id:path}"
_BODY_S = 60.0
_METHOD = "regreen.policy.v1.PolicyService/Generate"
"""What a token must cover here."""


@dataclass(slots=True)
class _SessionLock:
    """A session's lock and how many requests hold it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    holders: int = 0


class OpenAiHttp:
    """The application's handlers."""

    def __init__(
        self,
        policy: Policy,
        sessions: Sessions,
        key: str,
        guard: Guard | None = None,
        audit: Audit | None = None,
    ) -> None:
        self._policy, self._sessions, self._key = policy, sessions, key
        self._guard, self._audit = guard, audit
        self._locks: dict[str, _SessionLock] = {}

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route(_CHAT, self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route(_SESSIONS, self.session, methods=["GET", "DELETE"]),
                Route("/healthz", self.health),
            ],
            exception_handlers={RegreenError: _on_error},
        )

    async def health(self, http: HttpRequest) -> Response:
        """Say that the endpoint answers."""
        return Response("ok\n", media_type="text/plain")

    async def models(self, http: HttpRequest) -> Response:
        """List the one model."""
        self._authenticate(http)
        model = {"id": self._model(), "object": "model", "created": 0, "owned_by": "regreen"}
        return JSONResponse({"object": "list", "data": [model]})

    async def session(self, http: HttpRequest) -> Response:
        """Give or delete a session's record."""
        self._authenticate(http)
        session_id = _own_session(http.path_params["session_id"])
        if http.method == "DELETE":
            with self._audited(http, _SESSIONS, session_id=session_id):
                self._sessions.delete(session_id)
            return Response(status_code=204)
        record = self._sessions.find(session_id).to_json()
        return JSONResponse({**record, "session_id": http.path_params["session_id"]})

    async def chat(self, http: HttpRequest) -> Response:
        """Answer a chat completion."""
        self._authenticate(http)
        session_id = http.headers.get("x-regreen-session", "")
        asked = parse(await _body(http), session_id, self._policy.limits.max_samples)
        asked = replace(asked, session_id=_own_session(asked.session_id))
        identity: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self._model(),
        }
        audited = self._audited(http, _CHAT, request_id=identity["id"], session_id=asked.session_id)
        if asked.stream:
            stream = _within(audited, self._stream(asked, identity))
            first = await anext(stream)
            return StreamingResponse(_prepend(first, stream), media_type="text/event-stream")
        with audited:
            return JSONResponse(await _unless_gone(http, self._whole(asked, identity)))

    @contextlib.contextmanager
    def _audited(self, http: HttpRequest, route: str, **ids: str) -> Iterator[None]:
        """Two lines in the audit around a mutation.

        Raises:
            ResourceExhausted: the first cannot be written; nothing was done.
        """
        if self._audit is None:
            yield
            return
        who = caller()
        facts = {
            "method": f"{http.method} {route}",
            "tenant": who.tenant if who else "",
            "token": who.token_id if who else "",
            **({"charged": who.charged} if who and who.charged else {}),
            "peer": http.client.host if http.client else "",
            **{name: value for name, value in ids.items() if value},
        }
        self._audit.begin(**facts)
        code = "INTERNAL"
        try:
            yield
            code = "OK"
        except RegreenError as error:
            code = error.status
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        finally:
            self._audit.end(**facts, code=code)

    async def _whole(self, asked: Asked, identity: dict[str, Any]) -> dict[str, Any]:
        async with self._session(asked.session_id) as session:
            prompt = await self._prompt(asked, session)
            answer = await self._policy.generate(_request(asked, prompt))
            await self._record(session, prompt, answer.generation)
        choices = [
            self._choice(index, completion, asked.logprobs)
            for index, completion in enumerate(answer.generation.completions)
        ]
        return {
            **identity,
            "object": "chat.completion",
            "choices": choices,
            "usage": _usage(prompt, answer.generation),
        }

    async def _stream(self, asked: Asked, identity: dict[str, Any]) -> AsyncIterator[str]:
        """Yield server-sent events; the first one is an empty delta, sent once sampling is sure."""
        head = {**identity, "object": "chat.completion.chunk"}
        async with self._session(asked.session_id) as session:
            prompt = await self._prompt(asked, session)
            arrived: asyncio.Queue[tuple[int, list[int]] | None] = asyncio.Queue()
            call = asyncio.create_task(
                self._policy.generate(
                    _request(asked, prompt),
                    on_tokens=lambda index, ids, _: arrived.put_nowait((index, list(ids))),
                )
            )
            call.add_done_callback(lambda _: arrived.put_nowait(None))
            try:
                texts = [_TextStream(self._policy) for _ in range(asked.n)]
                item = await arrived.get()
                if item is None:
                    call.result()
                for index in range(asked.n):
                    yield _event(head, index, {"role": "assistant", "content": ""})
                while item is not None:
                    if delta := texts[item[0]].push(item[1]):
                        yield _event(head, item[0], {"content": delta})
                    item = await arrived.get()
                generation = call.result().generation
                await self._record(session, prompt, generation)
            finally:
                call.cancel()
        for index, completion in enumerate(generation.completions):
            rest = texts[index].rest(completion.text)
            yield _event(head, index, {"content": rest} if rest else {}, _reason(completion))
        if asked.usage_in_stream:
            usage = {**head, "choices": [], "usage": _usage(prompt, generation)}
            yield f"data: {json.dumps(usage)}\n\n"
        yield "data: [DONE]\n\n"

    async def _prompt(self, asked: Asked, session: Session | None) -> Prompt:
        """Encode beside the event loop: long texts take seconds."""
        held = session or Session("")
        return await asyncio.to_thread(held.prompt, asked.messages, self._policy.chat)

    async def _record(self, session: Session | None, prompt: Prompt, made: Generation) -> None:
        if session is not None:
            session.add(prompt, made.completions)
            await asyncio.to_thread(self._sessions.write, session)

    @contextlib.asynccontextmanager
    async def _session(self, session_id: str) -> AsyncIterator[Session | None]:
        """Hold a session; its requests run one after another."""
        if not session_id:
            yield None
            return
        held = self._locks.setdefault(session_id, _SessionLock())
        held.holders += 1
        try:
            async with held.lock:
                yield self._sessions.get(session_id)
        finally:
            held.holders -= 1
            if not held.holders:
                self._locks.pop(session_id, None)

    def _choice(self, index: int, completion: Completion, logprobs: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": completion.text},
            "finish_reason": _reason(completion),
        }
        if logprobs:
            tokenizer = self._policy.chat.tokenizer
            choice["logprobs"] = {
                "content": [
                    _token(tokenizer.decode([token], control=True), logprob)
                    for token, logprob in zip(
                        completion.token_ids, completion.logprobs, strict=True
                    )
                ]
            }
        return choice

    def _model(self) -> str:
        info = self._policy.engine.info
        return f"{info.model}@{self._policy.versions.serving.policy.version}"

    def _authenticate(self, http: HttpRequest) -> None:
        header = http.headers.get("authorization", "")
        if self._guard is not None:
            self._guard.admit(_METHOD, header, http.headers.get(CHARGED, ""))
            return
        given = header.removeprefix("Bearer ")
        if self._key and not secrets.compare_digest(given.encode(), self._key.encode()):
            raise Unauthenticated("the Authorization header has no valid key")


def _own_session(session_id: str) -> str:
    """A session's id among all tenants': nobody reads or goes on with another's."""
    who = caller()
    if who is None or not session_id:
        return session_id
    return hashlib.sha256(f"{who.tenant}\n{session_id}".encode(errors="replace")).hexdigest()


class _TextStream:
    """Decodes growing ids; holds back bytes that are not a whole character yet."""

    def __init__(self, policy: Policy) -> None:
        self._decode = policy.chat.tokenizer.decode
        self._ids: list[int] = []
        self._sent = ""

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        text = self._decode(self._ids).rstrip("\ufffd")
        if not text.startswith(self._sent):
            return ""
        delta, self._sent = text[len(self._sent) :], text
        return delta

    def rest(self, whole: str) -> str:
        return whole[len(self._sent) :]


def _request(asked: Asked, prompt: Prompt) -> Request:
    return Request(new_id("gen"), prompt.token_ids, asked.n, asked.sampling)


def _usage(prompt: Prompt, generation: Generation) -> dict[str, Any]:
    sampled = sum(len(completion.token_ids) for completion in generation.completions)
    return {
        "prompt_tokens": len(prompt.token_ids),
        "completion_tokens": sampled,
        "total_tokens": len(prompt.token_ids) + sampled,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _reason(completion: Completion) -> str:
    return "length" if completion.finish_reason is FinishReason.LENGTH else "stop"


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def _event(
    head: dict[str, Any], index: int, delta: dict[str, str], reason: str | None = None
) -> str:
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"


async def _within(
    around: contextlib.AbstractContextManager[None], stream: AsyncIterator[str]
) -> AsyncIterator[str]:
    with around:
        async for event in stream:
            yield event


async def _prepend(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event


async def _body(http: HttpRequest) -> dict[str, Any]:
    raw = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in http.stream():
                raw += chunk
                if len(raw) > MAX_BODY_BYTES:
                    raise InvalidArgument(
                        "body", f"is over {MAX_BODY_BYTES >> 20} MiB", "send less"
                    )
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not arrive within {_BODY_S:.0f} s") from None
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("body", f"is no JSON: {error}", "send a JSON object") from error
    if not isinstance(body, dict):
        raise InvalidArgument("body", "is no JSON object", "send a JSON object")
    return body


async def _unless_gone(http: HttpRequest, work: Any) -> Any:
    """Await work, and cancel it when the client disconnects."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        watch.cancel()
        task.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _on_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RegreenError)
    body: dict[str, Any] = {"message": error.message, "type": error.reason.lower(), "code": None}
    if isinstance(error, InvalidArgument):
        body["param"] = error.field
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    status = _STATUS.get(error.status, 500)
    return JSONResponse({"error": body}, status_code=status, headers=headers)
