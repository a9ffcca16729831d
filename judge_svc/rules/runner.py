"""Rules on code that reaches into the test runner, builtins or the import system.

- What is stored through a value that is known to be a part of the runner, through a frame or a walk
  over all objects, or as the code of a function that is not the file's own, is a violation; through
  a value that cannot be told it is suspect, as is the bare name of the runner in source.
- What a file did before the change is never held against it.
- Changing what only a project's own name or an import of another package leads to is ordinary.
- A file that cannot be read as a tree is read as text, and then its words count.
"""

import ast
import builtins
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from judge_svc.diffstat import Delta
from judge_svc.evidence import ChangeKind, Finding, FindingClass, Severity
from judge_svc.paths import PathKind
from judge_svc.pyfile import PyFile, source_of
from judge_svc.reach import RUNNER_PARTS, Reach, Scope, names_runner, reaching
from judge_svc.rules.base import SUSPECT, VIOLATION, Context, Reporter

Store = tuple[str, int, Severity]
"""Its text, its line, how grave it is."""
_SOURCE = (PathKind.SOURCE, PathKind.BUILD)
_CHANGERS = {
    *("register", "unregister", "set_blocked", "update", "clear", "setdefault"),
    *("__setitem__", "__delitem__", "__setattr__", "__delattr__"),
}
_TABLE_CHANGERS = {"pop", "setdefault", "update", "clear", "__setitem__", "__delitem__"}
_HOOKS = ("sys.meta_path", "sys.path_hooks")
_INTERNALS = re.compile(r"\b(?:_pytest|pluggy)\b")
_REACHING = re.compile(
    r"\bsys\.modules\b|\bimport_module\b|\b__import__\b|\bgc\.get_|\b_getframe\b|\bf_globals\b"
)
_WALKERS = re.compile(r"\bget_(?:objects|referrers|referents)\b")
_CHANGING = (
    *(ast.Call, ast.Assign, ast.Delete, ast.AugAssign, ast.AnnAssign),
    *(ast.For, ast.AsyncFor, ast.withitem),
)
_BUILTINS = frozenset(dir(builtins))


def patches(context: Context) -> Iterator[Finding]:
    """Stores into the runner, builtins or the import system, by whatever way they are reached."""
    report = Reporter("runner-patched", FindingClass.HARNESS_TAMPERED)
    for delta in context.python():
        if delta.kind is ChangeKind.DELETE:
            continue
        after = context.after(delta)
        deep = VIOLATION
        try:
            found = _stores(context, delta, after)
            deep = SUSPECT
            before = Counter(text for text, _, _ in _stores(context, delta, context.before(delta)))
        except RecursionError:
            yield report.path(delta, deep, "The file nests too deeply to be read.")
            continue
        for text, number, severity in found:
            if before[text] > 0:
                before[text] -= 1
                continue
            why = "Code patches the test runner, builtins or the import system."
            yield report.node(after, delta, number, severity, why)
        if after.tree is None:
            yield from _unread(context, delta, report)


def _unread(context: Context, delta: Delta, report: Reporter) -> Iterator[Finding]:
    if context.kind(delta) not in _SOURCE:
        return
    for line in delta.added:
        if _INTERNALS.search(line.text):
            yield report.at(delta, line, VIOLATION, "Unreadable code names the test runner.")
        elif _REACHING.search(line.text):
            yield report.at(delta, line, SUSPECT, "Unreadable code reaches for modules.")


def _stores(context: Context, delta: Delta, file: PyFile) -> list[Store]:
    analysis = reaching(file, _own_modules(context))
    if analysis is None:
        return []
    source = context.kind(delta) not in (PathKind.TEST, PathKind.CONFTEST)
    found: list[Store] = []
    for scope, nodes in analysis.scopes():
        for node in nodes:
            if isinstance(node, _CHANGING) and (severity := _severity(scope, node, source)):
                place = node.context_expr if isinstance(node, ast.withitem) else node
                found.append((source_of(node), getattr(place, "lineno", 0), severity))
    return found


def _own_modules(context: Context) -> frozenset[str]:
    """Top-level modules of the project, as far as its changed files show them."""
    names = set()
    for delta in context.python():
        parts = PurePosixPath(delta.path).parts
        top = parts[1] if parts[0] in ("src", "lib", "python") and len(parts) > 1 else parts[0]
        names.add(top.removesuffix(".py"))
    return frozenset(names)


def _severity(scope: Scope, node: ast.AST, source: bool) -> Severity | None:
    """How grave it is what one node changes; None if it changes nothing that matters."""
    if isinstance(node, ast.Call):
        return _called(scope, node, source)
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    else:
        return None
    flat = [leaf for target in targets for leaf in _leaves(target)]
    return _gravest([_stored(scope, leaf, source) for leaf in flat])


def _leaves(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        return [leaf for item in target.elts for leaf in _leaves(item)]
    return _leaves(target.value) if isinstance(target, ast.Starred) else [target]


def _gravest(found: list[Severity | None]) -> Severity | None:
    return VIOLATION if VIOLATION in found else SUSPECT if SUSPECT in found else None


def _stored(scope: Scope, target: ast.expr, source: bool) -> Severity | None:
    """How grave an assignment to `target`, or its deletion, is."""
    if isinstance(target, ast.Attribute):
        if scope.path(target) in (*_HOOKS, "sys.modules"):
            return VIOLATION
        return _changed(scope, target.value, target.attr, source)
    if isinstance(target, ast.Subscript):
        if scope.modules(target.value):
            return _replaced(scope, target.slice, source)
        return _changed(scope, target.value, scope.text(target.slice), source)
    return None


def _changed(scope: Scope, owner: ast.AST, name: str | None, source: bool) -> Severity | None:
    """How grave it is to change `name` of what `owner` is; None is a name that is not told."""
    level = scope.of(owner)
    if name == "__code__" and source:
        own = isinstance(owner, ast.Name) and owner.id in scope.file.functions
        return SUSPECT if own and level is Reach.NOTHING else VIOLATION
    if level is Reach.RUNNER:
        whole = scope.path(owner).removesuffix(".__dict__") in ("builtins", "__builtins__")
        new = whole and name is not None and name not in _BUILTINS
        return SUSPECT if new else VIOLATION
    if not source or level is Reach.NOTHING:
        return None
    part = level is Reach.UNKNOWN and name in RUNNER_PARTS
    return VIOLATION if part or level >= Reach.FRAME else SUSPECT


def _replaced(scope: Scope, key: ast.AST, source: bool) -> Severity | None:
    """How grave it is to put something else, or nothing, in a place of `sys.modules`."""
    level = scope.key(key)
    if level is Reach.RUNNER:
        return VIOLATION
    return SUSPECT if source and level is Reach.UNKNOWN else None


def _called(scope: Scope, node: ast.Call, source: bool) -> Severity | None:
    path, first = scope.path(node.func), node.args[0] if node.args else None
    if path.startswith(tuple(f"{hook}." for hook in _HOOKS)):
        return VIOLATION
    name = scope.text(node.args[1]) if len(node.args) > 1 else None
    if path in ("setattr", "delattr") and first is not None:
        return _changed(scope, first, name, source)
    if not isinstance(node.func, ast.Attribute):
        by_name = path.split(".")[-1] == "patch" and first is not None and _runner(scope, first)
        return VIOLATION if by_name else None
    owner, method = node.func.value, node.func.attr
    if scope.modules(owner) and method in _TABLE_CHANGERS:
        keys = [first] if method not in ("update", "clear") else _keys(node)
        if not keys or first is None:
            return VIOLATION
        return _gravest([_replaced(scope, key, source) for key in keys if key is not None])
    if method in ("__setattr__", "__delattr__", "setattr", "delattr") and first is not None:
        told = name if len(node.args) > 1 else None
        found = [_changed(scope, first, told, source), _changed(scope, owner, None, source)]
        return VIOLATION if _runner(scope, first) else _gravest(found)
    if method in ("patch", "object", "dict", "multiple") and "patch" in source_of(node.func):
        patched = first is not None and (_runner(scope, first) or scope.of(first) is Reach.RUNNER)
        return VIOLATION if patched else None
    return _changed(scope, owner, None, source) if method in _CHANGERS else None


def _keys(node: ast.Call) -> list[ast.expr | None]:
    tables = [arg for arg in node.args if isinstance(arg, ast.Dict)]
    return [key for table in tables for key in table.keys]


def _runner(scope: Scope, node: ast.AST) -> bool:
    text = scope.text(node)
    return text is not None and names_runner(text)


def named(context: Context) -> Iterator[Finding]:
    """Source that names the test runner, and source that looks through all objects."""
    report = Reporter("runner-named", FindingClass.HARNESS_TAMPERED)
    for delta in context.of_kind(*_SOURCE):
        if delta.kind is ChangeKind.DELETE:
            continue
        try:
            before = Counter(text for text, _ in _names(context.before(delta)))
            found = _names(context.after(delta))
        except RecursionError:
            continue  # `patches` has said so
        for text, number in found:
            if before[text] > 0:
                before[text] -= 1
                continue
            why = "Source names the test runner."
            yield report.node(context.after(delta), delta, number, SUSPECT, why)
        old = "\n".join(line.text for line in delta.removed)
        for line in delta.added:
            if _WALKERS.search(line.text) and not _WALKERS.search(old):
                yield report.at(delta, line, SUSPECT, "Code looks through all objects.")


def _names(file: PyFile) -> list[tuple[str, int]]:
    """Constant texts and imports that name the runner, each with its line."""
    analysis = reaching(file, ())
    if analysis is None:
        return []
    found: list[tuple[str, int]] = []
    for scope, nodes in analysis.scopes():
        inside: set[int] = set()
        for node in nodes:
            texts: list[str] = []
            if isinstance(node, ast.Import):
                texts = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                texts = [node.module or ""]
            elif isinstance(node, ast.expr) and id(node) not in inside:
                text = None if isinstance(node, ast.Name) else scope.text(node)
                if text is not None:
                    inside |= {id(part) for part in ast.walk(node)}
                    texts = [text]
            found += [
                (text, getattr(node, "lineno", 0))
                for text in texts
                if names_runner(text) or _INTERNALS.search(text)
            ]
    return found
