"""`requirements.lock`: the pins of a Python environment as text that agents edit.

- One `name==version` per line, names normalised (PEP 503), sorted; comments and blank lines
  are ignored, except `# python==X.Y`, which is the interpreter's pin.
- Parsing is strict: anything else is an error that names the line and the remedy.
- `format_lock(parse_lock(text))` is a fixed point.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from regreen.rpc.errors import InvalidArgument

MAX_BYTES = 256 * 1024
_PIN = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_PYTHON = re.compile(r"#\s*python==(\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class Lock:
    """The parsed file: pins by normalised name, the interpreter, and the line of each pin."""

    pins: Mapping[str, str]
    python: str = ""
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)

    def with_pin(self, name: str, version: str) -> "Lock":
        """A copy with `name` at `version` (`python` sets the interpreter)."""
        if normalize(name) == "python":
            return replace(self, python=version)
        return replace(self, pins={**self.pins, normalize(name): version})

    def without(self, name: str) -> "Lock":
        """A copy that lacks `name`."""
        return replace(self, pins={k: v for k, v in self.pins.items() if k != normalize(name)})


@dataclass(frozen=True, slots=True)
class LockChange:
    """What one lock has that another had not."""

    installed: Mapping[str, str]
    """New or moved pins, by name."""
    removed: tuple[str, ...]
    python: str = ""
    """The new interpreter if it changed, else empty."""

    @property
    def empty(self) -> bool:
        return not (self.installed or self.removed or self.python)


def normalize(name: str) -> str:
    """PEP 503 normal form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_pin(text: str, field_name: str) -> None:
    """Refuse what is no pin of one release.

    Raises:
        InvalidArgument: it is none.
    """
    if not _PIN.fullmatch(text):
        raise InvalidArgument(field_name, f"{text[:80]!r} is no pin", "write name==version")


def parse_lock(text: str | bytes, field_name: str = "requirements.lock") -> Lock:
    """Parse a lock file.

    Raises:
        InvalidArgument: a line is no pin, a name comes twice, or the file is too long.
    """
    if len(text) > MAX_BYTES:
        raise InvalidArgument(field_name, "is too long", f"keep it under {MAX_BYTES} bytes")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidArgument(field_name, "is not UTF-8", "write plain text") from error
    pins: dict[str, str] = {}
    lines: dict[str, int] = {}
    python = ""
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        where = f"{field_name} line {number}"
        if match := _PYTHON.fullmatch(line):
            if python:
                raise InvalidArgument(where, "pins python twice", "keep one `# python==` line")
            python = match[1]
            lines["python"] = number
            continue
        line = line.partition(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        pin = _PIN.fullmatch(line)
        if pin is None:
            raise InvalidArgument(where, f"{line[:80]!r} is no pin", "write name==version")
        name = normalize(pin[1])
        if name in pins:
            raise InvalidArgument(where, f"pins {name} twice", "keep one line per package")
        pins[name], lines[name] = pin[2], number
    return Lock(pins, python, lines)


def format_lock(lock: Lock) -> str:
    """The text of a lock: the interpreter first, then pins sorted by name."""
    head = [f"# python=={lock.python}"] if lock.python else []
    body = [f"{name}=={version}" for name, version in sorted(lock.pins.items())]
    return "\n".join([*head, *body, ""])


def lock_of(pins: Mapping[str, str] | tuple[str, ...] | list[str], python: str = "") -> Lock:
    """A lock from `name==version` strings or a mapping."""
    if isinstance(pins, Mapping):
        return Lock({normalize(k): v for k, v in pins.items()}, python)
    return replace(parse_lock("\n".join(pins), "pins"), python=python)


def lock_change(before: Lock, after: Lock) -> LockChange:
    """What has to happen to an environment at `before` to bring it to `after`."""
    return LockChange(
        {n: v for n, v in after.pins.items() if before.pins.get(n) != v},
        tuple(sorted(n for n in before.pins if n not in after.pins)),
        after.python if after.python and after.python != before.python else "",
    )
