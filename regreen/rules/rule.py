"""What a rule is, and which rules a set of moved packages asks for.

- Every rule cites the upstream notes that ask for what it does.
- `since` is the first release in which the new way is there and the old one warns or breaks,
  `gone` the one in which the old way no longer works. A move that jumps over neither is none of
  its business.
- Signs are words of which a file must hold one: files without are never parsed.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

if TYPE_CHECKING:  # reading it takes longer than most commands do
    import libcst as cst

Change = Callable[["cst.Module"], "cst.Module"]
Moved = Mapping[str, tuple[str, str]]
"""Packages by name, each with the release before and the one now."""
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to write source for a newer release of a package."""

    name: str
    culprit: str
    since: str
    gone: str
    source: str
    """Address of the upstream notes."""
    heading: str
    """Where in them."""
    what: str
    signs: tuple[str, ...]
    changes: tuple[Change, ...]
    """One after the other."""
    sweeping: bool = False
    """Whether it takes files as a whole to another interface, so that a narrower rule may do."""

    def fits(self, moved: Moved) -> bool:
        """Whether a package moved over what this rule is about."""
        good, bad = moved.get(self.culprit, ("", ""))
        try:
            return Version(good) < Version(self.gone) and Version(self.since) <= Version(bad)
        except InvalidVersion:
            return False

    def signed(self, text: str) -> bool:
        """Whether a text may be of interest."""
        words = "|".join(map(re.escape, self.signs))
        return re.search(rf"(?<![A-Za-z0-9_])(?:{words})(?![A-Za-z0-9_])", text) is not None

    def apply(self, text: str) -> str:
        """The text as the rule leaves it; the same text where there is nothing to do.

        Raises:
            libcst.ParserSyntaxError: it is no Python that can be read.
        """
        if len(text) > MAX_BYTES or not self.signed(text):
            return text
        import libcst as cst

        module = cst.parse_module(text)
        for change in self.changes:
            module = change(module)
        return module.code


def library() -> "tuple[Rule, ...]":
    """Every rule there is, read when they are first asked for."""
    from regreen.rules.library import RULES

    return RULES


def fitting(rules: Iterable[Rule], moved: Moved) -> list[Rule]:
    """The rules that these moves ask for, in their order."""
    return [rule for rule in rules if rule.fits(moved)]
