"""Unified diffs as text: turned around, and checked for being one.

- Turning a diff around twice gives it back, but for the order of lines inside a change.
- A line belongs to a hunk by the counts of the hunk's head, never by how it begins alone.
"""

import re
from collections.abc import Sequence

from regreen.rpc.errors import InvalidArgument

_HUNK = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@(.*)", re.DOTALL)
_BEGINS = ("--- ", "diff --git ", "GIT binary patch", "Binary files ")
_SWAPPED = {"new file mode": "deleted file mode", "deleted file mode": "new file mode"}
_PAIRS = (("rename from ", "rename to "), ("copy from ", "copy to "), ("old mode ", "new mode "))


def reversed_diff(text: str, where: str = "patch") -> str:
    """The diff that undoes a diff.

    Raises:
        InvalidArgument: it is no unified diff, or holds binary files.
    """
    out: list[str] = []
    head: list[str] = []
    lines = text.split("\n")
    place = 0
    if not any(line.startswith(_BEGINS) for line in lines):
        raise InvalidArgument(where, "is no unified diff", "give the output of git diff")
    while place < len(lines):
        line = lines[place]
        place += 1
        if found := _HUNK.fullmatch(line):
            turned, place = _turned_hunk(found, lines, place, where)
            out += [*_turned_head(head), *turned]
            head = []
        elif line.startswith(("GIT binary patch", "Binary files ")):
            raise InvalidArgument(where, "holds binary files", "give a diff of text")
        else:
            head.append(line)
    return "\n".join([*out, *_turned_head(head)])


def _turned_head(head: list[str]) -> list[str]:
    """Header lines of a file: names, modes and digests change sides."""
    out: list[str] = []
    held: dict[str, str] = {}
    for line in head:
        pair = next((p for p in _PAIRS if line.startswith(p)), None)
        if line.startswith("--- "):
            held["---"] = line
        elif line.startswith("+++ ") and "---" in held:
            out += [f"--- {_side(line, 'a')}", f"+++ {_side(held.pop('---'), 'b')}"]
        elif pair is not None and line.startswith(pair[0]):
            held[pair[0]] = line[len(pair[0]) :]
        elif pair is not None:
            value = line[len(pair[1]) :]
            out += [f"{pair[0]}{value}", f"{pair[1]}{held.pop(pair[0], value)}"]
        elif match := re.fullmatch(r"diff --git a/(.*) b/(.*)", line):
            out.append(f"diff --git a/{match[2]} b/{match[1]}")
        elif match := re.fullmatch(r"index ([0-9a-f]+)\.\.([0-9a-f]+)(.*)", line):
            out.append(f"index {match[2]}..{match[1]}{match[3]}")
        else:
            found = next((k for k in _SWAPPED if line.startswith(k)), None)
            out.append(_SWAPPED[found] + line[len(found) :] if found else line)
    return out


def _side(line: str, letter: str) -> str:
    name = line[4:]
    return name if name.startswith("/dev/null") else re.sub(r"^[ab]/", f"{letter}/", name)


def _turned_hunk(
    found: re.Match[str], lines: Sequence[str], place: int, where: str
) -> tuple[list[str], int]:
    """A hunk turned around, and the place of the line after it."""
    before, after = (int(found[n]) if found[n] is not None else 1 for n in (2, 4))
    old, new = (found[n] + ("" if found[n + 1] is None else f",{found[n + 1]}") for n in (1, 3))
    out = [f"@@ -{new} +{old} @@{found[5]}"]
    added: list[str] = []
    removed: list[str] = []
    last = out
    while before > 0 or after > 0 or (place < len(lines) and lines[place].startswith("\\")):
        if place == len(lines):
            raise InvalidArgument(where, f"ends inside the hunk {out[0]!r}", "give the whole diff")
        line = lines[place]
        place += 1
        kind = line[:1] or " "
        if kind == "\\":
            last.append(line)
            continue
        if kind not in "+- ":
            raise InvalidArgument(where, f"has {line[:60]!r} in a hunk", "give a unified diff")
        before -= kind != "+"
        after -= kind != "-"
        if kind == " ":
            out += [*removed, *added, line]
            removed, added, last = [], [], out
            continue
        last = removed if kind == "+" else added
        last.append(("-" if kind == "+" else "+") + line[1:])
    return [*out, *removed, *added], place
