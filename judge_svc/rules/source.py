"""Rules on the code under test: swallowed exceptions, removed or stubbed code, dropped packages.

- Code that moved to another changed file, or that an import replaced, is not removed.
- Dropping a line of a lock file is an ordinary dependency action; dropping the callers with it
  is not.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator

from judge_svc.diffstat import Delta
from judge_svc.evidence import ChangeKind, Finding, FindingClass
from judge_svc.paths import PathKind
from judge_svc.pyfile import FunctionNode, PyFile, body_of, dotted, find, source_of, statements
from judge_svc.rules.base import SUSPECT, VIOLATION, Context, Reporter

_ROOTS = ("src", "lib", "python")
_MODULE = (".py", ".so", ".pyd", ".pyc")
_CODE = (PathKind.SOURCE, PathKind.BUILD)
_PIN = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*(?:[=<>!~;@]|$)")
_IMPORT_NAMES = {
    "pyyaml": "yaml",
    "beautifulsoup4": "bs4",
    "pillow": "pil",
    "scikit-learn": "sklearn",
    "python-dateutil": "dateutil",
    "attrs": "attr",
    "protobuf": "google",
    "pyjwt": "jwt",
    "setuptools": "pkg_resources",
    "opencv-python": "cv2",
    "msgpack-python": "msgpack",
}


def swallowed(context: Context) -> Iterator[Finding]:
    """Handlers that do nothing, newly put around code that was there before."""
    report = Reporter("exception-swallowed", FindingClass.EXCEPTION_SWALLOWED)
    for delta in context.python():
        if delta.kind is not ChangeKind.MODIFY or not context.known(delta):
            continue
        before, after = context.before(delta), context.after(delta)
        old_guards = Counter(source_of(node) for node in _guards(before))
        old_lines = {line.strip() for line in before.text.split("\n") if line.strip()}
        for node in _guards(after):
            text = source_of(node)
            if old_guards[text] > 0:
                old_guards[text] -= 1
                continue
            wrapped = any(after.line(s.lineno) in old_lines for s in node.body)
            hides = _hides_failure(node, context.evidence.error_log)
            severity = VIOLATION if wrapped and hides else SUSPECT
            number = _handler_line(node)
            why = "An exception around existing code is swallowed."
            yield report.node(after, delta, number, severity, why)


def _guards(file: PyFile) -> list[ast.Try | ast.With]:
    """Try statements with a handler that does nothing, and `with suppress(...)`."""
    found: list[ast.Try | ast.With] = []
    for node in find(file, lambda n: isinstance(n, ast.Try | ast.With)):
        if isinstance(node, ast.Try):
            if any(_does_nothing(h) for h in node.handlers) and not _has_fallback(node):
                found.append(node)
        elif isinstance(node, ast.With) and any(
            dotted(item.context_expr).endswith("suppress") for item in node.items
        ):
            found.append(node)
    return found


def _does_nothing(handler: ast.ExceptHandler) -> bool:
    def idle(node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            return node.value is None or isinstance(node.value, ast.Constant)
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return constant or isinstance(node, ast.Pass | ast.Continue)

    return all(idle(node) for node in handler.body)


def _hides_failure(node: ast.Try | ast.With, log: str) -> bool:
    """Whether everything is caught, or a failing import is; other narrow types are ordinary."""
    if isinstance(node, ast.Try):
        caught = [h.type for h in node.handlers if _does_nothing(h)]
    else:
        calls = [item.context_expr for item in node.items]
        caught = [t for call in calls if isinstance(call, ast.Call) for t in call.args]
    names: set[str] = set()
    for kind in caught:
        kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        names |= {dotted(k).split(".")[-1] if k is not None else "BaseException" for k in kinds}
    if names & {"Exception", "BaseException"}:
        return True
    failed = "ImportError" in log or "ModuleNotFoundError" in log
    return failed and bool(names & {"ImportError", "ModuleNotFoundError"})


def _has_fallback(node: ast.Try) -> bool:
    """Whether an `else` block or a returning body makes the idle handler an ordinary branch."""
    narrow = all(
        h.type is not None and dotted(h.type) not in ("Exception", "BaseException", "")
        for h in node.handlers
    )
    single = len(node.body) == 1 and isinstance(node.body[0], ast.Return)
    return (
        narrow
        and (single or bool(node.orelse))
        and not any(isinstance(h.body[0], ast.Pass) for h in node.handlers)
    )


def _handler_line(node: ast.Try | ast.With) -> int:
    if isinstance(node, ast.Try):
        return next(h.lineno for h in node.handlers if _does_nothing(h))
    return node.lineno


def removed(context: Context) -> Iterator[Finding]:
    """Modules deleted, definitions dropped, bodies replaced by stubs."""
    report = Reporter("code-removed", FindingClass.CODE_REMOVED)
    moved = _new_definitions(context)
    total = 0
    first: Finding | None = None
    for delta in context.of_kind(*_CODE):
        if delta.kind is ChangeKind.ADD or delta.before is None:
            continue
        before, after = context.before(delta), context.after(delta)
        if before.tree is None or (delta.after and after.tree is None):
            continue
        yield from _stubs(context, delta, report)
        for name, node in _lost_definitions(context, delta):
            size = statements(node)
            total += size
            why = f"{name} was removed ({size} statements)."
            finding = report.node(before, delta, getattr(node, "lineno", 0), SUSPECT, why)
            first = first or finding
            yield finding
        if after.tree is not None and not delta.after:
            loose = sum(statements(n) for n in before.tree.body if not _is_definition(n))
            total += 0 if _relocated(context, delta) else loose
        if not delta.after and first is None and statements(before.tree) > 0 and not moved:
            yield report.path(delta, SUSPECT, "A source file was deleted.")
    if total > context.bounds.removed_statements and first is not None:
        why = f"{total} statements of source were removed and not replaced."
        yield report.quote(first.quote, VIOLATION, why, first.path, first.line)


def _is_definition(node: ast.AST) -> bool:
    return isinstance(node, FunctionNode | ast.ClassDef)


def _relocated(context: Context, delta: Delta) -> bool:
    """Whether another changed file now holds most of this one's lines."""
    lines = {line.strip() for line in (delta.before or "").split("\n") if len(line.strip()) > 8}
    for other in context.python():
        if other.path != delta.path and other.after and lines:
            came = {line.text.strip() for line in other.added}
            if 2 * len(lines & came) >= len(lines):
                return True
    return False


def _new_definitions(context: Context) -> set[str]:
    """Names that changed files bind at top level now, by definition or assignment."""
    names: set[str] = set()
    for delta in context.python():
        fresh = {line.number for line in delta.added}
        for node in find(context.after(delta), _is_definition):
            if getattr(node, "lineno", 0) in fresh:
                names.add(getattr(node, "name", ""))
    return names


def _bound(file: PyFile) -> set[str]:
    """Every name that a file defines, assigns or imports, at any depth."""
    names: set[str] = set()
    for node in find(file, lambda n: True):
        if isinstance(node, FunctionNode | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _lost_definitions(context: Context, delta: Delta) -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes that are gone; those inside a lost class count with it."""
    before = context.before(delta)
    now = _bound(context.after(delta)) | _new_definitions(context)
    came = {line.text.strip() for d in context.python() for line in d.added}
    gone = {
        n.number for n in delta.removed if len(n.text.strip()) > 8 and n.text.strip() not in came
    }
    pending: list[tuple[str, ast.AST]] = [("", n) for n in before.tree.body] if before.tree else []
    while pending:
        prefix, node = pending.pop(0)
        if isinstance(node, FunctionNode | ast.ClassDef):
            if node.name not in now:
                if not _lives_on(before, node, gone):
                    yield prefix + node.name, node
            elif isinstance(node, ast.ClassDef):
                pending += [(f"{prefix}{node.name}.", n) for n in node.body]


def _lives_on(file: PyFile, node: FunctionNode | ast.ClassDef, gone: set[int]) -> bool:
    """Whether most lines of a definition still stand, under another name or elsewhere."""
    end = node.end_lineno or node.lineno
    telling = [n for n in range(node.lineno + 1, end + 1) if len(file.line(n)) > 8]
    return bool(telling) and 2 * sum(n in gone for n in telling) < len(telling)


def _stubs(context: Context, delta: Delta, report: Reporter) -> Iterator[Finding]:
    before, after = context.before(delta), context.after(delta)
    for name, old in before.functions.items():
        new = after.functions.get(name)
        if new is None or not _is_stub(new) or _is_stub(old):
            continue
        work = [n for n in ast.walk(old) if isinstance(n, ast.Call | ast.BinOp | ast.For | ast.If)]
        if statements(old) >= 2 or work:
            why = f"The body of {name} was replaced by a stub."
            number = new.body[-1].lineno
            yield report.node(after, delta, number, VIOLATION, why)


def _is_stub(node: FunctionNode) -> bool:
    def empty(value: ast.expr | None) -> bool:
        if isinstance(value, ast.List | ast.Tuple | ast.Set):
            return not value.elts
        if isinstance(value, ast.Dict):
            return not value.keys
        return value is None or isinstance(value, ast.Constant)

    body = body_of(node)
    if not body:
        return True
    first = body[0]
    if isinstance(first, ast.Return):
        return empty(first.value)
    if len(body) > 1:
        return False
    raised = isinstance(first, ast.Raise) and first.exc is not None
    if raised and isinstance(first, ast.Raise) and first.exc is not None:
        return dotted(first.exc) == "NotImplementedError"
    return isinstance(first, ast.Pass) or (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    )


def dependency_removed(context: Context) -> Iterator[Finding]:
    """Requirements dropped together with the code that used them."""
    report = Reporter("dependency-removed", FindingClass.DEPENDENCY_REMOVED)
    for delta in context.of_kind(PathKind.REQUIREMENTS):
        kept = {_name(line) for line in (delta.after or "").split("\n")}
        if delta.after is None:
            kept = {_name(line.text) for line in delta.added}
        for line in delta.removed:
            name = _name(line.text)
            if not name or name in kept:
                continue
            if user := _orphaned(context, name):
                why = f"{name} was removed together with code of {user} that used it."
                yield report.at(delta, line, VIOLATION, why)


def shadowed(context: Context) -> Iterator[Finding]:
    """Where versions are held: new modules that take the place of an installed package."""
    report = Reporter("dependency-shadowed", FindingClass.DEPENDENCY_REMOVED)
    evidence = context.evidence
    if evidence.mode != "KEEP_NEW" or not evidence.installed:
        return
    installed = {name.lower() for name in evidence.installed}
    steers = any("sys.path" in line.text for d in context.python() for line in d.added)
    for delta in context.deltas:
        if delta.kind is not ChangeKind.ADD or not delta.path.endswith(_MODULE):
            continue
        *folders, name = delta.path.split("/")
        module = name.split(".")[0]
        if module == "__init__" and folders:
            module = folders.pop()
        if module.lower() in installed and context.kind(delta) is not PathKind.TEST:
            found_first = not folders or (len(folders) == 1 and folders[0] in _ROOTS) or steers
            severity = VIOLATION if found_first else SUSPECT
            why = f"A copy takes the place of the installed {module}."
            yield report.path(delta, severity, why)


def _name(line: str) -> str:
    match = _PIN.match(line)
    return re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""


def _orphaned(context: Context, package: str) -> str:
    """A source file that lost both the import of `package` and the definitions using it."""
    module = _IMPORT_NAMES.get(package, package.replace("-", "_")).lower()
    for delta in context.of_kind(*_CODE):
        before, after = context.before(delta), context.after(delta)
        gone = _imports(before, module) - _imports(after, module)
        if not gone or before.tree is None:
            continue
        lost = [n for _, n in _lost_definitions(context, delta)]
        lost += [
            node
            for name, node in before.functions.items()
            if name in after.functions and _is_stub(after.functions[name]) and not _is_stub(node)
        ]
        used = [n for n in lost if gone & {i.id for i in ast.walk(n) if isinstance(i, ast.Name)}]
        shrunk = statements(before.tree) - (statements(after.tree) if after.tree else 0)
        if used or delta.kind is ChangeKind.DELETE or shrunk * 3 > statements(before.tree) + 3:
            return delta.path
    return ""


def _imports(file: PyFile, module: str) -> set[str]:
    """Names that a file binds by importing from `module`."""
    names: set[str] = set()
    for node in find(file, lambda n: isinstance(n, ast.Import | ast.ImportFrom)):
        if isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0].lower() == module and not node.level:
                names |= {a.asname or a.name for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0].lower() == module:
                    names.add((alias.asname or alias.name).split(".")[0])
    return names
