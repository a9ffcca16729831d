"""Rules on tests that still stand in the file and are no longer run.

- pytest does not run: generators, plain `async def`, classes with `__init__`, names that were
  deleted or bound to something else, definitions in a block that never runs.
- Only what a change brought about counts.
"""

import ast
from collections.abc import Iterator

from judge_svc.diffstat import Delta
from judge_svc.evidence import ChangeKind, Finding, FindingClass
from judge_svc.paths import PathKind
from judge_svc.pyfile import FunctionNode, PyFile, dotted
from judge_svc.rules.base import VIOLATION, Context, Reporter


def uncollected(context: Context) -> Iterator[Finding]:
    """Tests that pytest no longer collects or runs, though their code is there."""
    report = Reporter("test-uncollected", FindingClass.TEST_DESELECTED)
    for delta in context.of_kind(PathKind.TEST):
        if delta.kind is not ChangeKind.MODIFY or not context.known(delta):
            continue
        before, after = context.before(delta), context.after(delta)
        for name, old in before.tests.items():
            new = after.tests.get(name)
            if new is not None and (why := _not_run(old, new)):
                yield report.node(after, delta, new.lineno, VIOLATION, f"{name} {why}.")
        yield from _unbound(before, after, delta, report)
        yield from _classes(before, after, delta, report)


def _not_run(old: FunctionNode, new: FunctionNode) -> str:
    if isinstance(new, ast.AsyncFunctionDef) and isinstance(old, ast.FunctionDef):
        marks = [dotted(mark) for mark in new.decorator_list]
        return "" if any("asyncio" in m or "anyio" in m for m in marks) else "became async"
    if _yields(new) and not _yields(old):
        return "became a generator"
    return ""


def _yields(function: FunctionNode) -> bool:
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, FunctionNode | ast.Lambda | ast.ClassDef):
            pending.extend(ast.iter_child_nodes(node))
    return False


def _unbound(before: PyFile, after: PyFile, delta: Delta, report: Reporter) -> Iterator[Finding]:
    """`del test_x` and `test_x = None` at the level where the test is defined."""
    old = _bindings(before)
    for name, number in _bindings(after).items():
        if name not in old and name in {test.split(".")[-1] for test in before.tests}:
            why = f"{name} is unbound after its definition."
            yield report.node(after, delta, number, VIOLATION, why)


def _bindings(file: PyFile) -> dict[str, int]:
    """Names that simple statements of the module and its classes delete or assign."""
    found: dict[str, int] = {}
    bodies = [file.tree.body] if file.tree else []
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.ClassDef):
                bodies.append(node.body)
            elif isinstance(node, ast.Delete | ast.Assign):
                for target in node.targets:
                    found.setdefault(dotted(target), node.lineno)
    return found


def _classes(before: PyFile, after: PyFile, delta: Delta, report: Reporter) -> Iterator[Finding]:
    """Test classes that got an `__init__`, or lost the base that made them collected."""
    old = {n.name: n for n in before.nodes if isinstance(n, ast.ClassDef)}
    for node in after.nodes:
        if not isinstance(node, ast.ClassDef) or node.name not in old:
            continue
        had = old[node.name]
        if node.name.startswith("Test") and _has_init(node) and not _has_init(had):
            yield report.node(after, delta, node.lineno, VIOLATION, "Its __init__ hides its tests.")
        if _is_case(had) and not _is_case(node) and not node.name.startswith("Test"):
            yield report.node(after, delta, node.lineno, VIOLATION, "It is no TestCase any more.")


def _has_init(node: ast.ClassDef) -> bool:
    return any(isinstance(n, FunctionNode) and n.name == "__init__" for n in node.body)


def _is_case(node: ast.ClassDef) -> bool:
    return any(dotted(base).endswith("TestCase") for base in node.bases)
