"""One SGLang server over plain HTTP: exchanges, their retries, and whether it is healthy.

- 429, 503 and refused connections are tried again until `retry_s`; nothing else is.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from policy_svc.engines.sglang_wire import object_of, sleeps
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from regreen.rpc.logging import get

_TELL_S = 30.0


class Unanswered(Unavailable):
    """Nobody knows what became of an exchange: it was begun, and no answer came."""


@dataclass(frozen=True, slots=True)
class Exchanges:
    """How long exchanges may take and be tried again."""

    control_timeout_s: float
    retry_s: float
    clock: Callable[[], float] = time.monotonic


@dataclass(slots=True)
class Replica:
    """A server, and the samples that run on it."""

    client: httpx.AsyncClient
    exchanges: Exchanges
    running: set[str] = field(default_factory=set)
    ranks: int = 0
    """Of its own that join a group."""
    native_spans: bool = False
    """Whether it tells the version of each token, and knows `keep_pause`."""

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self.client.base_url)

    async def json(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        retry_s: float | None = None,
    ) -> dict[str, Any]:
        """One exchange; the object that was answered, empty where it is none.

        Raises:
            InvalidArgument: the server refused the body (4xx).
            Unavailable: it cannot be reached, or answered 5xx; `Unanswered` if it did not answer.
        """
        clock, limit_s = self.exchanges.clock, timeout_s or self.exchanges.control_timeout_s
        deadline_s = clock() + (self.exchanges.retry_s if retry_s is None else retry_s)
        wait_s = 0.05
        while True:
            kind = Unavailable
            try:
                answer = await self.client.request(method, route, json=body, timeout=limit_s)
            except httpx.ConnectError as error:
                problem, again = f"cannot connect: {error}", True
            except httpx.HTTPError as error:
                problem, again, kind = f"{type(error).__name__}: {error}", False, Unanswered
            else:
                if answer.is_success:
                    return object_of(answer)
                problem = f"{route} answered {answer.status_code}: {answer.text[:500]}"
                if 400 <= answer.status_code < 500 and answer.status_code != 429:
                    raise InvalidArgument("request", problem, "send what the engine takes")
                again = answer.status_code in (429, 503)
            if not again or clock() + wait_s > deadline_s:
                raise kind(f"{self.url}: {problem}", retry_after_s=1.0)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 2.0)

    async def push(self, path: str, label: str, *, paused: bool = False) -> None:
        """Have it load weights, as a version of that name; `paused` servers stay so.

        Raises:
            FailedPrecondition: they were not loaded.
            Unavailable: see `json`.
        """
        body = {
            "model_path": path,
            "weight_version": label,
            "abort_all_requests": False,
            "flush_cache": True,
        }
        if self.native_spans:
            body["keep_pause"] = paused
        try:
            answer = await self.json("POST", "/update_weights_from_disk", body)
        except InvalidArgument as error:
            raise FailedPrecondition(f"weights were not loaded: {error.message}") from error
        if not answer.get("success"):
            raise FailedPrecondition(f"weights were not loaded: {answer.get('message')}")

    async def put_adapter(self, name: str, path: str) -> None:
        """Have it load an adapter; one of that name that it has is kept.

        Raises:
            FailedPrecondition: it was not loaded.
            Unavailable: see `json`.
        """
        body = {"lora_name": name, "lora_path": path}
        try:
            await self.json("POST", "/load_lora_adapter", body)
        except InvalidArgument as error:
            if "already" not in error.message:
                raise FailedPrecondition(f"the adapter was not loaded: {error.message}") from error

    async def healthy(self, deadline_s: float, start_s: float) -> None:
        """Wait until it is healthy, and say now and then why it is not.

        One that sleeps is not asked: by default it would sample for it, on memory that is gone.

        Raises:
            Unavailable: it is not by `deadline_s`, which is `start_s` after the start.
        """
        clock = self.exchanges.clock
        tell_s = clock()
        while True:
            try:
                answer = await self.client.get("/model_info", timeout=5.0)
                if sleeps(object_of(answer).get("weight_version")):
                    return
                answer = await self.client.get("/health", timeout=5.0)
                if answer.status_code == 200:
                    return
                problem = f"health says {answer.status_code}"
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            now_s = clock()
            if now_s >= deadline_s:
                raise Unavailable(
                    f"sglang_urls: {self.url} is not healthy after {start_s:g} s "
                    f"({problem}); look at its log, or give it longer by sglang_wait_s",
                    retry_after_s=5.0,
                )
            if now_s >= tell_s:
                tell_s = now_s + _TELL_S
                left_s = round(deadline_s - now_s)
                get().info("waiting for SGLang", url=self.url, problem=problem, left_s=left_s)
            await asyncio.sleep(0.2)


async def push_all(replicas: Sequence[Replica], path: str, label: str) -> None:
    """Have every server load weights, also where others fail.

    Raises:
        FailedPrecondition, Unavailable: the first that one failed with.
    """
    await all_of([replica.push(path, label) for replica in replicas])


async def problems(calls: Sequence[Awaitable[None]]) -> list[BaseException | None]:
    """What each call raised, after all have ended."""
    return list(await asyncio.gather(*calls, return_exceptions=True))


async def all_of(calls: Sequence[Awaitable[None]]) -> None:
    """Make calls beside each other; the first problem, after all have ended."""
    for problem in await problems(calls):
        if problem:
            raise problem
