"""Reads what files of tests declare, without running any: `read_tests.py < LIST`.

- Standard library only, Python 3.7 and newer.
- Standard input is a JSON list of paths; standard output one JSON object, by path: `tests`, the
  names of those that pytest collects whatever is imported (`name` or `Class::name`), `plugins`,
  the modules that `pytest_plugins` names, and `chooses`, whether it may leave tests out.
- Where a name is bound twice, is decorated with what is not known to leave a test a test, or stands
  in a class that pytest may leave out, it is not told: what is told has to be there.
- A file that the parser dies of tells nothing: each is read by a child.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import warnings
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
KEEPING = (
    *("pytest.mark.", "mark.", "unittest.skip", "skip"),
    *("mock.patch", "patch", "unittest.mock.patch"),
)
"""How the names of decorators begin that leave a test where it was."""
CASES = ("TestCase", "IsolatedAsyncioTestCase")
CHOOSING = {
    *("collect_ignore", "collect_ignore_glob", "pytest_ignore_collect", "pytest_deselected"),
    *("pytest_collect_file", "pytest_pycollect_makeitem", "pytest_pycollect_makemodule"),
}
MODIFYING = "pytest_collection_modifyitems"
NOTHING = {"tests": [], "plugins": [], "chooses": True}  # type: dict[str, Any]
"""Of what cannot be read: it may do anything."""
TAKING = frozenset(("remove", "pop", "clear", "pytest_deselected"))


def read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as source:
            tree = ast.parse(source.read())
        found = {"tests": tests(tree.body), "plugins": plugins(tree), "chooses": chooses(tree)}
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return dict(NOTHING)
    return found


def tests(body: list[Any]) -> list[str]:
    cases = frozenset(
        alias.asname or alias.name
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module == "unittest"
        for alias in node.names
        if alias.name in CASES
    )
    found = []
    for node in alone(body):
        if isinstance(node, FUNCTIONS) and is_test(node):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef) and is_class(node, cases):
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
    """The names that a statement binds, deletes or changes in its own scope."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            names.add(inner.id)
        elif isinstance(inner, ast.Attribute) and not isinstance(inner.ctx, ast.Load):
            names.add(dotted(inner).partition(".")[0])
        elif isinstance(inner, (*FUNCTIONS, ast.ClassDef)):
            names.add(inner.name)
        elif isinstance(inner, ast.alias):
            names.add((inner.asname or inner.name).partition(".")[0])
    return names


def is_test(node: Any) -> bool:
    return node.name.startswith("test") and all(map(keeps, node.decorator_list))


def keeps(decorator: Any) -> bool:
    """Whether a decorator is known to leave a test a test of the same name."""
    name = dotted(getattr(decorator, "func", decorator))
    return any(name == one.rstrip(".") or name.startswith(one) for one in KEEPING)


def dotted(node: Any) -> str:
    if isinstance(node, ast.Attribute):
        return dotted(node.value) + "." + node.attr
    return node.id if isinstance(node, ast.Name) else "?"


def is_class(node: Any, cases: frozenset[str]) -> bool:
    """A class that pytest collects by its name, or a test case of the standard library's."""
    names = set().union(*map(bound, node.body))
    bases = {dotted(base) for base in node.bases}
    case = bases & {*cases, *("unittest." + name for name in CASES)}
    made = names & {"__init__", "__new__", "__test__"}
    wanted = (case or node.name.startswith("Test")) and not node.keywords and not made
    return bool(wanted) and all(map(keeps, node.decorator_list))


def plugins(tree: Any) -> list[str]:
    found = []  # type: list[str]
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "pytest_plugins" for t in targets):
            value = getattr(node, "value", None)
            found += filter(None, map(text, ast.walk(value) if value is not None else ()))
    return found


def chooses(tree: Any) -> bool:
    """Whether hooks or lists of a `conftest.py` may leave tests out."""
    names, modifies, takes = set(), False, False
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            takes = takes or node.attr in TAKING
        elif isinstance(node, FUNCTIONS):
            names.add(node.name)
            modifies = modifies or node.name == MODIFYING
        elif isinstance(node, ast.Subscript):
            takes = takes or not isinstance(node.ctx, ast.Load)
    return bool(names & CHOOSING) or (modifies and takes)


def text(node: Any) -> str:
    value = getattr(node, "value", None) if type(node).__name__ == "Constant" else None
    value = getattr(node, "s", None) if type(node).__name__ == "Str" else value  # before 3.8
    return value if isinstance(value, str) else ""


def by_child(path: str) -> Any:
    """What `read` says in a process of its own."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        with os.fdopen(into, "w") as told:
            json.dump(read(path), told)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as told:
        said = told.read()
    os.waitpid(child, 0)
    try:
        return json.loads(said)
    except ValueError:
        return NOTHING


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write(json.dumps({path: by_child(path) for path in json.load(sys.stdin)}))
