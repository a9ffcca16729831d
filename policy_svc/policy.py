"""The policy: an engine behind limits, a pause gate and versions; what both front ends call.

- A request is checked, waits for the gate and for a place, then runs; each wait obeys a deadline.
- While paused nothing new starts; a pause that drains returns when nothing runs.
- Greedy samples of one prompt are equal: they are computed once and repeated.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from policy_svc import metrics
from policy_svc.chat import ChatMl
from policy_svc.engines.base import Engine, Generation, PauseMode, Request, TokenSink
from policy_svc.limits import Admission, Limits, check
from policy_svc.usage import Hold, Usage
from policy_svc.versions import Versions
from regreen.rpc import tenants
from regreen.rpc.errors import Aborted, FailedPrecondition, NotFound, Unavailable

_ANSWER_MARGIN_S = 0.25


@dataclass(frozen=True, slots=True)
class Answer:
    """A generation and the seconds that it took in the engine."""

    generation: Generation
    duration_s: float


class Policy:
    """Everything that the service does, without its wire formats."""

    def __init__(
        self, engine: Engine, chat: ChatMl, versions: Versions, limits: Limits, usage: Usage
    ) -> None:
        self.engine, self.chat, self.versions, self.usage = engine, chat, versions, usage
        self.limits, self._admission = limits, Admission(limits)
        self._running: dict[str, str] = {}
        """Whose each request in the engine is."""
        self._paused: PauseMode | None = None
        self._open = asyncio.Event()
        self._open.set()

    @property
    def paused(self) -> bool:
        """Whether new requests wait."""
        return self._paused is not None

    async def generate(
        self,
        request: Request,
        *,
        min_version: int = 0,
        patience_s: float | None = None,
        on_tokens: TokenSink | None = None,
    ) -> Answer:
        """Sample; waits for the gate and a place at most `patience_s`.

        Raises:
            InvalidArgument, ResourceExhausted: see `limits` and `usage`.
            Unavailable: paused for longer than the caller's patience, or the engine is down.
            Aborted: the policy is below `min_version`.
        """
        request = check(request, self.engine.info, self.limits)
        if self.engine.version < min_version:
            raise Aborted(
                f"version {self.engine.version} serves, below min_version {min_version}",
                retry_after_s=1.0,
            )
        most = request.n * request.sampling.max_new_tokens
        async with self._place(patience_s):
            with self.usage.held(most) as hold:
                start_s = time.monotonic()
                shown = _Shown(hold, on_tokens) if on_tokens else None
                self._running[request.request_id] = tenants.own()
                try:
                    generation = await self._run(request, shown)
                finally:
                    self._running.pop(request.request_id, None)
                duration_s = time.monotonic() - start_s
                sampled = sum(len(completion.token_ids) for completion in generation.completions)
                hold.count(sampled - (shown.tokens if shown else 0))
        self._measure(request, generation, duration_s)
        lowest = min((s.version for c in generation.completions for s in c.versions), default=None)
        if lowest is not None and lowest < min_version:
            raise Aborted(f"tokens were sampled under version {lowest}, below {min_version}")
        return Answer(generation, duration_s)

    async def pause(self, mode: PauseMode) -> int:
        """Stop taking work; the number of requests that were running.

        Raises:
            FailedPrecondition: already paused in another mode.
        """
        if self._paused not in (None, mode):
            raise FailedPrecondition(f"already paused in mode {self._paused}; resume first")
        running = self._admission.running
        self._paused = mode
        self._open.clear()
        metrics.PAUSED.set(1)
        await self.engine.pause(mode)
        if mode is not PauseMode.IN_PLACE:
            await self._admission.idle()
        return running

    async def resume(self) -> None:
        """Take work again; does nothing when not paused."""
        if self._paused is None:
            return
        await self.engine.resume()
        self._paused = None
        self._open.set()
        metrics.PAUSED.set(0)

    async def abort(self, request_id: str | None) -> int:
        """End one request, or all for None, of those that the caller sees.

        Raises:
            NotFound: no such request is running.
        """
        if request_id is None and tenants.sees_all():
            return await self.engine.abort(None)
        seen = [name for name, owner in self._running.items() if tenants.sees(owner)]
        wanted = [name for name in seen if request_id in (None, name)]
        ended = sum([await self.engine.abort(name) for name in wanted])
        if request_id is not None and not ended:
            raise NotFound("no request of that id is running")
        return ended

    @asynccontextmanager
    async def _place(self, patience_s: float | None) -> AsyncIterator[None]:
        limit_s = None if patience_s is None else max(0.0, patience_s - _ANSWER_MARGIN_S)
        while True:
            try:
                async with asyncio.timeout(limit_s):
                    await self._open.wait()
            except TimeoutError as error:
                raise Unavailable("the policy is paused; retry later", retry_after_s=1.0) from error
            async with self._admission.place():
                if self._open.is_set():
                    yield
                    return

    async def _run(self, request: Request, on_tokens: TokenSink | None) -> Generation:
        if request.sampling.temperature > 0 or request.n == 1:
            return await self.engine.generate(request, on_tokens)
        one = await self.engine.generate(replace(request, n=1), on_tokens)
        return replace(one, completions=one.completions * request.n)

    def _measure(self, request: Request, generation: Generation, duration_s: float) -> None:
        metrics.GENERATE_SECONDS.observe(duration_s)
        metrics.TOKENS.labels("prompt").inc(len(request.prompt_token_ids))
        metrics.TOKENS.labels("cached").inc(generation.cached_tokens)
        for completion in generation.completions:
            metrics.TOKENS.labels("sampled").inc(len(completion.token_ids))
            metrics.COMPLETIONS.labels(completion.finish_reason.value).inc()


@dataclass(slots=True)
class _Shown:
    """Counts tokens as they are shown: who goes away before the end has had them."""

    hold: Hold
    sink: TokenSink
    tokens: int = 0

    def __call__(self, index: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        self.tokens += len(ids)
        self.hold.count(len(ids))
        self.sink(index, ids, logprobs)
