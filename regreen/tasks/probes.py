"""What the gate varies around a run, and what a test's outcome is found to hang on.

- Every check is repeated under the pinned conditions, in another order and with another hash seed;
  one more run has another date, host, user and path.
- Orders come in pairs of which one is the reverse of the other, so that of two tests each runs
  first once.
- A cause is named only if the outcome is another one in each of several runs with it and the pinned
  one in all without it; whatever else differs is flaky.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta

from regreen.common.v1 import common_pb2
from regreen.sandbox.v1 import sandbox_pb2 as pb

FLAKY = "flaky"
CONFIRMATIONS = 3
"""Runs under one set of conditions before it is named as a cause."""
FLAKY_LOOKS = 5
"""Runs under the pinned conditions where they were seen to differ."""
DAY_S = 86_400
_SATURDAY = 5
_NAMES = {"order": "order", "hash_seed": "hash_seed", "clock_s": "date", "host": "host",
          "user": "user", "path": "path"}  # fmt: skip
CAUSES = tuple(_NAMES.values())
PASSED = "passed"
ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Around:
    """What is different around a run; all zero: the pinned conditions."""

    order: int = 0
    hash_seed: int = 0
    clock_s: int = 0
    host: str = ""
    user: str = ""
    path: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What it varies, as causes are named."""
        return tuple(_NAMES[f.name] for f in fields(self) if getattr(self, f.name))

    def parts(self) -> tuple["Around", ...]:
        """Each of the conditions alone."""
        given = [f.name for f in fields(self) if getattr(self, f.name)]
        return tuple(replace(PINNED, **{name: getattr(self, name)}) for name in given)

    def message(self) -> pb.Conditions | None:
        """As the sandbox service takes it; None: the pinned conditions."""
        if self == PINNED:
            return None
        found = pb.Conditions(
            order_seed=self.order,
            hash_seed=self.hash_seed,
            host_name=self.host,
            user_name=self.user,
            repository=self.path,
        )
        if self.clock_s:
            found.clock_offset.FromSeconds(self.clock_s)
        return found

    def __str__(self) -> str:
        given = zip([_NAMES[f.name] for f in fields(self)], astuple(self), strict=True)
        return " ".join(f"{name}={_shown(name, value)}" for name, value in given if value)


def _shown(name: str, value: object) -> str:
    if name != "date":
        return str(value)
    assert isinstance(value, int)
    days, rest = divmod(value, DAY_S)
    return f"{days:+d}d{rest // 3600}h"


PINNED = Around()
_ELSEWHERE = (
    Around(
        clock_s=1111 * DAY_S + 12 * 3600,
        host="build-7",
        user="builder",
        path="/work/elsewhere/src/checkout",
    ),
    Around(clock_s=29 * DAY_S + 18 * 3600, host="ci-node", user="ci", path="/work/w/1/s"),
)


def schedule(repeats: int) -> tuple[Around, ...]:
    """What is around each repeat of a check, the first of which is pinned."""
    if repeats == 2:
        return (PINNED, Around(order=2, hash_seed=1))
    found = [PINNED]
    for number in range(repeats - 1):
        turn, kind = divmod(number, 3)
        order = Around(order=2 * turn + 2)
        hashed = Around(order=2 * turn + 3, hash_seed=turn + 1)
        found.append((order, hashed, PINNED)[kind])
    return tuple(found)


def elsewhere(repeats: int, now_s: float) -> tuple[Around, ...]:
    """Another date, host, user and path, all at once; twice where much is asked for.

    `now_s` is Unix time: the date is one in another month, and on a weekend if now is none.
    """
    if repeats == 1:
        return ()
    places = tuple(_on_another_day(around, now_s) for around in _ELSEWHERE)
    if repeats == 2:  # the reverse of the one order that the repeats hold
        return (replace(places[0], order=3),)
    return places if repeats >= 5 else places[:1]


def _on_another_day(around: Around, now_s: float) -> Around:
    """Some days later, where it would be in the same month, or as far from a weekend, as now."""
    now = datetime.fromtimestamp(now_s, UTC)
    for days in range(60):
        found = replace(around, clock_s=around.clock_s + days * DAY_S)
        there = now + timedelta(seconds=found.clock_s)
        if there.month != now.month and (there.weekday() >= _SATURDAY) != (
            now.weekday() >= _SATURDAY
        ):
            return found
    return around


@dataclass(frozen=True, slots=True)
class Run:
    """One run of some bytes."""

    around: Around
    outcomes: Mapping[str, str]
    """By id, in the words of the sandbox service; an id that did not report is absent."""
    label: str = ""

    def of(self, id: str) -> str:
        return self.outcomes.get(id, ABSENT)


@dataclass(slots=True)
class Seen:
    """Runs of the same bytes."""

    runs: list[Run] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def under(self, around: Around) -> list[Run]:
        return [run for run in self.runs if run.around == around]

    def ids(self) -> set[str]:
        return {id for run in self.runs for id in run.outcomes}

    def passing(self) -> set[str]:
        """Ids that passed in every run under the pinned conditions."""
        pinned = self.under(PINNED)
        return {id for id in self.ids() if pinned and all(r.of(id) == PASSED for r in pinned)}

    def unsteady(self) -> set[str]:
        """Ids that passed in one run and not in another, whatever was around them."""
        return {id for id in self.ids() if len({r.of(id) == PASSED for r in self.runs}) > 1}

    def deviating(self, around: Around) -> set[str]:
        """Ids that did otherwise in some run under these conditions than under the pinned ones."""
        usual = self.passing()
        return {
            id
            for run in self.under(around)
            for id in self.ids()
            if (run.of(id) == PASSED) != (id in usual)
        }

    def lines(self, id: str) -> tuple[str, ...]:
        """What a test did, a line for each run."""
        return tuple(f"{run.label}: {run.of(id)}" for run in self.runs)


More = Callable[[Around], Awaitable[None]]
"""Runs the same bytes once more, under these conditions, and adds the run."""


async def causes(seen: Seen, more: More) -> dict[str, tuple[str, ...]]:
    """Why tests differ between runs of the same bytes; runs more where something does."""
    if not seen.unsteady():
        return {}
    await _until(seen, PINNED, CONFIRMATIONS, more)
    if _differing(seen.under(PINNED)):  # where one is flaky, others often are
        await _until(seen, PINNED, FLAKY_LOOKS, more)
    tried: dict[Around, None] = {}
    for around in list(dict.fromkeys(run.around for run in seen.runs)):
        suspects = seen.deviating(around) - _differing(seen.under(PINNED))
        if around == PINNED or not suspects:
            continue
        explained = set()
        for part in around.parts():
            await _until(seen, part, 1, more)
            found = seen.deviating(part) & suspects
            if found:
                await _until(seen, part, CONFIRMATIONS, more)
                tried[part] = None
            explained |= found
        if suspects - explained:
            await _until(seen, around, CONFIRMATIONS, more)
            tried[around] = None
    return {id: _cause(seen, id, tried) for id in sorted(seen.unsteady())}


def _cause(seen: Seen, id: str, tried: Iterable[Around]) -> tuple[str, ...]:
    """What the outcome of a test hangs on, or that it is flaky."""
    usual = id in seen.passing()
    if id in _differing(seen.under(PINNED)):
        return (FLAKY,)
    guilty = []
    for around in tried:
        other = [(run.of(id) == PASSED) != usual for run in seen.under(around)]
        if any(other) and not all(other):
            return (FLAKY,)
        guilty += [around] if all(other) else []
    alone = [around for around in guilty if len(around.names) == 1]
    found = {name for around in alone or guilty for name in around.names}
    for run in seen.runs:
        differs = (run.of(id) == PASSED) != usual
        if differs and not set(run.around.names) & found:
            return (FLAKY,)
    return tuple(name for name in _NAMES.values() if name in found) or (FLAKY,)


def _differing(runs: Collection[Run]) -> set[str]:
    return Seen(list(runs)).unsteady()


async def _until(seen: Seen, around: Around, count: int, more: More) -> None:
    while len(seen.under(around)) < count:
        before = len(seen.under(around))
        await more(around)
        if len(seen.under(around)) == before:
            return


def outcomes_of(validation: pb.Validation) -> dict[str, str]:
    """By id, what the tests of a validation did."""
    name = common_pb2.TestOutcome.Name
    found = {t.id: name(t.outcome).removeprefix("TEST_OUTCOME_").lower() for t in validation.tests}
    return {id: outcome for id, outcome in found.items() if outcome != "missing"}
