"""What of past fixes an asking task may see: the one rule of the served and of the process's base.

- Nobody sees an item of the own package's family.
- Who is not a training task sees nothing of the own families either, the package's and the
  culprit's: not in an item's package, culprit, moved packages, or words.
- All of it follows from the asking task as it is stored; a question can only rank.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from regreen.lockfile import normalize

_AFFIXES = re.compile(r"^(?:python-|py-)|(?:-python|-py)$")
_WORD = re.compile(r"[A-Za-z_][\w.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks; made by `asker`."""

    package_family: str
    """Items of this family are hidden from everybody who is of it."""
    hidden_families: tuple[str, ...] = ()
    """Families of which nothing at all is to be seen; none for a training task."""
    hidden_words: tuple[str, ...] = ()
    """How those may be written in a text."""

    def hides(self, package_family: str, families: Collection[str], words: Collection[str]) -> bool:
        """Whether an item of this package, culprit and moved packages, and words is hidden."""
        return (
            package_family == self.package_family
            or package_family in self.hidden_families
            or any(name in families for name in self.hidden_families)
            or any(word in words for word in self.hidden_words)
        )


def asker(package: str, culprit: str = "", split: str = "") -> Asker:
    """Who a task of this package, culprit and split is; without a split it is no training task."""
    own = tuple(family(name) for name in (package, culprit) if name)
    if split == "train":
        return Asker(family(package))
    return Asker(family(package), own, _spellings(own))


def family(name: str) -> str:
    """The family of a distribution: its normal form, without what only says that it is Python's."""
    plain = normalize(name)
    return _AFFIXES.sub("", plain) or plain


def families(names: Iterable[str]) -> list[str]:
    """The families of an item's culprit and moved packages."""
    return sorted({family(name) for name in names if name})


def words(content: str) -> list[str]:
    """Search words: identifiers, also split at dots, dashes and underscores, in lower case."""
    found: list[str] = []
    for match in _WORD.findall(content):
        lower = match.lower().strip("._-")
        if not lower:
            continue
        found.append(lower)
        parts = [part for part in re.split(r"[._-]", lower) if part]
        found += parts if len(parts) > 1 else []
    return found


def item_words(error: str, moved: Iterable[str], edited: Iterable[str], culprit: str) -> list[str]:
    """The words of an item, those of what it moved twice."""
    names = list(moved)
    return words(f"{error} {' '.join(names * 2)} {' '.join(edited)} {culprit}")


def _spellings(names: Iterable[str]) -> tuple[str, ...]:
    """How families may be written in a text."""
    found = {
        spelling
        for name in names
        for plain in (name, f"python-{name}", f"{name}-python", f"py-{name}", f"{name}-py")
        for spelling in (plain, plain.replace("-", "_"), plain.replace("-", "."))
    }
    return tuple(sorted(found))
