"""Progress of long drivers: what stage, how much is done, how long it will still take.

- Reporting never changes what a driver does; a driver works the same without a listener.
- The clock is an argument; a rate is taken over the units done since the stage began, so that
  work found already done after a restart does not make the estimate look too good.
- Units under way count as half done; without them the first of many at a time looks like all work.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of a driver."""

    stage: str
    """"experts", "sft", "rollouts", "learn", "checkpoint", "evaluate", "recover"."""
    done: int
    total: int
    eta_s: float | None
    """Estimated remaining seconds of the stage; None until something was measured."""
    detail: str = ""


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """A listener that does nothing."""


class Meter:
    """Reports units of one stage to a listener."""

    def __init__(
        self,
        listener: Listener,
        stage: str,
        total: int,
        *,
        done: int = 0,
        parallel: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listener, self._stage, self._clock = listener, stage, clock
        self._parallel = parallel
        self._first, self._began_s = done, clock()
        self.done, self.total = done, total

    def report(self, done: int | None = None, detail: str = "") -> None:
        """Tell the listener; `done` stays as it is when not given."""
        self.done = self.done if done is None else done
        self._listener(Progress(self._stage, self.done, self.total, self._eta_s(), detail))

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Count `units` more and report."""
        self.report(self.done + units, detail)

    def _eta_s(self) -> float | None:
        fresh, left = self.done - self._first, max(0, self.total - self.done)
        if fresh <= 0:
            return None
        # At the moment that one ends, the places of all others are taken.
        under_way = min(self._parallel - 1, left) / 2
        return (left - under_way) * (self._clock() - self._began_s) / (fresh + under_way)
