"""Which split a record of a set belongs to.

- A family of packages has one split: that of its records in the set, else one that its name decides
  alone, so that the order in which records are found changes almost nothing.
- Culprits that began to break others on `HELD_OUT_FROM` or later are held out: what they broke is
  in the test split alone, unless the set learns from one of them already.
- A record that gives away one of another split goes with that one if its family is new, and is left
  out otherwise; so is a control, and what a held-out culprit broke, if its family is not in test.
- One break is one task: of a package that a culprit broke over the same release, with a test in
  common, the second record is left out, whatever version of the package it is of.
"""

import hashlib
from collections.abc import Sequence
from datetime import date
from typing import Literal

from packaging.version import InvalidVersion, Version

from regreen.families import family
from regreen.lockfile import normalize
from regreen.mine.culprits import shipped_culprits
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.leaks import Facts, facts_of_record, leaks_of
from regreen.tasks.model import TaskRecord

Split = Literal["train", "validation", "test"]
HELD_OUT_FROM = date(2023, 6, 1)
_TEST, _VALIDATION = 20, 30
"""Of a hundred families the first go to the test split, those up to the second to validation."""


def split_of(package: str) -> Split:
    """The split of a package that is new to a set and has nothing in common with it."""
    place = int(hashlib.sha256(family(package).encode()).hexdigest(), 16) % 100
    return "test" if place < _TEST else "validation" if place < _VALIDATION else "train"


def late_culprits() -> frozenset[str]:
    """Families of the culprits that began to break others late."""
    return frozenset(
        family(culprit.name)
        for culprit in shipped_culprits()
        if culprit.breaks and min(one.day for one in culprit.breaks) >= HELD_OUT_FROM
    )


def same_break(one: TaskRecord, other: TaskRecord) -> bool:
    """Whether one release of one culprit broke a package in both records, seen by a common test."""
    a, b = one.culprit, other.culprit
    if a is None or b is None or normalize(one.package) != normalize(other.package):
        return False
    if normalize(a.name) != normalize(b.name):
        return False
    try:
        overlap = max(map(Version, (a.good, b.good))) < min(map(Version, (a.bad, b.bad)))
    except InvalidVersion:
        overlap = (a.good, a.bad) == (b.good, b.bad)
    return overlap and not set(one.tests.fail_to_pass).isdisjoint(other.tests.fail_to_pass)


class Splits:
    """The splits of a set, which grows."""

    def __init__(self, old: Sequence[TaskRecord]) -> None:
        """The set as it is.

        Raises:
            InvalidArgument: a family of packages has two splits.
        """
        self._facts: list[Facts] = []
        self._records = list(old)
        self._splits: dict[str, Split] = {}
        self.left_out: dict[str, str] = {}
        """Ids of records that are in no split, and why."""
        for record in old:
            found = facts_of_record(record)
            if self._splits.setdefault(found.family, record.split) != record.split:
                problem = f"of {found.family} differs between its tasks"
                raise InvalidArgument("split", problem, "give it one")
            self._facts.append(found)
        learnt = {one.culprit for one in self._facts if one.split != "test"}
        self._held_out = late_culprits() - learnt

    def place(self, record: TaskRecord) -> Split | None:
        """The split of a new record; None: it is left out, and `left_out` says why."""
        twin = next((one for one in self._records if same_break(one, record)), None)
        if twin is not None:
            self.left_out[record.id] = f"is the break of {twin.id}"
            return None
        own = facts_of_record(record)
        known = self._splits.get(own.family)
        why = "is a control" if record.control else ""
        if own.culprit in self._held_out:
            why = why or f"the culprit {own.culprit} is held out"
        split: Split = known or ("test" if why else self._beside(own) or split_of(own.family))
        if why and split != "test":
            self.left_out[record.id] = f"{why}, and {own.family} is in {split}"
            return None
        own = facts_of_record(record.model_copy(update={"split": split}))
        if found := leaks_of(own, self._facts):
            self.left_out[record.id] = str(found[0])
            return None
        self._splits[own.family] = split
        self._facts.append(own)
        self._records.append(record)
        return split

    def _beside(self, own: Facts) -> Split | None:
        """The split of a record that the new one, of a new family, would give away."""
        for other in self._facts:
            elsewhere = Facts(own.id, own.family, "?", own.culprit, own.log, own.patch)
            if leaks_of(elsewhere, [other]):
                return self._splits[other.family]
        return None
