"""The checks of one task in one State: the broken State, a diff without effect, every fix.

- Each is repeated in fresh forks without a cached answer; what fails twice in the same way under
  the pinned conditions is not repeated further.
- A test whose outcome differs between runs of the same bytes is never required, and held with the
  cause; a run that came to no end is no evidence.
- Nothing is decided before all runs are there: what is unstable is known only then.
"""

import hashlib
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from regreen.common.v1 import common_pb2
from regreen.rpc.errors import InvalidArgument, MissingDependency, NotFound
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks import environment as env
from regreen.tasks import probes
from regreen.tasks.model import Fix, TaskRecord, ids_sha256
from regreen.tasks.probes import FLAKY, PASSED, PINNED, Around, Run, Seen
from regreen.tasks.verdict import Check, Quarantined, Verdict

if TYPE_CHECKING:
    from regreen.tasks.gate import Gate

NOOP_PATH = "regreen-noop.txt"
NOOP = b"A diff without effect must not turn a build green.\n"
BROKEN, NO_OP, REFERENCE = "broken-fails", "noop-fails", "reference-passes"
ATTEMPT = "control-fails"
RECORDED = "recorded"
FAILS = "fails"
"""What is said of an attempt at a control that fails each time."""
REPEATED = frozenset(("order", "hash_seed"))
"""What is varied between repeats, each of which must come to its end."""
_TRIES = 3
"""Runs that may hit a limit before a task waits for a quieter machine."""
_SURELY = 2
"""Runs from which on a test that fails in all of them does not fail by chance."""
_SHOWN = 4
_NETWORK = re.compile(
    r"gaierror|Name or service not known|Temporary failure in name resolution|getaddrinfo failed"
    r"|Network is unreachable|No route to host|Failed to resolve|Max retries exceeded"
)
"""How tests say that they need the network, which no run has."""


class Unfinished(Exception):
    """Run after run hit a limit, so that nothing is known of the task."""


@dataclass(slots=True)
class Row:
    """One run with what is told of it."""

    check: str
    run: Run
    summary: str
    outcome: pb.ValidationOutcome.ValueType
    sha256: str
    seconds: float
    reverted: tuple[str, ...] = ()
    messages: Mapping[str, str] = field(default_factory=dict)

    @property
    def green(self) -> set[str]:
        return {id for id, outcome in self.run.outcomes.items() if outcome == PASSED}


class Trial:
    """The checks of one task."""

    def __init__(self, gate: "Gate", task: TaskRecord, state: pb.State, *, strict: bool) -> None:
        self.gate, self.task, self.state, self.strict = gate, task, state, strict
        self.recorded = set(env.complete_ids(task))
        self.modules = {id for id in (*self.recorded, *state.baseline.failing) if "::" not in id}
        self.began_s = time.time()
        self.rows: list[Row] = []
        self.held: dict[str, Quarantined] = {}
        self.fixes: dict[str, str] = {}
        self.unprobed: dict[str, str] = {}
        self.seen: dict[str, Seen] = {}
        self.changes: dict[str, Sequence[common_pb2.FileChange]] = {}
        self.fixed = Seen()
        self._hold(dict.fromkeys(task.tests.unstable, (RECORDED,)), None)

    async def run(self) -> Verdict:
        """A look at the broken State, a no-op and every fix; the repeats of what holds; decide."""
        added = common_pb2.CHANGE_KIND_ADD
        noop = common_pb2.FileChange(path=NOOP_PATH, kind=added, content=NOOP, mode=0o644)
        self._add(BROKEN, self._baseline())
        if await self._look(BROKEN, []) and await self._look(NO_OP, [noop]):
            if self.task.control:
                return await self._run_control(noop)
            fixes = [fix for fix in self.task.fixes if await self._look_at_fix(fix)]
            if fixes:
                await self._repeat(BROKEN, [], elsewhere=True)
                await self._repeat(NO_OP, [noop], elsewhere=False)
            if not self._first_wrong(BROKEN) and not self._first_wrong(NO_OP):
                for fix in fixes:
                    await self._finish(fix)
        return self._decide()

    async def _run_control(self, noop: common_pb2.FileChange) -> Verdict:
        """Every attempt at a control, as often as a fix would be tried."""
        await self._repeat(BROKEN, [], elsewhere=True)
        await self._repeat(NO_OP, [noop], elsewhere=False)
        for fix in self.task.fixes:
            name = f"{fix.mode}/{fix.origin}"
            check = f"{ATTEMPT} {name}"
            try:
                changes = await self.gate.reference(self.task, fix, self.state)
                await self._once(check, changes, PINNED, fix.mode)
            except (InvalidArgument, MissingDependency, NotFound) as error:
                self.fixes[name] = f"does not apply: {error}"
                continue
            if not self._first_wrong(check):
                await self._repeat(check, changes, elsewhere=False, mode=fix.mode)
            self.fixes[name] = self._first_wrong(check) or FAILS
        return self._decide()

    async def _look(
        self, check: str, changes: Sequence[common_pb2.FileChange], mode: str = "any_fix"
    ) -> bool:
        """Whether a check holds under the pinned conditions, or may: what fails is run twice."""
        if check not in self.seen:
            await self._once(check, changes, PINNED, mode)
        if not self._first_wrong(check):
            return True
        await self._once(check, changes, PINNED, mode)
        return not self._first_wrong(check, last=True) or bool(self.seen[check].unsteady())

    async def _look_at_fix(self, fix: Fix) -> bool:
        """Whether a fix applies and turns the tests green, at first sight."""
        name = f"{fix.mode}/{fix.origin}"
        check = f"{REFERENCE} {name}"
        if check in self.seen:
            self.fixes[name] = "is there twice; keep one fix of a mode and origin"
            return False
        try:
            self.changes[check] = await self.gate.reference(self.task, fix, self.state)
        except (InvalidArgument, MissingDependency, NotFound) as error:
            self.fixes[name] = f"does not apply: {error}"
            return False
        try:
            if await self._look(check, self.changes[check], fix.mode):
                return True
        except InvalidArgument as error:
            self.fixes[name] = f"is not allowed: {error}"
            return False
        self.fixes[name] = self._first_wrong(check)
        return False

    async def _finish(self, fix: Fix) -> None:
        """Every repeat of a fix must turn the same tests green and break none."""
        name = f"{fix.mode}/{fix.origin}"
        check = f"{REFERENCE} {name}"
        await self._repeat(check, self.changes[check], elsewhere=True, mode=fix.mode)
        self.fixes[name] = self._first_wrong(check) or self._hidden(check) or "ok"
        good = self.fixes[name] == "ok"
        if good and (fix.mode == "any_fix" or not self.fixed.runs):
            self.fixed = self.seen[check]

    def _hidden(self, check: str) -> str:
        """What a fix breaks that the record calls unstable and that never was; empty: nothing."""
        broken, fixed = self.seen[BROKEN].runs, self.seen[check].runs
        spoilt = [
            id
            for id in sorted(set(self.task.tests.unstable))
            if all(run.of(id) == PASSED for run in broken)
            and all(run.of(id) in ("failed", "error") for run in fixed)
        ]
        if not spoilt or len(fixed) < _SURELY:
            return ""
        what = f"breaks {len(spoilt)} that the record calls unstable and that passed in each run"
        return f"{what}: {_some(spoilt)}"

    async def _repeat(
        self,
        check: str,
        changes: Sequence[common_pb2.FileChange],
        *,
        elsewhere: bool,
        mode: str = "any_fix",
    ) -> None:
        """The repeats that are still to be made, and those that tell why outcomes differ."""
        wanted = [*probes.schedule(self.gate.repeats)]
        for run in self.seen[check].runs:
            if run.around in wanted:
                wanted.remove(run.around)
        if elsewhere:
            wanted += probes.elsewhere(self.gate.repeats, self.began_s)
        for around in wanted:
            await self._once(check, changes, around, mode)

        async def more(around: Around) -> None:
            await self._once(check, changes, around, mode)

        if self.gate.repeats > 1:
            self._hold(await probes.causes(self.seen[check], more), self.seen[check])

    async def _once(
        self,
        check: str,
        changes: Sequence[common_pb2.FileChange],
        around: Around,
        mode: str = "any_fix",
    ) -> None:
        """One run more.

        Raises:
            Unfinished: none of a few came to its end, and its conditions are no excuse for that.
        """
        for _ in range(_TRIES):
            found = await self.gate.client.validate(
                self.state.id,
                changes,
                held_pins=env.held_pins(self.task, mode),
                required_tests=(),
                skip_cache_lookup=True,
                conditions=around.message(),
            )
            if found.lasting:
                self.unprobed |= {f"{around}: {name}": why for name, why in found.unmet.items()}
                self._add(check, found, around)
                return
        if not set(around.names) - REPEATED:
            raise Unfinished(f"{_TRIES} validations in a row came to no end ({found.summary})")
        self.unprobed[str(around)] = f"{check} came to no end: {found.summary}"

    def _baseline(self) -> pb.Validation:
        """The State's own baseline as the first run of its untouched tests."""
        seen = self.state.baseline
        outcomes = [(id, common_pb2.TEST_OUTCOME_PASSED) for id in seen.passing]
        outcomes += [(id, common_pb2.TEST_OUTCOME_FAILED) for id in seen.failing if "::" in id]
        return pb.Validation(
            outcome=pb.VALIDATION_OUTCOME_FAILED,
            summary=f"baseline: {len(seen.passing)} pass, {len(seen.failing)} fail",
            tests=[pb.TestResult(id=id, outcome=outcome) for id, outcome in outcomes],
            failing=[*seen.failing, *self.modules],
            duration=seen.duration,
            lasting=True,
        )

    def _add(self, check: str, found: pb.Validation, around: Around = PINNED) -> None:
        outcomes = probes.outcomes_of(found)
        if found.outcome in (pb.VALIDATION_OUTCOME_PASSED, pb.VALIDATION_OUTCOME_FAILED):
            reported = {id.partition("::")[0] for id in outcomes}
            whole = (self.modules & reported) - set(found.failing) - set(outcomes)
            outcomes |= dict.fromkeys(whole, PASSED)
        seen = self.seen.setdefault(check, Seen())
        where = f" [{around}]" if around != PINNED else ""
        label = f"{check} {len(seen.runs) + 1}{where}"
        rows = "\n".join(sorted(f"{id} {outcome}" for id, outcome in outcomes.items()))
        seconds = found.duration.ToTimedelta().total_seconds()
        row = Row(
            check=check,
            run=Run(around, outcomes, label),
            summary=found.summary,
            outcome=found.outcome,
            sha256=hashlib.sha256(rows.encode()).hexdigest(),
            seconds=seconds,
            reverted=tuple(f"{r.path} ({r.reason})" for r in found.reverted),
            messages={t.id: t.message for t in found.tests if t.message},
        )
        seen.runs.append(row.run)
        seen.seconds.append(seconds)
        self.rows.append(row)

    def _hold(self, found: Mapping[str, tuple[str, ...]], seen: Seen | None) -> None:
        for id, causes in found.items():
            lines = seen.lines(id) if seen is not None else ()
            old = self.held.get(id)
            if old is not None:
                causes = tuple(dict.fromkeys((*old.causes, *causes)))
                causes = tuple(c for c in causes if c != RECORDED or len(causes) == 1)
                lines = (*old.outcomes, *lines)
            self.held[id] = Quarantined(id, causes, lines)

    def _first_wrong(self, check: str, *, last: bool = False) -> str:
        """What is wrong with a check in its first run that is, or its last; empty: nothing."""
        rows = [row for row in self.rows if row.check == check]
        found = (self.wrong(row) for row in (rows[-1:] if last else rows))
        return next((problem for problem in found if problem), "")

    def wrong(self, row: Row) -> str:
        """What speaks against the task in a run; empty: nothing."""
        if row.check in (BROKEN, NO_OP):
            return self._not_broken(row)
        if row.check.startswith(ATTEMPT):
            passes = row.outcome == pb.VALIDATION_OUTCOME_PASSED
            return f"passes: {row.summary}" if passes else ""
        return self._not_fixed(row)

    def _not_broken(self, row: Row) -> str:
        """What passes and must not."""
        wanted = self.recorded - set(self.held)
        if not self.strict and row.check == NO_OP:
            wanted -= self.seen[BROKEN].passing()
        green = sorted(wanted & row.green)
        if row.outcome == pb.VALIDATION_OUTCOME_PASSED:
            return f"passes: {row.summary}"
        lenient = not self.strict and row.check == BROKEN and len(green) < len(wanted)
        if green and not lenient:
            what = "recorded as failing" if row.check == BROKEN else "that must fail"
            return f"{len(green)} of {len(wanted)} tests {what} pass: {_some(green)}"
        return ""

    def _not_fixed(self, row: Row) -> str:
        """What a fix leaves red, breaks or may not change."""
        if row.outcome == pb.VALIDATION_OUTCOME_REJECTED:
            return f"is not allowed: {row.summary}"
        if row.reverted:
            return f"changes what a fix may not: {_some(row.reverted)}"
        before = self.seen[BROKEN].passing()
        held, green = set(self.held), row.green
        wanted = self.recorded | (self.fixed.passing() if self.fixed.runs else set())
        if not wanted and not self._like_record(green - before):
            return f"{len(green - before)} turn green, not those of the record"
        unfixed, spoilt = sorted(wanted - green - held), sorted(before - green - held)
        problem = self._unfixed(row, unfixed) if unfixed else ""
        if spoilt and not problem:
            problem = f"passes fail-to-pass and breaks {len(spoilt)} that passed: {_some(spoilt)}"
        if not problem and not green and not held:
            problem = f"failed: {row.summary}"
        return problem

    def _unfixed(self, row: Row, unfixed: Sequence[str]) -> str:
        unknown = [id for id in unfixed if not self._exists(id, row)]
        if unknown and row.run.outcomes:
            return f"{len(unknown)} recorded tests do not exist: {_some(unknown)}"
        said = next((row.messages[id] for id in unfixed if row.messages.get(id)), row.summary)
        network = [id for id in unfixed if _NETWORK.search(row.messages.get(id, ""))]
        if network:
            return f"{len(network)} tests need the network, which no run has: {_some(network)}"
        return f"failed: {len(unfixed)} tests stay red: {_some(unfixed)}: {said[:200]}"

    def _exists(self, id: str, row: Row) -> bool:
        """Whether a test reported, or is in a file that could not be read this time."""
        if id in row.run.outcomes or id in self.seen[BROKEN].ids() or id in row.messages:
            return True
        home = id.partition("::")[0]
        silent = not any(other.partition("::")[0] == home for other in row.run.outcomes)
        return home in self.modules and silent

    def _like_record(self, turned: set[str]) -> bool:
        """Whether these are the tests of a record that gives only their digest."""
        digest = self.task.tests.fail_to_pass_sha256
        found = {id for id in turned if id not in self.modules}
        return not digest or digest in (ids_sha256(found), ids_sha256(found - set(self.held)))

    def _decide(self) -> Verdict:
        broken = self.seen[BROKEN]
        turned = self.fixed.passing() - broken.passing() if self.fixed.runs else set()
        # A module that the record does not name stands for the tests that it holds.
        turned -= self.modules - self.recorded
        kept = (self.fixed.passing() & broken.passing()) - set(self.held) - self.modules
        if self.task.control:
            turned = self.recorded or set(self.state.baseline.failing) - self.modules
            kept = broken.passing() - set(self.held) - self.modules
        stable = turned - set(self.held)
        status, reason, hangs = self._status(turned, stable)
        return Verdict(
            task_id=self.task.id,
            status=status,
            reason=reason,
            checks=tuple(self._checks()),
            flaky=tuple(sorted(self.held)),
            state_id=self.state.id,
            python=self.state.python,
            fail_to_pass=tuple(sorted(stable)),
            pass_to_pass=tuple(sorted(kept)),
            lost=tuple(sorted(self.recorded - stable)),
            error_log=self.state.baseline.log,
            fixes=self.fixes,
            seconds=round(sum(self.fixed.seconds) / max(1, len(self.fixed.seconds)), 3),
            depends_on=hangs,
            quarantined=tuple(self.held[id] for id in sorted(self.held)),
            unprobed=self.unprobed,
            repeats=self.gate.repeats,
        )

    def _checks(self) -> Iterable[Check]:
        numbers: dict[str, int] = {}
        for row in self.rows:
            numbers[row.check] = numbers.get(row.check, 0) + 1
            problem = self.wrong(row)
            outcome = pb.ValidationOutcome.Name(row.outcome).removeprefix("VALIDATION_OUTCOME_")
            detail = f"{outcome.lower()}: {row.summary}" + (f"; {problem}" if problem else "")
            yield Check(
                name=row.check,
                repeat=numbers[row.check],
                ok=not problem,
                detail=detail[:600],
                results_sha256=row.sha256,
                seconds=row.seconds,
                conditions=str(row.run.around),
            )

    def _status(self, turned: set[str], stable: set[str]) -> tuple[str, str, tuple[str, ...]]:
        """Status, reason, and what the verdict hangs on."""
        for check in (BROKEN, NO_OP):
            problem = self._first_wrong(check) if check in self.seen else ""
            if problem:
                return "rejected", f"{check}: {problem}", ()
        if self.task.control:
            return self._status_of_control(turned, stable)
        if not any(result == "ok" for result in self.fixes.values()):
            first = next(iter(self.fixes.values()), "the record has none")
            needs = ("network",) if "need the network" in first else ()
            return "rejected", f"reference fix: {first}", needs
        if not stable:
            return self._unstable(turned or self.recorded)
        more = {id for id in turned if id.partition("::")[0] not in self.recorded}
        more -= self.recorded | set(self.held)
        if self.strict and self.recorded and more:
            reason = f"{len(more)} tests that the fix turns green are not recorded: {_some(more)}"
            return "rejected", f"{BROKEN}: {reason}", ()
        lost = sorted(self.recorded - stable)
        drift = f"; {len(lost)} recorded ones do not: {_some(lost)}" if lost else ""
        reason = f"{len(stable)} tests turn green, {len(self.held)} unstable{drift}"
        return "admitted", reason, ()

    def _status_of_control(
        self, turned: set[str], stable: set[str]
    ) -> tuple[str, str, tuple[str, ...]]:
        passed = [name for name, said in self.fixes.items() if said.startswith("passes")]
        if passed:
            return "rejected", f"control: can be fixed: {passed[0]} {self.fixes[passed[0]]}", ()
        if FAILS not in self.fixes.values():
            first = next(iter(self.fixes.values()), "the record has none")
            return "rejected", f"control: no attempt at a fix was tried: {first}", ()
        if not stable:
            return self._unstable(turned)
        return "admitted", f"control: {len(stable)} tests stay red whatever was tried", ()

    def _unstable(self, turned: set[str]) -> tuple[str, str, tuple[str, ...]]:
        """The decision on a task of which no stable test is left to turn green."""
        held = [self.held[id] for id in sorted(turned) if id in self.held]
        causes = {cause for one in held for cause in one.causes} - {FLAKY, RECORDED}
        if causes:
            hangs = tuple(name for name in probes.CAUSES if name in causes)
            ids = [one.id for one in held if causes & set(one.causes)]
            reason = f"the verdict hangs on {_listed(hangs)}: {_some(ids)}"
            return "rejected", reason, hangs
        if any(FLAKY in one.causes for one in held):
            return "quarantined", f"only unstable tests differ: {_some(one.id for one in held)}", ()
        where = "quarantined" if self.held else "rejected"
        return where, "no stable test fails before and passes after the reference fix", ()


def _listed(names: Sequence[str]) -> str:
    words = [f"the {name.replace('_', ' ')}" for name in names]
    return " and ".join(words)


def _some(ids: Iterable[str] | Collection[str]) -> str:
    names = sorted(ids)
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
