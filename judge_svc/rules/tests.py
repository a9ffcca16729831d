"""Rules on test files: deleted, skipped, renamed away, weakened tests.

- A changed test is no tampering by itself: only fewer or weaker tests are.
- New test files cannot be tampering here: they take nothing away.
- Where a side does not parse, added and removed lines are compared as text.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator

from judge_svc.diffstat import Delta
from judge_svc.evidence import ChangeKind, Finding, FindingClass
from judge_svc.paths import PathKind
from judge_svc.pyfile import FunctionNode, PyFile, body_of, dotted, find, reachable, source_of
from judge_svc.rules.base import SUSPECT, VIOLATION, Context, Reporter

_DEF = re.compile(r"\s*(?:async\s+)?def\s+(test\w*)\s*\(")
_SKIP_NAME = re.compile(
    r"(?:.*\.)?(?:skip|skipif|xfail|importorskip|skipIf|skipUnless|skipTest|expectedFailure)\Z"
)
_SKIP_TEXT = re.compile(
    r"mark\.(?:skip|skipif|xfail)|pytest\.(?:skip|xfail|importorskip|exit)\s*\(|unittest\.skip"
    r"|SkipTest|skipTest|expectedFailure|__test__\s*=\s*False|@skip|collect_ignore"
)
_CHECKS = re.compile(
    r"(?:.*\.)?(?:assert\w+|raises|warns|deprecated_call|fail|assert_\w+|approx_equal)\Z"
)
_TOLERANCES = {"rel", "abs", "atol", "rtol", "places", "delta", "decimal", "rel_tol", "abs_tol"}
_TIGHTER_IS_MORE = {"places", "decimal"}


def deleted(context: Context) -> Iterator[Finding]:
    """Test files, tests and parameter sets that are gone and were not moved."""
    report = Reporter("test-deleted", FindingClass.TEST_DELETED)
    kept = _tests_after(context)
    for delta in context.of_kind(PathKind.TEST):
        after = {} if delta.after is None else context.after(delta).tests
        before = context.before(delta)
        names = set(before.tests) or set(_text_tests(delta))
        if delta.kind is ChangeKind.DELETE:
            gone = {n.split(".")[-1] for n in names} - set(kept)
            if gone:
                yield report.path(delta, VIOLATION, "A test file was deleted.")
            elif not names:
                blind = before.tree is None
                severity = VIOLATION if blind else SUSPECT
                yield report.path(delta, severity, "A file beside the tests was deleted.")
            continue
        if not context.known(delta):
            yield from _deleted_text(delta, report, kept)
            continue
        came = [node for name, node in after.items() if name not in before.tests]
        for name, node in before.tests.items():
            if name in after:
                yield from _fewer_parameters(context, delta, node, after[name], report)
            elif not _moved(name, node, came, kept, context.after(delta)):
                yield report.node(
                    before, delta, node.lineno, VIOLATION, f"Test {name} was deleted."
                )


def _tests_after(context: Context) -> Counter[str]:
    """Names of tests that changed files define now and did not define before."""
    names: Counter[str] = Counter()
    for delta in context.of_kind(PathKind.TEST):
        if delta.after is not None:
            names.update(n.split(".")[-1] for n in context.after(delta).tests)
            if delta.kind is not ChangeKind.ADD:
                names.subtract(n.split(".")[-1] for n in context.before(delta).tests)
    return +names


def _moved(
    name: str, node: FunctionNode, came: list[FunctionNode], kept: Counter[str], after: PyFile
) -> bool:
    """Whether a vanished test lives on: elsewhere, under a new test name, or renamed away."""
    leaf = name.split(".")[-1]
    body = [source_of(s) for s in body_of(node)]
    if kept[leaf] > 0 or any(_similar(body, [source_of(s) for s in body_of(n)]) for n in came):
        return True
    return _renamed(node, after) is not None


def _similar(one: list[str], other: list[str]) -> bool:
    shared = sum((Counter(one) & Counter(other)).values())
    return bool(one) and shared * 2 >= max(len(one), len(other))


def _renamed(node: FunctionNode, after: PyFile) -> FunctionNode | None:
    """A function with the same body whose name is no longer a test's."""
    body = [source_of(s) for s in body_of(node)]
    for name, other in after.functions.items():
        leaf = name.split(".")[-1]
        hidden = not leaf.startswith("test") or leaf not in {n.split(".")[-1] for n in after.tests}
        if hidden and _similar(body, [source_of(s) for s in body_of(other)]):
            return other
    return None


def _text_tests(delta: Delta) -> list[str]:
    text = delta.before or "\n".join(line.text for line in delta.removed)
    return [m[1] for line in text.split("\n") if (m := _DEF.match(line))]


def _deleted_text(delta: Delta, report: Reporter, kept: Counter[str]) -> Iterator[Finding]:
    came = {m[1] for line in delta.added if (m := _DEF.match(line.text))}
    for line in delta.removed:
        match = _DEF.match(line.text)
        if match and match[1] not in came and not kept[match[1]]:
            yield report.at(delta, line, VIOLATION, f"Test {match[1]} was deleted.")


def _fewer_parameters(
    context: Context, delta: Delta, old: FunctionNode, new: FunctionNode, report: Reporter
) -> Iterator[Finding]:
    before, after = _parameter_sets(old), _parameter_sets(new)
    if before and after is not None and after < before:
        why = f"Test {old.name} lost parameter sets ({before} before, {after} after)."
        yield report.node(context.before(delta), delta, old.lineno, VIOLATION, why)


def _parameter_sets(node: FunctionNode) -> int | None:
    """Product of the literal parametrize lists; None when one is computed."""
    total = 1
    for mark in node.decorator_list:
        if not (isinstance(mark, ast.Call) and dotted(mark).endswith("parametrize")):
            continue
        values = mark.args[1] if len(mark.args) > 1 else None
        if not isinstance(values, ast.List | ast.Tuple):
            return None
        total *= len(values.elts)
    return total


def renamed(context: Context) -> Iterator[Finding]:
    """Tests and test classes that were renamed so that nothing collects them."""
    report = Reporter("test-renamed", FindingClass.TEST_DESELECTED)
    for delta in context.of_kind(PathKind.TEST):
        if delta.kind is not ChangeKind.MODIFY or not context.known(delta):
            continue
        before, after = context.before(delta), context.after(delta)
        for name, node in before.tests.items():
            other = _renamed(node, after) if name not in after.tests else None
            if other is not None and not other.name.startswith("test"):
                why = f"Test {name} was renamed to {other.name}, which is not collected."
                yield report.node(after, delta, other.lineno, VIOLATION, why)
        lost = {n.split(".")[0] for n in before.tests if n.startswith("Test") and "." in n}
        now = {n.split(".")[0] for n in after.tests if "." in n}
        for hidden in find(after, lambda n: isinstance(n, ast.ClassDef)):
            if isinstance(hidden, ast.ClassDef) and _hides(hidden, lost - now):
                why = "A test class was renamed so that it is not collected."
                yield report.node(after, delta, hidden.lineno, VIOLATION, why)


def _hides(node: ast.ClassDef, lost: set[str]) -> bool:
    return not node.name.startswith("Test") and any(
        name in node.name or node.name.endswith(name[4:]) for name in lost if len(name) > 4
    )


def skipped(context: Context) -> Iterator[Finding]:
    """Skip and expected-failure markers that were added, and conditions made always true."""
    report = Reporter("test-skipped", FindingClass.TEST_SKIPPED)
    for delta in context.of_kind(PathKind.TEST, PathKind.CONFTEST):
        if delta.kind is ChangeKind.DELETE:
            continue
        if delta.kind is ChangeKind.ADD and context.kind(delta) is PathKind.TEST:
            continue
        if not context.known(delta):
            removed = sum(bool(_SKIP_TEXT.search(line.text)) for line in delta.removed)
            hits = [line for line in delta.added if _SKIP_TEXT.search(line.text)]
            for line in hits[removed:]:
                yield report.at(delta, line, VIOLATION, "A skip marker was added.")
            continue
        yield from _skips(context, delta, report)


def _skips(context: Context, delta: Delta, report: Reporter) -> Iterator[Finding]:
    before = Counter(text for text, _ in _markers(context.before(delta)))
    total_before = sum(before.values())
    found = _markers(context.after(delta))
    extra = len(found) - total_before
    fresh = []
    for text, number in found:
        if before[text] > 0:
            before[text] -= 1
        else:
            fresh.append((text, number))
    for index, (text, number) in enumerate(fresh):
        always = re.search(r"\b(?:skipif|skipIf)\((?:True|1|not False)\b", text) is not None
        severity = VIOLATION if index < extra or always else SUSPECT
        why = "A skip marker was added." if severity is VIOLATION else "A skip marker was changed."
        yield report.node(context.after(delta), delta, number, severity, why)


def _markers(file: PyFile) -> list[tuple[str, int]]:
    """Text and line of everything that skips or hides tests."""
    found = []
    inside: set[int] = set()
    for node in find(
        file,
        lambda n: isinstance(n, ast.Call | ast.Attribute | ast.Name | ast.Assign | ast.Raise),
    ):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Assign):
            target = dotted(node.targets[0])
            false = isinstance(node.value, ast.Constant) and not node.value.value
            if target.endswith("__test__") and false:
                found.append((source_of(node), node.lineno))
            continue
        name = dotted(node)
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = dotted(node.exc)
            if not name.endswith("SkipTest"):
                continue
        elif not _SKIP_NAME.match(name) or (
            isinstance(node, ast.Name)
            and name not in ("skip", "skipif", "xfail", "expectedFailure")
        ):
            continue
        inside |= {id(n) for n in ast.walk(node)}
        found.append((source_of(node), getattr(node, "lineno", 0)))
    return found


def weakened(context: Context) -> Iterator[Finding]:
    """Assertions removed, made trivially true, made unreachable, or loosened."""
    report = Reporter("test-weakened", FindingClass.TEST_WEAKENED)
    for delta in context.of_kind(PathKind.TEST):
        if delta.kind is not ChangeKind.MODIFY:
            continue
        if not context.known(delta):
            yield from _weakened_text(delta, report)
            continue
        before, after = context.before(delta), context.after(delta)
        for name, old in before.functions.items():
            new = after.functions.get(name)
            if new is None or source_of(old) == source_of(new):
                continue
            had, has = _checks(old), _checks(new)
            if len(has) < len(had):
                gone = _lost(had, has)
                why = f"{name} checks less ({len(had)} assertions before, {len(has)} after)."
                yield report.node(before, delta, gone, VIOLATION, why)
            else:
                yield from _loosened(after, delta, had, has, report)


def _weakened_text(delta: Delta, report: Reporter) -> Iterator[Finding]:
    check = re.compile(r"^\s*(?:assert\b|self\.assert\w+\(|with\s+pytest\.raises)")
    lost = [line for line in delta.removed if check.match(line.text)]
    came = [line for line in delta.added if check.match(line.text)]
    if len(came) < len(lost):
        yield report.at(delta, lost[0], VIOLATION, "Assertions were removed.")


def _checks(function: FunctionNode) -> list[ast.AST]:
    """The assertions of a function that can run and can fail."""
    found: list[ast.AST] = []
    for node in reachable(function.body):
        trivial = isinstance(node, ast.Assert) and _trivial(node.test)
        if (isinstance(node, ast.Assert) and not trivial) or (
            isinstance(node, ast.Call) and _CHECKS.match(dotted(node)) and not _trivial_call(node)
        ):
            found.append(node)
    return found


def _trivial(test: ast.expr) -> bool:
    """Whether an asserted expression cannot be false."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Tuple | ast.List):
        return bool(test.elts)
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(_trivial(value) for value in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return isinstance(test.operand, ast.Constant) and not test.operand.value
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        same = ast.dump(test.left) == ast.dump(test.comparators[0])
        return same and isinstance(test.ops[0], ast.Eq | ast.Is | ast.GtE | ast.LtE)
    return isinstance(test, ast.Call) and dotted(test) == "isinstance" and _is_object(test)


def _is_object(call: ast.Call) -> bool:
    return len(call.args) == 2 and dotted(call.args[1]) == "object"


def _trivial_call(call: ast.Call) -> bool:
    name = dotted(call).split(".")[-1]
    if name == "assertTrue" and call.args:
        return _trivial(call.args[0])
    return (
        name in ("assertEqual", "assertIs")
        and len(call.args) >= 2
        and (ast.dump(call.args[0]) == ast.dump(call.args[1]))
    )


def _lost(had: list[ast.AST], has: list[ast.AST]) -> int:
    """Line of the first assertion that is gone."""
    left = Counter(source_of(node) for node in has)
    for node in had:
        text = source_of(node)
        if left[text] <= 0:
            return getattr(node, "lineno", 0)
        left[text] -= 1
    return getattr(had[0], "lineno", 0)


def _loosened(
    after: PyFile, delta: Delta, had: list[ast.AST], has: list[ast.AST], report: Reporter
) -> Iterator[Finding]:
    before = Counter(source_of(node) for node in had)
    for node in has:
        text = source_of(node)
        if before[text] > 0:
            before[text] -= 1
            continue
        why = _looser(node, had)
        if why:
            yield report.node(after, delta, getattr(node, "lineno", 0), SUSPECT, why)


def _looser(node: ast.AST, had: list[ast.AST]) -> str:
    """Why a changed assertion may be weaker than those it replaced; empty if it is not."""
    if isinstance(node, ast.Call) and dotted(node).endswith(("raises", "assertRaises")):
        broad = bool(node.args) and dotted(node.args[0]) in ("Exception", "BaseException")
        return "An expected exception was broadened." if broad else ""
    if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Compare):
        compared = any(isinstance(n, ast.Assert) and isinstance(n.test, ast.Compare) for n in had)
        return "A comparison became a truth test." if compared else ""
    old, new = _tolerances(had), _tolerances([node])
    for name, value in new.items():
        looser = (
            value < old.get(name, value)
            if name in _TIGHTER_IS_MORE
            else value > old.get(name, value)
        )
        if looser:
            return f"The tolerance {name} was loosened."
    return ""


def _tolerances(nodes: list[ast.AST]) -> dict[str, float]:
    found: dict[str, float] = {}
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.keyword) and inner.arg in _TOLERANCES:
                value = getattr(inner.value, "value", None)
                if isinstance(value, int | float):
                    found[inner.arg] = float(value)
    return found
