"""Line differences of one rollout: computed from contents, or parsed from a unified diff.

- No input makes it raise or run long: the line diff is near-linear (patience diff with greedy
  gaps), and unified diffs are read leniently, line by line.
- Contents win over the unified diff; a diff is used only for paths without contents.
- Line numbers count from 1 on the side that the line belongs to.
"""

import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from judge_svc.evidence import ChangeKind, Evidence, decode

MAX_LINES = 50_000
"""Longer files are compared as bags of lines."""
_DEPTH = 12
_HUNK = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@")


@dataclass(frozen=True, slots=True)
class Line:
    """One line and its number on its side."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What happened to one path; `before`/`after` are None where unknown or absent."""

    path: str
    kind: ChangeKind
    before: str | None
    after: str | None
    added: tuple[Line, ...] = ()
    removed: tuple[Line, ...] = ()


@dataclass(slots=True)
class _Side:
    path: str
    kind: ChangeKind = ChangeKind.MODIFY
    added: list[Line] = field(default_factory=list)
    removed: list[Line] = field(default_factory=list)


def deltas(evidence: Evidence) -> tuple[Delta, ...]:
    """Every changed path of the evidence, in order, each once."""
    originals = {c.path: decode(c.content) for c in evidence.originals}
    parsed = {d.path: d for d in parse_unified_diff(evidence.unified_diff)}
    found: dict[str, Delta] = {}
    for change in evidence.changes:
        before = originals.get(change.path)
        after = None if change.kind is ChangeKind.DELETE else decode(change.content)
        if change.kind is ChangeKind.ADD:
            before = before or ""
        if before is None and change.path in parsed:
            hint = parsed[change.path]
            found[change.path] = Delta(
                change.path, change.kind, None, after, hint.added, hint.removed
            )
        else:
            found[change.path] = delta_of(change.path, change.kind, before, after)
    for path, delta in parsed.items():
        found.setdefault(path, delta)
    return tuple(found.values())


def delta_of(path: str, kind: ChangeKind, before: str | None, after: str | None) -> Delta:
    """The delta of one path from its two contents."""
    old = (before or "").split("\n")
    new = (after or "").split("\n")
    removed, added = diff_lines(old, new)
    return Delta(
        path,
        kind,
        before,
        after,
        tuple(Line(i + 1, new[i]) for i in added),
        tuple(Line(i + 1, old[i]) for i in removed),
    )


def diff_lines(old: list[str], new: list[str]) -> tuple[list[int], list[int]]:
    """Indexes removed from `old` and added in `new` (patience diff, bounded depth)."""
    if len(old) > MAX_LINES or len(new) > MAX_LINES:
        return _bag_diff(old, new)
    removed: list[int] = []
    added: list[int] = []
    pending = [(0, len(old), 0, len(new), 0)]
    while pending:
        a, a_end, b, b_end, depth = pending.pop()
        while a < a_end and b < b_end and old[a] == new[b]:
            a, b = a + 1, b + 1
        while a < a_end and b < b_end and old[a_end - 1] == new[b_end - 1]:
            a_end, b_end = a_end - 1, b_end - 1
        anchors = _anchors(old, new, (a, a_end, b, b_end)) if depth < _DEPTH else []
        if not anchors:
            gone, came = _bag_diff(old[a:a_end], new[b:b_end])
            removed += [a + i for i in gone]
            added += [b + i for i in came]
            continue
        for i, j in [*anchors, (a_end, b_end)]:
            if i > a or j > b:
                pending.append((a, i, b, j, depth + 1))
            a, b = i + 1, j + 1
    return sorted(removed), sorted(added)


def _anchors(
    old: list[str], new: list[str], window: tuple[int, int, int, int]
) -> list[tuple[int, int]]:
    """Lines unique on both sides, in the longest increasing order."""
    a, a_end, b, b_end = window
    if a >= a_end or b >= b_end:
        return []
    count_old, count_new = Counter(old[a:a_end]), Counter(new[b:b_end])
    place = {new[j]: j for j in range(b, b_end) if count_new[new[j]] == 1}
    pairs = [
        (i, place[old[i]]) for i in range(a, a_end) if count_old[old[i]] == 1 and old[i] in place
    ]
    tails: list[int] = []
    tail_at: list[int] = []
    links: list[int] = []
    for index, (_, j) in enumerate(pairs):
        k = bisect_left(tails, j)
        links.append(tail_at[k - 1] if k else -1)
        if k == len(tails):
            tails.append(j)
            tail_at.append(index)
        else:
            tails[k], tail_at[k] = j, index
    chain: list[tuple[int, int]] = []
    index = tail_at[-1] if tail_at else -1
    while index >= 0:
        chain.append(pairs[index])
        index = links[index]
    return chain[::-1]


def _bag_diff(old: list[str], new: list[str]) -> tuple[list[int], list[int]]:
    """Differences as bags of lines, order ignored."""
    gone, came = Counter(old), Counter(new)
    gone, came = gone - came, came - gone
    return _take(old, gone), _take(new, came)


def _take(lines: list[str], bag: Counter[str]) -> list[int]:
    taken = []
    for index, line in enumerate(lines):
        if bag[line] > 0:
            bag[line] -= 1
            taken.append(index)
    return taken


def parse_unified_diff(text: str) -> tuple[Delta, ...]:
    """The files of a unified or git diff; anything that is no diff is passed over."""
    sides: list[_Side] = []
    old_path = ""
    old_line = new_line = old_left = new_left = 0
    for raw in text.replace("\r\n", "\n").split("\n"):
        if (old_left > 0 or new_left > 0) and sides and raw[:1] in ("+", "-", " ", "", "\\"):
            side, mark = sides[-1], raw[:1]
            if mark == "+":
                side.added.append(Line(new_line, raw[1:]))
                new_line, new_left = new_line + 1, new_left - 1
            elif mark == "-":
                side.removed.append(Line(old_line, raw[1:]))
                old_line, old_left = old_line + 1, old_left - 1
            elif mark != "\\":
                old_line, new_line = old_line + 1, new_line + 1
                old_left, new_left = old_left - 1, new_left - 1
            continue
        if raw.startswith("--- "):
            old_path = _diff_path(raw[4:])
        elif raw.startswith("+++ "):
            sides.append(_side_of(old_path, _diff_path(raw[4:])))
        elif sides and (hunk := _HUNK.match(raw)):
            old_line, old_left = int(hunk[1]), int(hunk[2] or 1)
            new_line, new_left = int(hunk[3]), int(hunk[4] or 1)
    merged: dict[str, _Side] = {}
    for side in sides:
        first = merged.setdefault(side.path, side)
        if first is not side:
            first.added += side.added
            first.removed += side.removed
    return tuple(
        Delta(s.path, s.kind, None, None, tuple(s.added), tuple(s.removed))
        for s in merged.values()
        if s.path
    )


def _side_of(old_path: str, new_path: str) -> _Side:
    if not new_path:
        return _Side(old_path, ChangeKind.DELETE)
    return _Side(new_path, ChangeKind.MODIFY if old_path else ChangeKind.ADD)


def _diff_path(raw: str) -> str:
    """A path of a `---`/`+++` line; empty for /dev/null."""
    path = raw.split("\t")[0].strip().strip('"')
    if path == "/dev/null":
        return ""
    return path[2:] if path.startswith(("a/", "b/")) else path


def unified_diff(changed: tuple[Delta, ...], limit_chars: int) -> str:
    """A compact diff (no context lines) for people and models, cut at `limit_chars`."""
    out: list[str] = []
    used = 0
    for delta in changed:
        out.append(f"=== {delta.kind} {delta.path}")
        marks = [(line.number, 0, f"-{line.text}") for line in delta.removed]
        marks += [(line.number, 1, f"+{line.text}") for line in delta.added]
        for number, _, text in sorted(marks):
            used += len(text) + 8
            if used > limit_chars:
                out.append("=== (cut)")
                return "\n".join(out)
            out.append(f"{number}: {text}")
    return "\n".join(out)
