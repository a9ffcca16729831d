"""The policy: an engine behind limits, a pause gate and versions; what both front ends call.

- A request is checked, waits for the gate and for a place, then runs; each wait obeys a deadline.
- While paused nothing new starts; a pause that drains returns when nothing runs.
- While asleep what comes is refused at once, with a delay, and does not wait: a sleep is as long as
  a learner's step, and calls that wait would take the places that a call to wake it needs.
- Greedy samples of one prompt are equal: they are computed once and repeated.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

from policy_svc import metrics
from policy_svc.chat import ChatMl
from policy_svc.engines.base import Engine, Generation, PauseMode, Request, TokenSink
from policy_svc.limits import Admission, Limits, check
from policy_svc.usage import Hold, Usage
from policy_svc.versions import PolicyVersion, Versions
from regreen.rpc import tenants
from regreen.rpc.errors import Aborted, FailedPrecondition, NotFound, Unavailable
from regreen.rpc.logging import get

_ANSWER_MARGIN_S = 0.25
_ASLEEP_RETRY_S = 5.0


class Rest(StrEnum):
    """Whether the engine has its memory."""

    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


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
        self._sleeping = asyncio.Lock()
        """One goes to sleep or wakes at a time."""
        self.rest, self._slept_s = Rest.AWAKE, time.monotonic()
        self._set_rest(Rest.ASLEEP if engine.asleep else Rest.AWAKE)

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
            Unavailable: asleep, paused for longer than the caller waits, or the engine is down.
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
            FailedPrecondition: already paused in another mode, or not awake.
        """
        if self.rest is not Rest.AWAKE:
            raise FailedPrecondition("the policy sleeps, and nothing runs; wake it first")
        if self._paused not in (None, mode):
            raise FailedPrecondition(f"already paused in mode {self._paused}; resume first")
        running = self._admission.running
        self._paused = mode
        self._gate()
        metrics.PAUSED.set(1)
        await self.engine.pause(mode)
        if mode is not PauseMode.IN_PLACE:
            await self._admission.idle()
        return running

    async def resume(self) -> None:
        """Take work again; does nothing when not paused."""
        if self._paused is None:
            return
        if self.rest is Rest.AWAKE:  # servers that sleep go on when they wake
            await self.engine.resume()
        self._paused = None
        self._gate()
        metrics.PAUSED.set(0)

    async def sleep(self, patience_s: float | None = None) -> None:
        """Give the engine's memory back, once what runs has ended; of all that have any.

        Goes on when the caller leaves.

        Raises:
            FailedPrecondition: there is none to give back, or requests are frozen in it.
            Unavailable: requests run longer than the caller's patience, or a server is down.
        """
        await asyncio.shield(self._sleep(patience_s))

    async def wake(
        self, policy: PolicyVersion | None = None, *, allow_older: bool = False
    ) -> tuple[PolicyVersion, float]:
        """Take the memory back, with a version's weights or those that served; when awake, `load`.

        What serves now, and the seconds without sampling. Goes on when the caller leaves.

        Raises:
            RegreenError: see `Versions.wake`; it sleeps on.
        """
        return await asyncio.shield(self._wake(policy, allow_older))

    async def _sleep(self, patience_s: float | None) -> None:
        async with self._sleeping:
            if self.rest is Rest.ASLEEP:  # the servers themselves may not be, all of them
                await self.versions.sleep()
                return
            if not self.engine.info.sleeps:
                raise FailedPrecondition(
                    f"the {self.engine.info.name} engine has no accelerator's memory to give back; "
                    "SGLang servers have, started with --enable-memory-saver"
                )
            if self._paused is PauseMode.IN_PLACE:
                raise FailedPrecondition("paused in mode in_place, requests are frozen; resume")
            self._set_rest(Rest.FALLING_ASLEEP)
            try:
                await self._drained(patience_s)
                await self.versions.sleep()
            finally:
                self._set_rest(Rest.ASLEEP if self.engine.asleep else Rest.AWAKE)
            get().info("asleep")

    async def _drained(self, patience_s: float | None) -> None:
        limit_s = None if patience_s is None else max(0.0, patience_s - _ANSWER_MARGIN_S)
        try:
            async with asyncio.timeout(limit_s):
                await self._admission.idle()
        except TimeoutError as error:
            raise Unavailable(
                f"{self._admission.running} requests still run; sleep later, or abort them",
                retry_after_s=_ASLEEP_RETRY_S,
            ) from error

    async def _wake(
        self, policy: PolicyVersion | None, allow_older: bool
    ) -> tuple[PolicyVersion, float]:
        async with self._sleeping:
            if self.rest is Rest.AWAKE:
                if policy is None:
                    return self.versions.serving.policy, 0.0
                return await self.versions.load(policy, allow_older=allow_older)
            self._set_rest(Rest.WAKING)
            try:
                serving = await self.versions.wake(policy, allow_older=allow_older)
            finally:
                self._set_rest(Rest.ASLEEP if self.engine.asleep else Rest.AWAKE)
            slept_s = time.monotonic() - self._slept_s
            get().info("awake", version=serving.version, slept_s=round(slept_s, 1))
            return serving, slept_s

    def _check_awake(self) -> None:
        if self.rest is not Rest.AWAKE:
            raise Unavailable(
                f"the policy is {self.rest.replace('_', ' ')}: its memory is lent to a learner; "
                "retry later",
                retry_after_s=_ASLEEP_RETRY_S,
            )

    def _set_rest(self, rest: Rest) -> None:
        if rest is Rest.FALLING_ASLEEP:
            self._slept_s = time.monotonic()
        self.rest = rest
        metrics.ASLEEP.set(rest is not Rest.AWAKE)
        self._gate()

    def _gate(self) -> None:
        """Have requests wait, or go on: to be refused, while asleep."""
        if self._paused is None or self.rest is not Rest.AWAKE:
            self._open.set()
        else:
            self._open.clear()

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
            self._check_awake()
            async with self._admission.place():
                self._check_awake()
                if self._paused is None:
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
