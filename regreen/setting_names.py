"""Where settings come from beside flags, and that every name there is one that a service reads.

- A table, a key or a variable that nobody reads is refused with its place and the nearest name.
- Keys of other services' tables are theirs to check, as are variables of other services.
"""

import difflib
import os
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InvalidArgument
from regreen.stack.layout import SERVICES

_NEAR = 0.6
_PREFIX = "REGREEN_"


def prefix_of(section: str) -> str:
    """What the environment variables of a service begin with."""
    return f"{_PREFIX}{section.upper()}__"


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A remedy: which of the known names was meant, or what to do where none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=_NEAR)
    return f"did you mean {near[0]}?" if near else otherwise


def read_table(section: str, fields: Collection[str]) -> dict[str, Any]:
    """The table of a service in the file that `REGREEN_CONFIG` names; empty without one.

    Raises:
        InvalidArgument: it cannot be read, or holds a name that nobody reads.
    """
    path = os.environ.get("REGREEN_CONFIG")
    if not path:
        return {}
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument("config", f"{path}: {error}", "give a readable TOML file") from error
    known = _sections(section)
    for name, table in tables.items():
        if name in known and not isinstance(table, dict):
            raise InvalidArgument("config", f"[{name}] in {path} is no table")
        if name in known:
            continue
        if isinstance(table, dict):
            remedy = nearest(name, known, f"tables are {', '.join(known)}")
            raise InvalidArgument(f"[{name}]", f"in {path} is the table of no service", remedy)
        remedy = f"put it below [{section}], or the table of its service"
        raise InvalidArgument(name, f"in {path} stands in no table", remedy)
    own: dict[str, Any] = tables.get(section, {})
    for name in own:
        if name not in fields:
            problem = f"in [{section}] of {path} is no setting of the {section} service"
            raise InvalidArgument(name, problem, nearest(name, fields, _help(section)))
    return own


def check_variables(section: str, fields: Collection[str]) -> None:
    """Refuse environment variables that are meant for a service and that none reads.

    Raises:
        InvalidArgument: names the variable.
    """
    known = _sections(section)
    for name in sorted(os.environ):
        upper = name.upper()
        words = upper.removeprefix(_PREFIX)
        if words == upper:
            continue
        whose, parted, field = words.lower().partition("__")
        if parted and whose not in known:
            remedy = nearest(whose.upper(), map(str.upper, known), f"give {_PREFIX}SERVICE__NAME")
            raise InvalidArgument(name, f"there is no service {whose}", remedy)
        if parted and whose == section and field not in fields:
            like = [f"{prefix_of(section)}{each.upper()}" for each in fields]
            problem = f"is no setting of the {section} service"
            raise InvalidArgument(name, problem, nearest(upper, like, _help(section)))
        own = f"{section}_"
        if not parted and whose.startswith(own) and whose.removeprefix(own) in fields:
            meant = f"{prefix_of(section)}{whose.removeprefix(own).upper()}"
            raise InvalidArgument(name, "is read by nobody", f"did you mean {meant}?")


def place_of(section: str, name: str) -> str:
    """Where the value of a setting that no flag gives comes from; empty for a default."""
    variable = f"{prefix_of(section)}{name.upper()}"
    if given := [each for each in os.environ if each.upper() == variable]:
        return given[0]
    path = os.environ.get("REGREEN_CONFIG")
    if path and name in tomllib.loads(Path(path).read_text(encoding="utf-8")).get(section, {}):
        return f"[{section}] of {path}"
    return ""


def _sections(own: str) -> list[str]:
    """Names of services, that of the asking one included."""
    return sorted({own, *(service.name for service in SERVICES)})


def _help(section: str) -> str:
    return f"see `python -m {section}_svc --help`"
