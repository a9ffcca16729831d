"""Looks at modules that are loaded: where they come from, and what they consist of.

- Standard library only, Python 3.7 and newer.
- No module is asked by its own means: one that loads others when it is touched loads nothing.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

SHIFTING = frozenset({"sys", "warnings", "pdb", "__main__", "_warnings"})
"""Modules that the test runner itself changes."""
STANDARD = frozenset(getattr(sys, "stdlib_module_names", ()))
HOOKS = frozenset({"excepthook", "__warningregistry__", "__builtins__"})
RAW: Any = vars(ModuleType)["__dict__"]


def shape(modules: dict[str, Any]) -> Any:
    """The identity of everything in modules and in the classes that they define."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in modules.items():
        if name in SHIFTING or not is_module(module):
            continue
        for key, value in list(space(module).items()):
            if key in HOOKS:
                continue
            found[name, key] = identity(value)
            if isinstance(value, type) and value.__module__ == name:
                for inner, thing in list(vars(value).items()):
                    if not inner.startswith("__") and (callable(thing) or inner[0] != "_"):
                        found[name, key + "." + inner] = id(thing)
    return found


def identity(value: Any) -> Any:
    """What tells a value from others: plain ones by what they are, the rest by which they are."""
    plain = value is None or isinstance(value, (bool, int, float, str, bytes, tuple))
    return repr(value)[:200] if plain else id(value)


def space(module: Any) -> dict[str, Any]:
    """What a module holds; it cannot answer by itself, which could load others."""
    return RAW.__get__(module) if is_module(module) else {}


def is_module(thing: Any) -> bool:
    """Whether it is one, and does not only say so, as proxies of modules do."""
    return issubclass(type(thing), ModuleType)


def places(module: Any) -> list[str]:
    """Where the files of a module are."""
    held = space(module)
    try:
        found = [held.get("__file__"), *(held.get("__path__") or ())]
        return [os.path.realpath(str(place)) + os.sep for place in found if place]
    except Exception:  # noqa: BLE001 - a module may hold anything
        return ["unknown"]


def inside(module: Any, root: str) -> bool:
    """Whether a module comes from the repository, in part or whole."""
    return any(place.startswith(root) for place in places(module))


def importing(name: str) -> bool:
    """Whether the import of a module has begun and not ended."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def is_standard(module: Any) -> bool:
    """Whether a module belongs to the interpreter."""
    place = str(getattr(module, "__file__", None) or os.__file__)
    return place.startswith(os.path.dirname(os.__file__)) and "site-packages" not in place
