"""Archives on their way: so many at once, and none that stands still.

- Who finds no place waits a little, and is then refused with a delay, never left to wait.
- A client that is refused in the middle may send its rest, which goes nowhere: one that is cut off
  may not see why. That takes no place.
- A client that sends nothing for `idle_s` is ended; one that takes nothing of a stream is ended by
  the server (`manners`), and its place is free again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from regreen.rpc.errors import DeadlineExceeded, RegreenError, ResourceExhausted

AT_ONCE = 8
IDLE_S = 60.0
_WAIT_S = 5.0
_RETRY_S = 5.0
_DRAIN_S, _PAUSE_S = 30.0, 0.5
"""A client that is refused sends for so long at most, and pauses for so long."""


@dataclass(frozen=True, slots=True)
class Places:
    """Places of one kind of transfer."""

    what: str
    most: int = AT_ONCE
    wait_s: float = _WAIT_S
    _free: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_free", asyncio.Semaphore(self.most))

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """One of the places.

        Raises:
            ResourceExhausted: none got free in time; carries a delay.
        """
        try:
            async with asyncio.timeout(self.wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise ResourceExhausted(
                f"{self.most} {self.what} are under way",
                metadata={"limit": str(self.most)},
                retry_after_s=_RETRY_S,
            ) from None
        try:
            yield
        finally:
            self._free.release()


async def moving(chunks: AsyncIterator[bytes], idle_s: float) -> AsyncIterator[bytes]:
    """Chunks of a client as they come.

    Raises:
        DeadlineExceeded: none came for `idle_s`.
    """
    over = False
    while not over:
        try:
            async with asyncio.timeout(idle_s):
                chunk = b""
                while not chunk and not over:
                    try:
                        chunk = await anext(chunks)
                    except StopAsyncIteration:
                        over = True
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing of the archive came for {idle_s:g} s; send it again without a pause"
            ) from None
        if chunk:
            yield chunk


@contextlib.asynccontextmanager
async def heard(chunks: AsyncIterator[bytes]) -> AsyncIterator[None]:
    """Around what takes chunks and may refuse them: an error is raised once their rest has come."""
    try:
        yield
    except RegreenError:
        with contextlib.suppress(TimeoutError, DeadlineExceeded):
            async with asyncio.timeout(_DRAIN_S):
                async for _ in moving(chunks, _PAUSE_S):
                    pass
        raise
