"""What a driver does when a service goes away: wait, with backoff, for a bounded time.

- Only errors that another try can cure are waited out; everything else is raised at once.
- The deadline counts from the first failure since the furthest point that was ever reached: a
  service that never comes back ends the run with its error, one that comes back late does not, and
  one that dies again and again at the same step does.
- There is one way back in: the caller resumes from the last checkpoint, as after a restart.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from regreen.rpc.errors import (
    Aborted,
    DeadlineExceeded,
    DiskFull,
    InfraError,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.train.progress import Listener, Progress

_CURABLE = (Unavailable, DeadlineExceeded, Aborted, InfraError, ResourceExhausted)
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 5.0


def curable(error: RegreenError) -> bool:
    """Whether waiting can cure `error`; a full disk needs a person."""
    return isinstance(error, _CURABLE) and not isinstance(error, DiskFull)


class Recovery:
    """Bounds how long a driver waits without getting anywhere."""

    def __init__(
        self,
        deadline_s: float,
        listener: Listener,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._deadline_s, self._listener = deadline_s, listener
        self._clock, self._sleep = clock, sleep
        self._since_s: float | None = None
        self._wait_s = _FIRST_WAIT_S
        self._furthest = -1

    def progressed(self, mark: int) -> None:
        """Unit number `mark` was finished: if it is further than ever, the deadline starts anew."""
        if mark <= self._furthest:
            return
        if self._since_s is not None:
            waited_s = max(1, int(self._clock() - self._since_s))
            self._listener(Progress("recover", waited_s, waited_s, None, "goes on"))
        self._furthest, self._since_s, self._wait_s = mark, None, _FIRST_WAIT_S

    async def wait_out(self, error: RegreenError) -> None:
        """Wait before the next try.

        Raises:
            RegreenError: `error` itself, when waiting cannot cure it or has lasted too long.
        """
        now_s = self._clock()
        self._since_s = now_s if self._since_s is None else self._since_s
        waited_s = now_s - self._since_s
        if not curable(error) or waited_s >= self._deadline_s:
            raise error
        left_s = self._deadline_s - waited_s
        # How long it takes is not known, so there is no total; only when it ends for good is.
        detail = f"waiting, gives up in {left_s:.0f} s: {error}"
        self._listener(Progress("recover", int(waited_s), 0, None, detail))
        await self._sleep(min(max(self._wait_s, error.retry_after_s or 0.0), left_s))
        self._wait_s = min(self._wait_s * 2, _LONGEST_WAIT_S)
