"""Tells which functions of the test runner were replaced since it was imported.

- Standard library only, Python 3.7 and newer; made after pytest was imported.
- Looked at many times in a run, and hardly ever is there anything to tell: whether anything changed
  is asked of whole tables at once, what it was only then.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
from operator import attrgetter, is_
from types import FunctionType, ModuleType
from typing import Any

ROOTS = ("_pytest", "pluggy", "unittest")
PYTEST_ITSELF = ("_pytest.config.Config._getini_unknown_type",)
"""What pytest replaces of itself in every run."""
ALIASES = {
    ("unittest.case.TestCase", old): new
    for old, new in (
        ("assert_", "assertTrue"),
        ("assertEquals", "assertEqual"),
        ("assertNotEquals", "assertNotEqual"),
        ("assertAlmostEquals", "assertAlmostEqual"),
        ("assertNotAlmostEquals", "assertNotAlmostEqual"),
        ("assertRegexpMatches", "assertRegex"),
        ("assertNotRegexpMatches", "assertNotRegex"),
        ("assertRaisesRegexp", "assertRaisesRegex"),
    )
}
"""Old names that suites make of the new ones' very functions: they do the same."""
INSIDES = tuple(map(attrgetter, ("__code__", "__defaults__", "__kwdefaults__")))
"""What can be exchanged in a function while it stays the same object."""


class Table:
    """The names of one module or class: all that there were, and the values of those watched."""

    def __init__(self, label: str, owner: Any, hidden: tuple[Any, ...]) -> None:
        self.label, self.owner, self.space, self.hidden = label, owner, vars(owner), hidden
        self.order = order_of(owner)
        self.names = frozenset(self.space)
        self.watched: dict[str, Any] = {}

    def is_untouched(self) -> bool:
        same = all(map(is_, map(self.space.get, self.watched), self.watched.values()))
        return same and self.names.issuperset(self.space) and order_of(self.owner) is self.order

    def replaced(self) -> set[str]:
        """Names whose value is another one now, or that hide what was used before."""
        now = self.space.get
        found = {name for name, value in self.watched.items() if now(name) is not value}
        for name in [name for name in found if (self.label, name) in ALIASES]:
            if now(name) is self.watched.get(ALIASES[self.label, name], ALIASES):
                found.remove(name)
        for name in set(self.space) - self.names:
            below = any(name in vars(other) for other in self.hidden)
            if below and not name.startswith("__annot") and is_code(self.space[name]):
                found.add(name)
        if order_of(self.owner) is not self.order:
            found.add("__bases__")
        return {f"{self.label}.{name}" for name in found}


class Watch:
    """Remembers the functions of modules and of the classes in them."""

    def __init__(self, modules: list[ModuleType]) -> None:
        self.tables: list[Table] = []
        self.functions: dict[FunctionType, str] = {}
        for module in modules:
            table = self.table(module.__name__, module, (builtins,))
            for name, value in list(table.space.items()):
                home = getattr(value, "__module__", None) or type(value).__module__
                if not callable(value) or str(home).split(".")[0] not in ROOTS:
                    continue
                self.add(table, name, value)
                if isinstance(value, type) and home == module.__name__:
                    self.add_class(value)
        self.insides = [(part, {one: part(one) for one in self.functions}) for part in INSIDES]

    def table(self, label: str, owner: Any, hidden: tuple[Any, ...]) -> Table:
        self.tables.append(Table(label, owner, hidden))
        return self.tables[-1]

    def add_class(self, cls: type) -> None:
        table = self.table(f"{cls.__module__}.{cls.__name__}", cls, cls.__mro__[1:])
        for name, value in list(table.space.items()):
            if is_code(value) and not isinstance(value, type):
                self.add(table, name, value)

    def add(self, table: Table, name: str, value: Any) -> None:
        if f"{table.label}.{name}" in PYTEST_ITSELF:
            return
        table.watched[name] = value
        for part in functions(value):
            self.functions.setdefault(part, f"{table.label}.{name}")

    def replaced(self) -> list[str]:
        """Names whose value or code is another one now, or that hide what was used before."""
        found = {
            name for table in self.tables if not table.is_untouched() for name in table.replaced()
        }
        for part, known in self.insides:
            if not all(map(is_, map(part, known), known.values())):
                found |= {self.functions[one] for one in known if part(one) is not known[one]}
        return sorted(found)


def watch_pytest() -> Watch:
    """A watch over the modules that make the results: all of pytest that it loads itself."""
    plugins = getattr(importlib.import_module("_pytest.config"), "default_plugins", ())
    for name in ("unittest.case", *(f"_pytest.{plugin}" for plugin in plugins)):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    roots = ("_pytest", "pytest", "pluggy")
    names = [name for name in sorted(sys.modules) if name.partition(".")[0] in roots]
    found = [sys.modules[name] for name in ("unittest.case", *names)]
    return Watch([module for module in found if isinstance(module, ModuleType)])


def order_of(owner: Any) -> Any:
    """In which order a class and its bases are looked through; None of a module."""
    return type.__dict__["__mro__"].__get__(owner) if isinstance(owner, type) else None


def is_code(value: Any) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


def functions(value: Any) -> list[FunctionType]:
    """The functions in a value, whose code can be exchanged while it stays the same object."""
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    found: list[FunctionType] = []
    while isinstance(value, FunctionType) and value not in found:
        found.append(value)
        value = value.__dict__.get("__wrapped__")
    return found
