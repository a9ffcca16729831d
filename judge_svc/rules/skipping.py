"""Rules on code under test that skips the tests that run it.

- Only what an import shows to be of the runner counts: a project may have a `Skipped` of its own.
- Catching a skip is ordinary, and so is what a file did before the change.
"""

import ast
from collections import Counter
from collections.abc import Iterator

from judge_svc.evidence import ChangeKind, Finding, FindingClass
from judge_svc.paths import PathKind
from judge_svc.pyfile import FunctionNode, PyFile, dotted
from judge_svc.rules.base import VIOLATION, Context, Reporter

_ROOTS = ("unittest", "pytest", "_pytest")
_LEAVES = {
    *("SkipTest", "Skipped", "XFailed", "skip", "xfail", "importorskip"),
    *("skipIf", "skipUnless", "skipif", "expectedFailure", "skipTest"),
}
_BARE = {"SkipTest", "Skipped"}
"""Names that mean the same where they come from an import of everything."""


def skips(context: Context) -> Iterator[Finding]:
    """Source that raises a skip, or marks as skipped or expected to fail."""
    report = Reporter("source-skips", FindingClass.TEST_SKIPPED)
    for delta in context.of_kind(PathKind.SOURCE, PathKind.BUILD):
        if delta.kind is ChangeKind.DELETE or not delta.path.endswith(".py"):
            continue
        before = Counter(text for text, _ in _skips(context.before(delta)))
        after = context.after(delta)
        for text, number in _skips(after):
            if before[text] > 0:
                before[text] -= 1
                continue
            yield report.node(after, delta, number, VIOLATION, "Source skips the tests of it.")


def _skips(file: PyFile) -> list[tuple[str, int]]:
    """Names that skip, written out, each with its line."""
    paths = _imported(file)
    own = {n.name for n in file.nodes if isinstance(n, FunctionNode | ast.ClassDef)}
    caught = {
        id(part)
        for node in file.nodes
        if isinstance(node, ast.ExceptHandler) and node.type is not None
        for part in ast.walk(node.type)
    }
    found: dict[int, str] = {}
    for node in file.nodes:
        if not isinstance(node, ast.Name | ast.Attribute | ast.Call) or id(node) in caught:
            continue
        path = _looked_up(node) if isinstance(node, ast.Call) else dotted(node)
        first, _, rest = path.partition(".")
        full = f"{paths.get(first, first)}.{rest}".strip(".") if first else ""
        parts = full.split(".")
        known = parts[0] in _ROOTS and first in paths and parts[-1] in _LEAVES
        bare = full in _BARE and full not in own and first not in paths
        if known or bare:
            found.setdefault(getattr(node, "lineno", 0), full)
    return [(text, number) for number, text in sorted(found.items())]


def _looked_up(node: ast.Call) -> str:
    """`a.b` of `getattr(a, "b")`."""
    if dotted(node.func) == "getattr" and len(node.args) > 1:
        key = node.args[1]
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            return f"{dotted(node.args[0])}.{key.value}"
    return ""


def _imported(file: PyFile) -> dict[str, str]:
    """Names bound by imports, and by assignments of what imports bound, with their paths."""
    paths: dict[str, str] = {}
    for node in file.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                paths[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                paths[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in file.nodes:
        if isinstance(node, ast.Assign):
            first, _, rest = dotted(node.value).partition(".")
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names if first in paths else ():
                paths.setdefault(name, f"{paths[first]}.{rest}".strip("."))
    return paths
