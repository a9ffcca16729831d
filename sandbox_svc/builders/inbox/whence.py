"""Tells of tests, and of modules of theirs, that came from another file than their own.

- Standard library only, Python 3.7 and newer; made after pytest was imported.
- A package of the code under test may lead to other modules inside it, by its `__path__`.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "__init__.py"
RAW: Any = vars(ModuleType)["__dict__"]


class Whence:
    """pytest hooks that compare where tests are and where they were read from."""

    def __init__(self, origin: Any, send: Any, pytest: Any) -> None:
        self.root, self.is_test = origin.root, origin.is_test
        self.send, self.pytest = send, pytest
        self.seen: set[int] = set()

    def pytest_collection_finish(self, session: Any) -> None:
        found = set()
        for item in session.items:
            module = item.getparent(self.pytest.Module)
            if module is not None and id(module) not in self.seen:
                self.seen.add(id(module))
                found.update(self.of_module(module))
        self.tell(found)

    def pytest_sessionfinish(self) -> None:
        below: dict[str, list[str]] = {}
        for package, dot, name in (name.rpartition(".") for name in list(sys.modules)):
            if dot:
                below.setdefault(package, []).append(name)
        self.tell({t for package, names in below.items() for t in self.inside(package, names)})

    def tell(self, found: set[str]) -> None:
        if found:
            self.send({"t": "replaced", "names": sorted(found)[:50]})

    def of_module(self, collector: Any) -> list[str]:
        """A module of tests that pytest took for a file's, and that is another's."""
        path = os.path.realpath(str(getattr(collector, "path", None) or collector.fspath))
        origin = origin_of(getattr(collector, "obj", None))
        ours = path.startswith(self.root) and path.endswith(".py")
        return [f"{path} by {origin}"] if ours and origin and origin != path else []

    def inside(self, package: str, names: list[str]) -> list[str]:
        """Modules of a package in whose folder a file of the State's should be in their place."""
        home = origin_of(sys.modules.get(package))
        if os.path.basename(home) != PACKAGE or not home.startswith(self.root):
            return []
        found = []
        for name in names:
            start = os.path.join(os.path.dirname(home), name)
            own, origin = [start + ".py", os.path.join(start, PACKAGE)], ""
            held = [path for path in own if self.is_test(path) and os.path.isfile(path)]
            if held:
                origin = origin_of(sys.modules.get(f"{package}.{name}"))
            if origin and origin not in own:
                found += [f"{path} by {origin}" for path in held]
        return found


def origin_of(module: Any) -> str:
    """The file that the import system read a module from; empty where it was none.

    Neither the module nor what it holds is asked by its own means.
    """
    if not issubclass(type(module), ModuleType):  # what only says that it is one holds nothing
        return ""
    spec = RAW.__get__(module).get("__spec__")
    origin = spec.__dict__.get("origin") if type(spec) is ModuleSpec else None
    return os.path.realpath(origin) if type(origin) is str and os.path.isabs(origin) else ""
