"""Progress of long drivers: what stage, how much is done, how long it will still take.

- Reporting never changes what a driver does; a driver works the same without a listener.
- The clock is an argument; a rate is taken over the units done since the stage began, so that
  work found already done after a restart does not make the estimate look too good.
- Units under way count as half done; without them the first of many at a time looks like all work.
- Between two units the estimate counts down, and grows again once the next one is late.
- A stage that ends is reported with all done; one that fails is not.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    due: bool = False
    """To be shown however little time has passed, such as what a step has learned."""


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """A listener that does nothing."""


@contextmanager
def stage(listener: Listener, name: str, detail: str = "") -> Iterator[None]:
    """Report the begin and the end of a stage that tells nothing in between."""
    listener(Progress(name, 0, 1, None, detail))
    yield
    listener(Progress(name, 1, 1, None, detail))


class Pace:
    """How long the rest will take, from the units done since the beginning."""

    def __init__(self, done: float, now_s: float) -> None:
        self._first, self._done = done, done
        self._began_s, self._latest_s = now_s, now_s

    def left_s(self, done: float, total: float, now_s: float, *, parallel: int = 1) -> float | None:
        """Estimated seconds; None until something was measured."""
        if done != self._done:
            self._done, self._latest_s = done, now_s
        fresh, left = done - self._first, max(0.0, total - done)
        if fresh <= 0 or now_s <= self._began_s:
            return None
        # At the moment that one ends, the places of all others are taken.
        under_way = min(parallel - 1, left) / 2
        begun, ahead = fresh + under_way, left - under_way
        # What came since is what the rate says, but at most the unit that comes next.
        coming = min(1.0, ahead / 2)
        if self._latest_s > self._began_s:
            rate = begun / (self._latest_s - self._began_s)
            coming = min(coming, rate * (now_s - self._latest_s))
        return (ahead - coming) * (now_s - self._began_s) / (begun + coming)


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
        self._pace = Pace(done, clock())
        self.done, self.total, self.parallel = done, total, parallel

    def report(self, done: int | None = None, detail: str = "", *, due: bool = False) -> None:
        """Tell the listener; `done` stays as it is when not given."""
        self.done = self.done if done is None else done
        left_s = self._pace.left_s(self.done, self.total, self._clock(), parallel=self.parallel)
        self._listener(Progress(self._stage, self.done, self.total, left_s, detail, due))

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Count `units` more and report."""
        self.report(self.done + units, detail)
