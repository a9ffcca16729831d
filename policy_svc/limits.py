"""What a request may ask for, and how many may run or wait.

- A bad request is refused before it takes a place; the error names the field and what would do.
- Requests run in order of arrival; at most `max_waiting` wait, more are refused with a delay hint.
- A place is given back whatever way a request ends.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from policy_svc import metrics
from policy_svc.engines.base import EngineInfo, Request, Sampling
from regreen.rpc.errors import InvalidArgument, ResourceExhausted

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_STRUCTURE = 16384, 20_000
"""Characters and places of an expression or a schema."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests."""

    max_running: int = 64
    max_waiting: int = 512
    max_samples: int = 64
    max_new_tokens: int = 8192


def check(request: Request, info: EngineInfo, limits: Limits) -> Request:
    """Return the request in normal form (top_p 0 becomes 1).

    Raises:
        InvalidArgument: a field is out of range; names it.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidArgument("prompt_token_ids", "is empty", "give at least one token id")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= info.vocabulary:
        at = next(i for i, token in enumerate(prompt) if not 0 <= token < info.vocabulary)
        raise InvalidArgument(
            f"prompt_token_ids[{at}]",
            f"{prompt[at]} is outside the vocabulary",
            f"use ids from 0 to {info.vocabulary - 1}",
        )
    if not 1 <= request.n <= limits.max_samples:
        raise InvalidArgument("n", f"is {request.n}", f"use 1 to {limits.max_samples}")
    sampling = _check_sampling(request.sampling, info, limits)
    total = len(prompt) + sampling.max_new_tokens
    if total > info.context_length:
        raise InvalidArgument(
            "sampling.max_new_tokens",
            f"{len(prompt)} prompt tokens and {sampling.max_new_tokens} new ones are {total}, "
            f"over the context of {info.context_length}",
            f"ask for at most {max(0, info.context_length - len(prompt))}",
        )
    return replace(request, sampling=sampling)


def _check_sampling(sampling: Sampling, info: EngineInfo, limits: Limits) -> Sampling:
    if not 1 <= sampling.max_new_tokens <= limits.max_new_tokens:
        raise InvalidArgument(
            "sampling.max_new_tokens",
            f"is {sampling.max_new_tokens}",
            f"use 1 to {limits.max_new_tokens}",
        )
    if not 0 <= sampling.temperature <= 10:
        raise InvalidArgument(
            "sampling.temperature", f"is {sampling.temperature}", "use 0 (greedy) to 10"
        )
    if not 0 <= sampling.top_p <= 1:
        raise InvalidArgument("sampling.top_p", f"is {sampling.top_p}", "use 0 (off) to 1")
    if sampling.top_k < 0:
        raise InvalidArgument("sampling.top_k", f"is {sampling.top_k}", "use 0 (off) or more")
    for at, token in enumerate(sampling.stop_token_ids):
        if not 0 <= token < info.vocabulary:
            raise InvalidArgument(
                f"sampling.stop_token_ids[{at}]",
                f"{token} is outside the vocabulary",
                f"use ids from 0 to {info.vocabulary - 1}",
            )
    if len(sampling.stop) > _MAX_STOPS:
        raise InvalidArgument("sampling.stop", f"has {len(sampling.stop)} texts", "use up to 16")
    for at, text in enumerate(sampling.stop):
        if not 1 <= len(text) <= _MAX_STOP_CHARACTERS:
            raise InvalidArgument(
                f"sampling.stop[{at}]", f"has {len(text)} characters", "use 1 to 256"
            )
    if sampling.regex and sampling.json_schema:
        raise InvalidArgument("sampling.json_schema", "is given beside regex", "give one of them")
    if structure := sampling.structure:
        if not info.structures:
            raise InvalidArgument(
                structure.field, f"the {info.name} engine cannot follow one", "leave it empty"
            )
        structure.check(*_MAX_STRUCTURE)
    return replace(sampling, top_p=sampling.top_p or 1.0)


class Admission:
    """Places for requests."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.max_running)
        self.running = 0
        self.waiting = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place for the length of the block.

        Raises:
            ResourceExhausted: too many wait already.
        """
        if self._places.locked() and self.waiting >= self._limits.max_waiting:
            metrics.REFUSED.inc()
            raise ResourceExhausted(
                f"{self.running} requests run and {self.waiting} wait; retry later",
                retry_after_s=1.0 + self.waiting / max(1, self._limits.max_running),
            )
        self.waiting += 1
        metrics.WAITING.set(self.waiting)
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
            metrics.WAITING.set(self.waiting)
        self._count(1)
        try:
            yield
        finally:
            self._places.release()
            self._count(-1)

    async def idle(self) -> None:
        """Return when nothing runs."""
        await self._idle.wait()

    def _count(self, change: int) -> None:
        self.running += change
        metrics.RUNNING.set(self.running)
        if self.running:
            self._idle.clear()
        else:
            self._idle.set()
