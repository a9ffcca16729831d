"""Starts what `-S` has put off, once the runner has the key and the pipe.

- Standard library only, Python 3.7 and newer.
- Until then the path holds the interpreter's own library alone, so that no file of the repository
  is run: no `sitecustomize`, no `.pth`, no module in place of one of the library.
- Afterwards everything is as after a start without the option, and says so.
"""

from __future__ import annotations

import os
import sys
from typing import Any

PLACES = "REGREEN_PYTHONPATH"
"""Holds `PYTHONPATH` meanwhile."""


def as_usual() -> None:
    """Do what Python does before it runs a program."""
    if not sys.flags.no_site:
        return
    import site  # before the path has any other place

    places = os.environ.pop(PLACES, "")
    if places:
        os.environ["PYTHONPATH"] = places
        sys.path[:0] = places.split(os.pathsep)
    command: list[str] = getattr(sys, "orig_argv", [])
    if "-S" in command:
        command.remove("-S")  # programs that start themselves anew repeat it
    sys.flags = flags(no_site=0)
    site.main()


def flags(**other: int) -> Any:
    """`sys.flags` with other values, which Python itself does not let anyone make."""
    old = type(sys.flags)
    names = [n for n, value in vars(old).items() if type(value).__name__ == "member_descriptor"]
    values = {name: other.get(name, getattr(sys.flags, name)) for name in names}

    def shown(self: Any) -> str:
        pairs = list(values.items())[: len(self)]
        return "sys.flags({})".format(", ".join(f"{n}={v!r}" for n, v in pairs))

    def of(name: str) -> property:
        return property(lambda _: values[name])

    space: dict[str, Any] = {name: of(name) for name in names}
    space.update(__repr__=shown, __slots__=(), __module__="sys")
    return type("flags", (tuple,), space)(list(values.values())[: len(sys.flags)])
