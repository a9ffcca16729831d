"""What must be so in the database after a training run, whatever was killed meanwhile.

- Each group was asked for, came whole and was acknowledged by the one checkpoint whose steps hold
  it: none is lost, none is used twice.
- Each rollout has exactly one trajectory, and each trajectory a rollout.
- The learner made as many optimizer steps as steps had something to teach: no batch went in twice.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import psycopg

_BEFORE, _AFTER = 100, 400
"""Characters shown of texts that differ."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a database says of a run, and what of it should not be so."""

    facts: dict[str, Any]
    faults: list[str]


def look(url: str, name: str, steps: int, groups_per_step: int) -> Found:
    """Look at the finished run of that name."""
    with psycopg.connect(url) as connection:
        return _Look(connection, name, steps, groups_per_step).all()


def look_at_rollouts(url: str, name: str, wanted: int) -> Found:
    """Look at the rollouts of a run in which nothing is learned; so many were asked for."""
    with psycopg.connect(url) as connection:
        return _Look(connection, name, 0, 0).only_rollouts(wanted)


def different(url: str, other: str, name: str, most: int = 3) -> list[str]:
    """The first rollouts of two runs that ought to have gone alike and did not; what both saw."""
    told = []
    with psycopg.connect(url) as one, psycopg.connect(other) as two:
        for what in _COMPARED:
            told += _first_other(one, two, name, what)
        first, second = _said(one, name), _said(two, name)
    for place in sorted(first.keys() | second.keys()):
        a, b = first.get(place, []), second.get(place, [])
        if a != b:
            at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
            told.append(
                f"step {place[0]}, {place[1]} {place[2]}: {_first_other_text(a[at:], b[at:])}"
            )
    return told[: most + len(_COMPARED)]


_OF_ROLLOUTS = (
    "SELECT g.step, t.group_id, t.group_index, {} FROM trajectories t JOIN groups g "
    "ON g.id = t.group_id JOIN runs r ON r.id = t.run_id WHERE r.name = %s ORDER BY 1, 2, 3"
)
_COMPARED = {
    "checkpoint": "SELECT c.step, c.sha256 FROM checkpoints c JOIN runs r ON r.id = c.run_id "
    "WHERE r.name = %s AND NOT c.abandoned ORDER BY 1",
    "tokens": _OF_ROLLOUTS.format("t.arrays_sha256"),
    "reward": _OF_ROLLOUTS.format("t.reward, t.episode_end, t.hacks"),
    "versions": _OF_ROLLOUTS.format("t.min_version, t.max_version"),
    "metrics": "SELECT m.step, m.name, m.value FROM run_metrics m JOIN runs r ON r.id = m.run_id "
    "WHERE r.name = %s AND m.name LIKE 'learner/%%' AND m.name NOT LIKE '%%second%%' "
    "ORDER BY 1, 2",
}
"""What is the same in both, row by row."""


def _first_other(
    one: "psycopg.Connection[Any]", two: "psycopg.Connection[Any]", name: str, what: str
) -> list[str]:
    """The first row that is another one there."""
    first, second = (c.execute(_COMPARED[what], (name,)).fetchall() for c in (one, two))  # type: ignore[arg-type]
    pairs = itertools.zip_longest(first, second)
    return [f"first other {what}: {a} and {b}" for a, b in pairs if a != b][:1]


def _said(connection: "psycopg.Connection[Any]", name: str) -> dict[tuple[Any, ...], list[str]]:
    rows = connection.execute(
        "SELECT g.step, t.group_id, t.group_index, u.role || ': ' || u.text FROM trajectories t "
        "JOIN groups g ON g.id = t.group_id JOIN runs r ON r.id = t.run_id "
        "JOIN turns u ON u.trajectory_id = t.id WHERE r.name = %s "
        "ORDER BY g.step, t.group_id, t.group_index, u.index",
        (name,),
    )
    found: dict[tuple[Any, ...], list[str]] = {}
    for *place, text in rows:
        found.setdefault(tuple(place), []).append(text)
    return found


def _first_other_text(one: list[str], other: list[str]) -> str:
    """What both say from a little before the first place on where they differ."""
    a, b = (repr(texts) for texts in (one, other))
    at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    start = max(0, at - _BEFORE)
    return f"...{a[start : at + _AFTER]}... and ...{b[start : at + _AFTER]}..."


class _Look:
    def __init__(
        self, connection: "psycopg.Connection[Any]", name: str, steps: int, groups_per_step: int
    ) -> None:
        self._connection, self._steps, self._least = connection, steps, steps * groups_per_step
        found = self._rows("SELECT id, state, summary, epoch FROM runs WHERE name = %s", name)
        self._id, self._state, self._summary, self._epoch = found[0]
        self._faults: list[str] = []

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        return self._connection.execute(statement, values).fetchall()  # type: ignore[arg-type]

    def _of_run(self, statement: str) -> list[Any]:
        return self._rows(statement, self._id)

    def _expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self._faults.append(f"{what}: {found}, not {wanted}")

    def all(self) -> Found:
        """Every check."""
        self._expect("state of the run", self._state, "done")
        groups, wanted = self._groups()
        self._rollouts(wanted)
        taught = self._steps_taught()
        checkpoints = self._checkpoints()
        facts = {
            "groups": groups,
            "rollouts": wanted,
            "steps": self._steps,
            "optimizer_steps": taught,
            "checkpoints": checkpoints,
            "resumed": self._epoch - 1,
            "attempts": self._of_run("SELECT sum(attempt)::int FROM rollouts WHERE run_id = %s")[0][
                0
            ],
        }
        return Found(facts, self._faults)

    def only_rollouts(self, wanted: int) -> Found:
        """What must be so of rollouts."""
        self._rollouts(wanted)
        attempts, most = self._of_run(
            "SELECT sum(attempt)::int, max(attempt) FROM rollouts WHERE run_id = %s"
        )[0]
        ends = dict(
            self._of_run(
                "SELECT episode_end, count(*) FROM trajectories WHERE run_id = %s GROUP BY 1"
            )
        )
        facts = {"rollouts": wanted, "attempts": attempts, "most_attempts": most, "ends": ends}
        return Found(facts, self._faults)

    def _groups(self) -> tuple[int, int]:
        states = dict(
            self._of_run("SELECT state, count(*) FROM groups WHERE run_id = %s GROUP BY state")
        )
        groups = sum(states.values())
        self._expect("groups by state", states, {"acknowledged": groups})
        if groups < self._least:
            self._faults.append(f"groups: {groups}, at least {self._least} were due")
        size, lost = self._of_run(
            "SELECT coalesce(sum(size), 0)::int, coalesce(sum(lost), 0)::int "
            "FROM groups WHERE run_id = %s"
        )[0]
        self._expect("rollouts that were lost", lost, 0)
        return groups, size

    def _rollouts(self, wanted: int) -> None:
        states = dict(
            self._of_run("SELECT state, count(*) FROM rollouts WHERE run_id = %s GROUP BY state")
        )
        self._expect("rollouts by state", states, {"committed": wanted})
        counts = self._of_run(
            "SELECT count(*), count(DISTINCT (group_id, group_index)) FROM trajectories "
            "WHERE run_id = %s"
        )[0]
        self._expect("trajectories, and places that they have", counts, (wanted, wanted))
        named = self._of_run(
            "SELECT count(*), count(DISTINCT t.id) FROM rollouts r JOIN trajectories t "
            "ON r.trajectory_id = t.id AND r.group_id = t.group_id "
            "AND r.group_index = t.group_index AND r.lease_id = t.lease_id WHERE r.run_id = %s"
        )[0]
        self._expect("rollouts with the trajectory of their lease", named, (wanted, wanted))

    def _steps_taught(self) -> int:
        rows = self._of_run(
            "SELECT step, value FROM run_metrics WHERE run_id = %s AND name = 'learned_groups' "
            "ORDER BY step"
        )
        self._expect("steps with metrics", [row[0] for row in rows], [*range(1, self._steps + 1)])
        taught = sum(value > 0 for _, value in rows)
        made = int((self._summary or {}).get("learner_steps", -1))
        self._expect("optimizer steps", made, taught)
        return taught

    def _checkpoints(self) -> int:
        kept = [
            step
            for (step,) in self._of_run(
                "SELECT step FROM checkpoints WHERE run_id = %s AND NOT abandoned ORDER BY step"
            )
        ]
        self._expect("checkpoints of different steps", len(set(kept)), len(kept))
        # What the last steps took and could not teach belongs to the last checkpoint.
        last = kept[-1] if kept else 0
        before = dict(zip(kept, [0, *kept[:-1]], strict=True))
        for group, step, at, gone in self._of_run(
            "SELECT g.id, g.step, c.step, c.abandoned FROM groups g "
            "LEFT JOIN checkpoints c ON c.id = g.checkpoint_id WHERE g.run_id = %s"
        ):
            if at is None or gone or at not in before:
                self._faults.append(f"group {group} of step {step} is in no checkpoint that counts")
            elif not (before[at] < step <= at or (at == last and step > last)):
                self._faults.append(f"group {group} of step {step} is in the checkpoint of {at}")
        return len(kept)
