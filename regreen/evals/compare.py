"""Subjects against each other, in numbers and in one honest sentence.

- A sentence never says more than its interval and its test: "did better" needs an interval
  without zero *and* p <= 0.05, because a bootstrap over few tasks is too sure.
- Both sides count the same cells only: what one of the two was not tried on is left out of both.
- Signs, tasks and samples are always in the sentence.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from regreen.evals.rows import Outcome, outcomes_by_task
from regreen.evals.stats import Difference, Estimate, paired_difference, solve_rate

_SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """Second subject against the first on the tasks of both."""

    first: str
    second: str
    pipeline: str
    """A pipeline, or "all"."""
    mode: str
    """A mode, or "all"."""
    grader: str
    first_rate: Estimate
    second_rate: Estimate
    difference: Difference

    @property
    def sentence(self) -> str:
        """The comparison for people."""
        return sentence(self)

    def to_json(self) -> dict[str, object]:
        """Plain values with the sentence; NaN as None."""
        return {**asdict(self), "sentence": self.sentence}


def compare(
    outcomes: Sequence[Outcome],
    first: str,
    second: str,
    *,
    grader: str,
    pipeline: str = "all",
    mode: str = "all",
    seed: int = 0,
) -> Comparison:
    """Compare two subjects on the (task, pipeline, mode) cells that both were tried on."""
    chosen = [o for o in select(outcomes, pipeline=pipeline, mode=mode) if grader in o.solved]
    shared = _cells_of(chosen, first) & _cells_of(chosen, second)
    left, right = (
        outcomes_by_task([o for o in select(chosen, subject=name) if _cell(o) in shared], grader)
        for name in (first, second)
    )
    return Comparison(
        first,
        second,
        pipeline,
        mode,
        grader,
        solve_rate(left, seed=seed),
        solve_rate(right, seed=seed),
        paired_difference(left, right, seed=seed),
    )


def _cell(outcome: Outcome) -> tuple[str, str, str]:
    return outcome.task_id, outcome.pipeline, outcome.mode


def _cells_of(outcomes: Sequence[Outcome], subject: str) -> set[tuple[str, str, str]]:
    return {_cell(outcome) for outcome in select(outcomes, subject=subject)}


def select(
    outcomes: Sequence[Outcome], *, subject: str = "all", pipeline: str = "all", mode: str = "all"
) -> list[Outcome]:
    """Outcomes of a cell; "all" leaves a dimension open."""
    return [
        outcome
        for outcome in outcomes
        if subject in ("all", outcome.subject)
        and pipeline in ("all", outcome.pipeline)
        and mode in ("all", outcome.mode)
    ]


def sentence(found: Comparison) -> str:
    """What may be said about a comparison."""
    gap = found.difference
    if gap.tasks == 0 or math.isnan(gap.value):
        return f"{found.second} and {found.first} have no task in common."
    place = "" if found.pipeline == "all" else f" in the {found.pipeline} pipeline"
    place += "" if found.mode == "all" else f", mode {found.mode}"
    facts = (
        f"{found.second} solved {found.second_rate.value:.1%} and {found.first} "
        f"{found.first_rate.value:.1%} of attempts, mean over {gap.tasks} "
        f"task{'s' if gap.tasks != 1 else ''}{place} "
        f"({found.second_rate.samples} and {found.first_rate.samples} attempts): "
        f"{100 * gap.value:+.1f} points, 95% interval {100 * gap.low:+.1f} to "
        f"{100 * gap.high:+.1f}, p = {gap.p_value:.2g}, paired by task."
    )
    if gap.low <= 0.0 <= gap.high:
        return f"{facts} The interval holds zero: these data do not tell the two apart."
    if gap.p_value > _SIGNIFICANT:
        return (
            f"{facts} The interval leaves zero out, but a permutation test on so few tasks does "
            "not: a hint, not a finding."
        )
    better, worse = (found.second, found.first) if gap.value > 0 else (found.first, found.second)
    return f"{facts} {better} did better than {worse}."
