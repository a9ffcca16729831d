"""What a turn is worth by itself, beside the reward of its trajectory.

- Output that makes no usable call scores -1.
- What a validation finds better or worse than the one before it is shared evenly by the calls that
  may have changed files in between. The shares of an episode add up to what its last validation
  found, whatever the way there: going back and forth earns nothing (potential-based shaping,
  Ng, Harada and Russell 1999).
- A part of the tests, a refused diff, or tests that never ended measure nothing.
- Nothing of this is shown to the policy, and no score changes the reward.
"""

import math
from collections.abc import Collection

from regreen.common.v1 import TEST_OUTCOME_PASSED
from regreen.dataset import v1 as pb
from regreen.sandbox import v1 as sandbox_pb

NO_CALL = -1.0
"""Score of output that makes no usable call."""
_MEASURES = frozenset(
    {
        sandbox_pb.VALIDATION_OUTCOME_PASSED,
        sandbox_pb.VALIDATION_OUTCOME_FAILED,
        sandbox_pb.VALIDATION_OUTCOME_BUILD_FAILED,
    }
)


class TurnScores:
    """Scores the turns of one context as they come."""

    def __init__(
        self, fail_to_pass: Collection[str], pass_to_pass_count: int, *, fresh: bool
    ) -> None:
        """`fresh`: the files are those of the task, whose worth is 0; else it is not known yet."""
        self._wanted, self._kept = frozenset(fail_to_pass), pass_to_pass_count
        self._worth: float | None = 0.0 if fresh else None
        self._since: list[pb.Turn] = []

    def saw(
        self, turn: pb.Turn, *, changed: bool, validation: sandbox_pb.Validation | None = None
    ) -> None:
        """Score a turn of the policy; `changed`: its call may have changed files."""
        if not turn.ok:
            turn.score = NO_CALL
        elif changed:
            self._since.append(turn)
        if validation is None or validation.partial or validation.outcome not in _MEASURES:
            return
        before, self._worth = self._worth, self._worth_of(validation)
        if before is not None:
            for earlier in self._since:
                earlier.score = (self._worth - before) / len(self._since)
        self._since = []

    def _worth_of(self, validation: sandbox_pb.Validation) -> float:
        """0 to 1: the share of failing tests that pass now, halved for each other that broke."""
        if validation.outcome == sandbox_pb.VALIDATION_OUTCOME_PASSED:
            return 1.0
        passing = {test.id for test in validation.tests if test.outcome == TEST_OUTCOME_PASSED}
        fixed = len(self._wanted & passing)
        if not fixed:
            return 0.0
        broken = max(0, self._kept - (len(passing) - fixed))
        return math.ldexp(fixed / len(self._wanted), -broken)
