"""Globs over relative paths, matched in time that their author cannot drive up.

- `**` as a whole part crosses directories, `*` and `?` do not; a glob without a slash matches the
  last part of a path anywhere, as in ignore files.
- A path costs one step over the reach of its directory, which is kept; a name is compared with
  each part of the glob once. Nothing backtracks over more than one name.
"""

import re

from regreen.rpc.errors import InvalidArgument

MAX_CHARS = 256
_KEPT_CHARS = 16 << 20


class Glob:
    """One glob; use it for the paths of one listing, because it remembers what it has seen."""

    def __init__(self, glob: str, field: str = "glob") -> None:
        """Read a glob.

        Raises:
            InvalidArgument: it is too long.
        """
        if len(glob) > MAX_CHARS:
            raise InvalidArgument(field, f"has {len(glob)} characters", f"at most {MAX_CHARS}")
        wanted = glob.split("/") if "/" in glob else ["**", glob]
        parts = [p for n, p in enumerate(wanted) if p != "**" or wanted[n - 1 : n] != ["**"]]
        self._parts = [None if part == "**" else _name_pattern(part) for part in parts]
        self._end = 1 << len(parts)
        self._anything = parts[-1] == "**"
        self._reached: dict[str, int] = {"": self._skip(1)}
        self._kept_chars = 0
        self._names: dict[str, int] = {}

    def matches(self, path: str) -> bool:
        """Whether the whole of a relative path matches."""
        return bool(self._reach(path) & self._end)

    def _reach(self, path: str) -> int:
        """Which prefixes of the glob match `path`, as bits; bit 0 is the empty prefix."""
        missing = []
        while path not in self._reached:
            path, _, name = path.rpartition("/")
            missing.append((path, name))
        reached = self._reached[path]
        for parent, name in reversed(missing):
            reached = self._step(reached, name)
            whole = f"{parent}/{name}" if parent else name
            self._reached[whole] = reached
            self._kept_chars += len(whole)
        if self._kept_chars > _KEPT_CHARS:
            self._reached, self._kept_chars = {"": self._skip(1)}, 0
        return reached

    def _step(self, reached: int, name: str) -> int:
        if name not in self._names:
            self._names[name] = sum(
                1 << number
                for number, pattern in enumerate(self._parts)
                if pattern is not None and pattern.fullmatch(name)
            )
        stay = sum(1 << n for n, pattern in enumerate(self._parts) if pattern is None) & reached
        after = (reached & self._names[name]) << 1
        return self._skip(after | stay | (stay << 1 if self._anything else 0) & self._end)

    def _skip(self, reached: int) -> int:
        """Let each `**` but the last one also match no directory at all."""
        for number, pattern in enumerate(self._parts[:-1]):
            if pattern is None and reached >> number & 1:
                reached |= 1 << number + 1
        return reached


def _name_pattern(part: str) -> re.Pattern[str]:
    """A pattern for one name; each `*` takes the first fit and never gives it back."""
    first, *rest = re.split(r"\*+", part)
    out = _literal(first)
    for piece in rest[:-1]:
        out += f"(?>.*?{_literal(piece)})"
    if rest:
        out += f".*{_literal(rest[-1])}"
    return re.compile(out, re.DOTALL)


def _literal(text: str) -> str:
    return "".join("." if char == "?" else re.escape(char) for char in text)
