"""Differences between two versions of a text, for people to read.

- Bounded in lines and in time: what is over a bound is named, not shown.
- Pure and blocking: call it from a worker thread.
"""

import difflib
import time
from collections.abc import Sequence

MAX_LINES = 2_000
_CONTEXT = 3


class TooLarge(Exception):
    """The texts are over a bound."""


class _Matcher(difflib.SequenceMatcher[str]):
    """Gives up when its time is over; one search between two looks at the clock is short."""

    until_s = 0.0

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        if time.monotonic() > self.until_s:
            raise TooLarge
        return super().find_longest_match(alo, ahi, blo, bhi)


def lines_of(content: bytes) -> list[str]:
    """The lines of a text with their ends; only a line feed ends one, as for `patch`.

    Raises:
        UnicodeDecodeError: it is no UTF-8.
    """
    parts = content.decode("utf-8").split("\n")
    return [f"{part}\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def unified(
    old: Sequence[str], new: Sequence[str], old_name: str, new_name: str, *, until_s: float
) -> str:
    """The unified diff of two texts in lines; empty when they are equal.

    Raises:
        TooLarge: too many lines, or not done by `until_s` of the monotonic clock.
    """
    if max(len(old), len(new)) > MAX_LINES:
        raise TooLarge
    matcher = _Matcher(None, old, new)
    matcher.until_s = until_s
    out: list[str] = []
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        if not out:
            out.append(f"--- {_header(old_name)}\n+++ {_header(new_name)}\n")
        first, last = group[0], group[-1]
        out.append(f"@@ -{_range(first[1], last[2])} +{_range(first[3], last[4])} @@\n")
        for tag, old_from, old_to, new_from, new_to in group:
            if tag == "equal":
                out += [" " + line for line in old[old_from:old_to]]
                continue
            out += ["-" + line for line in old[old_from:old_to]]
            out += ["+" + line for line in new[new_from:new_to]]
    return "".join(
        line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in out
    )


def _header(name: str) -> str:
    """A name as `git diff` writes it: a tab ends one that has a blank."""
    return f"{name}\t" if " " in name else name


def _range(start: int, stop: int) -> str:
    """A range of lines as `diff -u` writes it."""
    length = stop - start
    if length == 1:
        return f"{start + 1}"
    return f"{start + 1 if length else start},{length}"
