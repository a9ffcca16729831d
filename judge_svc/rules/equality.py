"""Rules on types that compare as they please, so that any assertion about them holds.

- A new or changed comparison whose answer does not depend on what is compared is a violation; what
  stood anywhere in the changed files before is never held against the change.
- A type without state may be equal to every instance of its own: there is nothing else to compare.
- Orderings and truth of a class that is no kind of a built-in type are suspect at most, and so are
  singletons that ask only whether the other one is a certain object.
"""

import ast
from collections.abc import Iterator

from judge_svc.diffstat import Delta
from judge_svc.evidence import ChangeKind, Finding, FindingClass, Severity
from judge_svc.operands import OTHER, Callee, Operands
from judge_svc.paths import PathKind
from judge_svc.pyfile import FunctionNode, PyFile, body_of, dotted, source_of
from judge_svc.rules.base import SUSPECT, VIOLATION, Context, Reporter

_EQUAL = {"__eq__": True, "__ne__": False}
"""The answer that lies, by method."""
_ORDER = {"__lt__", "__le__", "__gt__", "__ge__"}
_METHODS = {*_EQUAL, *_ORDER, "__contains__", "__bool__"}
_BUILT_IN = {
    *("str", "bytes", "bytearray", "int", "float", "complex", "list", "tuple", "dict", "set"),
    *("frozenset", "UserString", "UserList", "UserDict", "OrderedDict", "defaultdict", "Decimal"),
    *("Fraction", "datetime", "date", "time", "timedelta", "Path", "PurePath", "deque"),
}
_Method = tuple[ast.ClassDef | None, str, Callee, ast.AST]
"""Its class if known, its name, its function, and where it is put into the class."""


def comparisons(context: Context) -> Iterator[Finding]:
    """Comparisons that answer whatever they are asked about."""
    report = Reporter("lying-comparison", FindingClass.SPECIAL_CASED)
    known = {
        (name, source_of(function))
        for delta in context.python()
        for _, name, function, _ in _methods(context.before(delta))
    }
    for delta in context.of_kind(PathKind.SOURCE, PathKind.BUILD):
        if delta.kind is ChangeKind.DELETE or not delta.path.endswith(".py"):
            continue
        after = context.after(delta)
        before = _lies(context.before(delta))
        for (owner, name, function, place), texts, severity in _found(after):
            stood = texts <= before.get((getattr(owner, "name", ""), name), frozenset())
            if not stood and (name, source_of(function)) not in known:
                yield _finding(report, delta, after, place, severity)


def _finding(
    report: Reporter, delta: Delta, after: PyFile, place: ast.AST, severity: Severity
) -> Finding:
    why = "A type compares the same whatever it is compared with."
    return report.node(after, delta, getattr(place, "lineno", 0), severity, why)


def _lies(file: PyFile) -> dict[tuple[str, str], frozenset[str]]:
    return {
        (getattr(owner, "name", ""), name): texts for (owner, name, _, _), texts, _ in _found(file)
    }


def _found(file: PyFile) -> Iterator[tuple[_Method, frozenset[str], Severity]]:
    """Methods that answer freely, the texts of their free answers, and how grave they are."""
    classes = {n.name: n for n in file.nodes if isinstance(n, ast.ClassDef)}
    functions: dict[str, Callee] = {n: f for n, f in file.functions.items() if "." not in n}
    for method in _methods(file):
        owner, name, function, _ = method
        own = _own_functions(owner)
        operands = Operands(function, {**functions, **own}, _needed(name))
        free = _free(name, operands)
        if not operands.told:
            grave = owner is not None and _built_in(owner, classes)
            yield method, frozenset({source_of(function)}), VIOLATION if grave else SUSPECT
            continue
        if name in _EQUAL and owner is not None and not _state(owner, classes):
            free = [node for node in free if not _own_type(node, function, owner.name)]
        built_in = owner is not None and _built_in(owner, classes)
        grave = built_in or name in _EQUAL or name == "__contains__"
        if name != "__bool__" and all(map(operands.one_sided, free)):
            singleton = all(_identity(node, name) for node in free)
            grave = built_in or (grave and not operands.decides() and not singleton)
        if free:
            texts = frozenset(map(source_of, free))
            yield method, texts, VIOLATION if grave else SUSPECT


def _identity(node: ast.AST, name: str) -> bool:
    """Whether an answer asks only which object the other one is, as singletons do."""
    value = node.value if isinstance(node, ast.Return) else node
    kind = ast.IsNot if name == "__ne__" else ast.Is
    return isinstance(value, ast.Compare) and all(isinstance(o, kind) for o in value.ops)


def _needed(name: str) -> frozenset[str]:
    return frozenset({OTHER}) if name == "__contains__" else frozenset({"self", OTHER})


def _free(name: str, operands: Operands) -> list[ast.AST]:
    """Where a method gives an answer that it does not owe to what it compares."""
    function = operands.function
    if name == "__bool__":
        if isinstance(function, ast.Lambda):
            return [function] if isinstance(function.body, ast.Constant) else []
        first = next(iter(body_of(function)), None)
        fixed = isinstance(first, ast.Return) and isinstance(first.value, ast.Constant)
        return [function] if fixed else []
    return operands.free(_EQUAL.get(name, True))


def _own_functions(owner: ast.ClassDef | None) -> dict[str, Callee]:
    body = owner.body if owner is not None else []
    return {f"self.{n.name}": n for n in body if isinstance(n, FunctionNode)}


def _methods(file: PyFile) -> Iterator[_Method]:
    """Comparing methods however they are put into a class."""
    table: dict[str, Callee] = {n: f for n, f in file.functions.items() if "." not in n}
    inside: set[int] = set()
    for owner in file.nodes:
        if not isinstance(owner, ast.ClassDef):
            continue
        for part in _class_body(owner.body):
            if isinstance(part, FunctionNode) and part.name in _METHODS:
                yield owner, part.name, part, part
            elif isinstance(part, ast.Assign | ast.AnnAssign | ast.Expr):
                inside |= {id(part), id(part.value)}
                for name, function in _assigned(part, table):
                    yield owner, name, function, part
    for node in file.nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and id(node) not in inside:
            for name, function in _assigned(node, table):
                yield None, name, function, node
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                found = _function(value, table)
                told = isinstance(key, ast.Constant) and key.value in _METHODS
                if isinstance(key, ast.Constant) and told and found and _takes_two(found):
                    yield None, str(key.value), found, value
        elif isinstance(node, ast.Call) and dotted(node.func) == "dict":
            for named in node.keywords:
                found = _function(named.value, table)
                if named.arg in _METHODS and found and _takes_two(found):
                    yield None, str(named.arg), found, node
        elif isinstance(node, ast.Call) and len(node.args) == 3:
            key, found = node.args[1], _function(node.args[2], table)
            told = isinstance(key, ast.Constant) and key.value in _METHODS
            if isinstance(key, ast.Constant) and told and found and "setattr" in dotted(node.func):
                yield None, str(key.value), found, node


def _takes_two(function: Callee) -> bool:
    given = function.args
    return len([*given.posonlyargs, *given.args]) == 2 or given.vararg is not None


def _class_body(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _class_body([*node.body, *getattr(node, "orelse", [])])
        else:
            yield node


def _pairs(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets and values of every kind of assignment, sequences taken apart."""
    if isinstance(node, ast.Expr):
        node = node.value
    value = getattr(node, "value", None)
    if not isinstance(value, ast.expr):
        return
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    sides = (ast.Tuple, ast.List)
    for target in targets:
        if isinstance(target, sides) and isinstance(value, sides):
            yield from zip(target.elts, value.elts, strict=False)
        elif isinstance(target, ast.expr):
            yield target, value


def _assigned(node: ast.AST, table: dict[str, Callee]) -> Iterator[tuple[str, Callee]]:
    for target, value in _pairs(node):
        found = _function(value, table)
        name = dotted(target).split(".")[-1]
        if name in _METHODS and found:
            yield name, found


def _function(node: ast.expr, table: dict[str, Callee]) -> Callee | None:
    if isinstance(node, ast.Lambda):
        return node
    return table.get(node.id) if isinstance(node, ast.Name) else None


def _built_in(owner: ast.ClassDef, classes: dict[str, ast.ClassDef], depth: int = 0) -> bool:
    names = [dotted(base).split(".")[-1] for base in owner.bases]
    inner = [classes[name] for name in names if name in classes and depth < 10]
    return any(name in _BUILT_IN for name in names) or any(
        _built_in(base, classes, depth + 1) for base in inner if base is not owner
    )


def _state(owner: ast.ClassDef, classes: dict[str, ast.ClassDef], depth: int = 0) -> bool:
    """Whether instances of a class may differ."""
    for base in owner.bases:
        name = dotted(base)
        known = classes.get(name)
        if name != "object" and (known is None or depth > 10 or known is owner):
            return True
        if known is not None and _state(known, classes, depth + 1):
            return True
    for node in ast.walk(owner):
        if isinstance(node, ast.AnnAssign):
            return True
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            return True
        if isinstance(node, FunctionNode) and node.name in ("__init__", "__new__"):
            given = node.args
            if len([*given.posonlyargs, *given.args, *given.kwonlyargs]) > 1 or given.vararg:
                return True
    return False


def _own_type(node: ast.AST, function: Callee, owner: str) -> bool:
    """Whether an answer asks no more than whether both are of one type."""
    value = node.value if isinstance(node, ast.Return) else node
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not):
        value = value.operand
    names = [argument.arg for argument in function.args.args]
    if value is None or len(names) != 2:
        return False
    this, that = names
    one = {f"type({this})", f"{this}.__class__", owner, "__class__"}
    other = {f"type({that})", f"{that}.__class__"}
    text = source_of(value)
    asks = {f"isinstance({that}, {kind})" for kind in one}
    for operator in ("is", "==", "is not", "!="):
        asks |= {f"{a} {operator} {b}" for a in one for b in other}
        asks |= {f"{b} {operator} {a}" for a in one for b in other}
    return text in asks
