"""A Docker engine, as its runtime speaks to it: in threads, with bounded patience.

- The SDK blocks; every call runs in named threads, none on the event loop, and each ends within
  its time: an engine that hangs is an error of the platform, never a call that hangs.
- Whatever the SDK raises is an `InfraError`; that the engine did not answer is told apart.
- Work that was begun goes on when its caller goes away, and what comes of it is taken back.
- A container is removed or remembered: what could not be removed is tried again, until it is gone.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from regreen.rpc.errors import InfraError, MissingDependency
from regreen.rpc.logging import get

_P = ParamSpec("_P")
_T = TypeVar("_T")
_THREADS = 64
_RETRY_S = 2.0
_SETTLED_S = 120.0
"""After so long, a creation without an answer has come to nothing."""
_CLOSE_S = 30.0


class EngineSilent(InfraError):
    """The engine did not answer in time, or not at all."""


class ContainerGone(InfraError):
    """There is no such container or command of one, or it does not run."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise what the SDK raises as an error of the platform."""
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except APIError as error:
        told = str(error.explanation or error)[:500]
        if error.status_code in (404, 409):
            raise ContainerGone(f"the engine has nothing such that runs: {told}") from error
        raise InfraError(f"the engine refuses: {told}") from error
    except (DockerException, RequestException, HTTPError, OSError) as error:
        raise EngineSilent(f"the engine does not answer: {error}") from error


class Engine:
    """The clients, the threads and the unfinished work of one runtime."""

    def __init__(self, *, answer_s: float = 60.0, commit_s: float = 900.0) -> None:
        self._answer_s, self._commit_s = answer_s, commit_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="sandbox-docker")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._doomed: dict[str, float] = {}
        """Containers to remove, by id or name, and until when one that is absent may still come."""
        self._remover: asyncio.Task[None] | None = None
        self._closing = self._closed = False
        self.api: Any = None
        self.patient: Any = None
        """For calls that take as long as there is data."""

    async def connect(self) -> dict[str, Any]:
        """Reach the engine; what it says of itself.

        Raises:
            MissingDependency: there is none; the message names the remedy.
        """
        try:
            from docker.client import DockerClient
        except ImportError as error:
            raise MissingDependency(
                "the docker package is missing; install regreen[sandbox]"
            ) from error
        make: Any = DockerClient.from_env
        try:
            self.api = (await self.blocking(make, timeout=self._answer_s)).api
            self.patient = (await self.blocking(make, timeout=self._commit_s)).api
            info: dict[str, Any] = await self.blocking(self.api.info)
        except InfraError as error:
            raise MissingDependency(
                f"no Docker engine answers ({error}); start one or set DOCKER_HOST, "
                "or use --backend embedded"
            ) from error
        return info

    async def blocking(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a blocking call in the threads.

        Raises:
            InfraError: the engine refuses or does not answer.
        """

        def work() -> _T:
            with translated():
                return call(*args, **kwargs)

        if self._closed:
            raise EngineSilent("the runtime is closed")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def task(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Work that goes on whoever waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it has raised it

    async def owned(
        self, work: Coroutine[Any, Any, _T], drop: Callable[[_T], Awaitable[object]]
    ) -> _T:
        """What comes of `work`; if the caller goes away meanwhile, `drop` gets it."""
        task = self.task(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self.task(_dropped(task, drop))
            raise

    async def create(self, prefix: str, **options: Any) -> str:
        """A started container; one that cannot be started, or whose caller goes, does not stay."""
        name = f"{prefix}-{secrets.token_hex(6)}"
        return await self.owned(self._create(name, options), self.discard)

    async def _create(self, name: str, options: dict[str, Any]) -> str:
        if self._closing:
            raise InfraError("the runtime is closing")
        try:
            made = await self.blocking(self.api.create_container, name=name, **options)
            await self.blocking(self.api.start, made["Id"])
        except BaseException as error:
            silent = isinstance(error, EngineSilent)
            await self.discard(name, settle_s=_SETTLED_S if silent else 0.0)
            raise
        return str(made["Id"])

    async def remove(self, container: str) -> bool:
        """Kill and remove a container; whether there was one.

        Raises:
            InfraError: it could not be removed.
        """
        try:
            await self.blocking(self.api.remove_container, container, force=True, v=True)
        except EngineSilent:
            raise
        except InfraError:
            if await self.exists(container):
                raise
            return False
        return True

    async def exists(self, container: str) -> bool:
        """Whether there is such a container, running or not."""
        from docker.errors import NotFound

        def look() -> bool:
            try:
                self.api.inspect_container(container)
            except NotFound:
                return False
            return True

        return await self.blocking(look)

    async def state(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container's life; empty if there is none."""
        from docker.errors import NotFound

        def look() -> dict[str, Any]:
            try:
                return dict(self.api.inspect_container(container)["State"])
            except NotFound:
                return {}

        return await self.blocking(look)

    async def pids(self, container: str) -> dict[str, int]:
        """How many processes a container has and may have: `current` and `limit`, where told."""
        stats = await self.blocking(self.api.stats, container, stream=False, one_shot=True)
        return {key: int(value) for key, value in (stats.get("pids_stats") or {}).items()}

    async def discard(self, container: str, *, settle_s: float = 0.0) -> None:
        """Remove a container now, or as soon as the engine lets it.

        `settle_s`: for so long one that is absent may still come into being.
        """
        until_s = time.monotonic() + settle_s
        self._doomed[container] = until_s
        await self._remove_doomed(container, until_s)
        if self._doomed and self._remover is None and not self._closing:
            self._remover = self.task(self._remove_on())

    async def _remove_doomed(self, container: str, until_s: float) -> None:
        try:
            found = await self.remove(container)
        except InfraError as error:
            get().warning("container not removed", container=container, error=str(error))
            return
        if found or time.monotonic() >= until_s:
            self._doomed.pop(container, None)

    async def _remove_on(self) -> None:
        try:
            while self._doomed and not self._closing:
                await asyncio.sleep(_RETRY_S)
                for container, until_s in list(self._doomed.items()):
                    await self._remove_doomed(container, until_s)
        finally:
            self._remover = None

    @property
    def doomed(self) -> frozenset[str]:
        """Containers that are still to be removed."""
        return frozenset(self._doomed)

    async def close(self) -> None:
        """Let what was begun come to its end, and drop the clients; bounded in time."""
        self._closing = True
        if self._remover is not None:
            self._remover.cancel()
        until_s = time.monotonic() + _CLOSE_S
        while self._tasks and time.monotonic() < until_s:
            await asyncio.wait(list(self._tasks), timeout=max(0.0, until_s - time.monotonic()))
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                for container in list(self._doomed):
                    await self._remove_doomed(container, 0.0)
                for client in (self.api, self.patient):
                    if client is not None:
                        await self.blocking(client.close)
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _dropped(task: "asyncio.Task[_T]", drop: Callable[[_T], Awaitable[object]]) -> None:
    with contextlib.suppress(InfraError):
        await drop(await task)
