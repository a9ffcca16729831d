"""Any OpenAI-compatible chat endpoint: teachers, baselines, and `regreen fix` without a model.

- The endpoint takes and gives text: the prompt's ids are decoded into chat messages, and what comes
  back is encoded here. Such ids are marked `token_exact=False` and must not be trained on.
- Logprobs are the endpoint's only where its token texts join to the very text that it returned and
  encode one to one; else they are NaN-free zeros, and still not exact.
- 429, 5xx and refused connections are retried until `retry_s`, honouring `Retry-After`.
- The token limit is sent as `max_tokens`, which every endpoint knows, until one refuses that name:
  newer OpenAI models take `max_completion_tokens` alone, which counts their reasoning as well.
  Where `stop` is refused by name, the text is cut here.
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import (
    Apart,
    Check,
    Completion,
    EngineInfo,
    FinishReason,
    Generation,
    PauseMode,
    Request,
    TokenSink,
    spans,
)
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
_NEWER_LIMIT = "max_completion_tokens"
_REASONS = {"length": FinishReason.LENGTH, "content_filter": FinishReason.ABORT}


@dataclass(frozen=True, slots=True)
class OpenAiOptions:
    """The endpoint: `url` ends before `/chat/completions`, for example `https://host/v1`."""

    url: str
    model: str
    api_key: str = ""
    context_length: int = 32768
    logprobs: bool = False
    request_timeout_s: float = 300.0
    retry_s: float = 60.0


class OpenAiEngine(Apart):
    """An `Engine` over chat completions; it serves one version, 0."""

    def __init__(
        self,
        options: OpenAiOptions,
        tokenizer: Tokenizer,
        end_id: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._tokenizer, self._end_id = options, tokenizer, end_id
        self._clock = clock
        key = options.api_key
        self._client = httpx.AsyncClient(
            base_url=options.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=options.request_timeout_s,
        )
        self._limit, self._stops = "max_tokens", True
        self._running: dict[str, asyncio.Event] = {}

    @property
    def info(self) -> EngineInfo:
        """What is served."""
        return EngineInfo(
            "openai",
            self._options.model,
            "remote",
            self._tokenizer.size,
            self._options.context_length,
            self._end_id,
            token_exact=False,
            swaps_weights=False,
        )

    @property
    def version(self) -> int:
        """Always 0."""
        return 0

    async def start(self) -> None:
        """Nothing is asked before the first request: some endpoints list no models."""

    async def close(self) -> None:
        """Close connections."""
        await self.abort(None)
        await self._client.aclose()

    async def generate(self, request: Request, on_tokens: TokenSink | None = None) -> Generation:
        """Ask for each sample; samples are independent calls, since many endpoints ignore `n`."""
        if structure := request.sampling.structure:
            raise InvalidArgument(structure.field, "is not offered by chat endpoints", "empty it")
        aborted = self._running[request.request_id] = asyncio.Event()
        messages = parse_turns(self._tokenizer.decode(request.prompt_token_ids, control=True))
        try:
            samples = [
                self._sample(request, messages, index, aborted) for index in range(request.n)
            ]
            completions = await asyncio.gather(*samples)
        finally:
            self._running.pop(request.request_id, None)
        if on_tokens:
            for index, completion in enumerate(completions):
                on_tokens(index, completion.token_ids, completion.logprobs)
        return Generation(tuple(completions))

    async def load(self, version: int, path: Path, checked: Check | None = None) -> float:
        """Refuse: the endpoint's weights are not ours."""
        if checked:
            await checked
        raise FailedPrecondition("the openai engine serves a remote model and loads no weights")

    def moved(self, path: Path) -> None:
        """Nothing is read again."""

    async def pause(self, mode: PauseMode) -> int:
        """End running requests on abort; nothing can be frozen."""
        running = len(self._running)
        if mode is PauseMode.ABORT:
            await self.abort(None)
        return running

    async def resume(self) -> None:
        """Nothing to do."""

    async def abort(self, request_id: str | None) -> int:
        """End requests; their answer is empty, since nothing is streamed."""
        chosen = [e for i, e in self._running.items() if request_id in (None, i)]
        for event in chosen:
            event.set()
        return len(chosen)

    async def _sample(
        self,
        request: Request,
        messages: list[dict[str, str]],
        index: int,
        aborted: asyncio.Event,
    ) -> Completion:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._options.model,
            "messages": messages,
            self._limit: sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": (sampling.seed + index) & 0x7FFFFFFF,
        }
        if 0 < sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.stop and self._stops:
            body["stop"] = list(sampling.stop)
        if self._options.logprobs:
            body["logprobs"] = True
        call = asyncio.create_task(self._post(body))
        end = asyncio.create_task(aborted.wait())
        try:
            await asyncio.wait((call, end), return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                return Completion((), (), (), FinishReason.ABORT, "", token_exact=False)
            return self._completion(call.result(), () if "stop" in body else sampling.stop)
        finally:
            call.cancel()
            end.cancel()

    def _completion(self, choice: dict[str, Any], stops: Sequence[str]) -> Completion:
        text = str(choice["message"].get("content") or "")
        reason = _REASONS.get(str(choice.get("finish_reason")), FinishReason.STOP)
        if ends := [text.index(stop) for stop in stops if stop in text]:
            text, reason = text[: min(ends)], FinishReason.STOP
        ids = self._tokenizer.encode(text)
        logprobs = self._logprobs(choice, text, ids)
        if reason is FinishReason.STOP:
            ids, logprobs = [*ids, self._end_id], [*logprobs, 0.0]
        versions = spans([0] * len(ids))
        return Completion(tuple(ids), tuple(logprobs), versions, reason, text, token_exact=False)

    def _logprobs(self, choice: dict[str, Any], text: str, ids: list[int]) -> list[float]:
        content = (choice.get("logprobs") or {}).get("content") or []
        pieces = [str(item["token"]) for item in content]
        same = len(pieces) == len(ids) and "".join(pieces) == text
        return [float(item["logprob"]) for item in content] if same else [0.0] * len(ids)

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        deadline_s = self._clock() + self._options.retry_s
        wait_s = 0.2
        while True:
            retry_after_s = wait_s
            try:
                answer = await self._client.post("chat/completions", json=body)
            except httpx.ConnectError as error:
                problem = f"cannot connect: {error}"
            except httpx.HTTPError as error:
                raise Unavailable(f"{type(error).__name__}: {error}", retry_after_s=1.0) from error
            else:
                if answer.is_success:
                    return _choice(answer)
                if self._adapted(body, answer):
                    continue
                problem = f"the endpoint answered {answer.status_code}: {answer.text[:500]}"
                _refuse(answer.status_code, problem)
                retry_after_s = _retry_after_s(answer, wait_s)
            if self._clock() + retry_after_s > deadline_s:
                raise Unavailable(problem, retry_after_s=5.0)
            await asyncio.sleep(retry_after_s)
            wait_s = min(2 * wait_s, 10.0)

    def _adapted(self, body: dict[str, Any], answer: httpx.Response) -> bool:
        """Whether `body` was changed to what the endpoint says that it takes; kept for later ones.

        A value that is refused, such as too large a limit, is another matter.
        """
        text = answer.text
        if answer.status_code != 400:
            return False
        unsupported = "unsupported" in text.lower()
        if "max_tokens" in body and (
            _NEWER_LIMIT in text or (unsupported and "max_tokens" in text)
        ):
            self._limit = _NEWER_LIMIT
            body[_NEWER_LIMIT] = body.pop("max_tokens")
            return True
        if "stop" in body and unsupported and re.search(r"\bstop\b", text):
            self._stops = False
            del body["stop"]
            return True
        return False


def parse_turns(prompt: str) -> list[dict[str, str]]:
    """Turn ChatML text back into messages; the opening of the assistant's turn is left out."""
    turns = [{"role": m.group(1), "content": m.group(2)} for m in _TURN.finditer(prompt)]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns or [{"role": "user", "content": prompt}]


def _choice(answer: httpx.Response) -> dict[str, Any]:
    try:
        choice = answer.json()["choices"][0]
        choice["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise Unavailable(f"the endpoint's answer has no choice: {answer.text[:200]}") from error
    return dict(choice)


def _refuse(status: int, problem: str) -> None:
    if status in (401, 403):
        raise Unauthenticated(problem)
    if status == 402:
        raise ResourceExhausted(problem)
    if 400 <= status < 500 and status not in (408, 409, 429):
        raise InvalidArgument("request", problem, "send what the endpoint takes")


def _retry_after_s(answer: httpx.Response, default_s: float) -> float:
    try:
        return float(answer.headers["retry-after"])
    except (KeyError, ValueError):
        return default_s
