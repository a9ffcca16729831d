"""Reads what files of tests declare, without running any: `read_tests.py < LIST`.

- Standard library only, Python 3.7 and newer.
- Standard input is a JSON list of paths; standard output one JSON object, by path: `tests`, the
  names of those that pytest collects whatever is imported (`name` or `Class::name`), `plugins`,
  the modules that `pytest_plugins` names, and `chooses`, whether it may leave tests out.
- Where a name is bound twice, decorated as no test, or in a class that pytest may leave out, it is
  not told: what is told has to be there.
"""

from __future__ import annotations

import ast
import json
import sys
import warnings
from typing import Any

NO_TEST = ("fixture", "nottest", "overload")
CHOOSING = (b"ignore", b"deselect")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def read(path: str) -> dict[str, Any]:
    found = {"tests": [], "plugins": [], "chooses": False}  # type: dict[str, Any]
    try:
        with open(path, "rb") as source:
            content = source.read()
        found["chooses"] = any(word in content for word in CHOOSING)
        body = ast.parse(content).body
        found.update(tests=tests(body), plugins=plugins(body))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    return found


def tests(body: list[Any]) -> list[str]:
    found = []
    for node in alone(body):
        if isinstance(node, FUNCTIONS) and is_test(node):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef) and is_class(node):
            inside = [n for n in alone(node.body) if isinstance(n, FUNCTIONS) and is_test(n)]
            found += [node.name + "::" + n.name for n in inside]
    return found


def alone(body: list[Any]) -> list[Any]:
    """Functions and classes whose names are bound once in a body."""
    times = {}  # type: dict[str, int]
    for node in body:
        for name in bound(node):
            times[name] = times.get(name, 0) + 1
    named = [n for n in body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
    return [node for node in named if times[node.name] == 1]


def bound(node: Any) -> set[str]:
    """The names that a statement binds or deletes in its own scope."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            names.add(inner.id)
        elif isinstance(inner, (*FUNCTIONS, ast.ClassDef)):
            names.add(inner.name)
        elif isinstance(inner, ast.alias):
            names.add((inner.asname or inner.name).partition(".")[0])
    return names


def is_test(node: Any) -> bool:
    return node.name.startswith("test") and not any(map(is_no_test, node.decorator_list))


def is_no_test(decorator: Any) -> bool:
    named = [n.id for n in ast.walk(decorator) if isinstance(n, ast.Name)]
    named += [n.attr for n in ast.walk(decorator) if isinstance(n, ast.Attribute)]
    return any(word in name for name in named for word in NO_TEST)


def is_class(node: Any) -> bool:
    """A class that pytest collects by its name, or a test case."""
    names = set().union(*map(bound, node.body))
    bases = [getattr(base, "attr", getattr(base, "id", "")) for base in node.bases]
    case = any(str(base).endswith("TestCase") for base in bases)
    made = names & {"__init__", "__new__", "__test__"}
    wanted = (case or node.name.startswith("Test")) and not node.keywords and not made
    return wanted and not any(map(is_no_test, node.decorator_list))


def plugins(body: list[Any]) -> list[str]:
    found = []  # type: list[str]
    for node in body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "pytest_plugins" for t in targets):
            value = getattr(node, "value", None)
            found += filter(None, map(text, ast.walk(value) if value is not None else ()))
    return found


def text(node: Any) -> str:
    value = getattr(node, "value", None) if type(node).__name__ == "Constant" else None
    value = getattr(node, "s", None) if type(node).__name__ == "Str" else value  # before 3.8
    return value if isinstance(value, str) else ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write(json.dumps({path: read(path) for path in json.load(sys.stdin)}))
