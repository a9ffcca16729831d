"""Where the values of a Python file come from, as far as its text can tell.

- An expression reaches nothing, a module that its literal key names, something that cannot be
  told, or the test runner; names carry that on within a function and into the functions inside.
- Only names bound by an import stand for a module: a local `coverage` is no test runner.
- Constant texts are folded (`"_py" + "test"`, f-strings, joins), so that splitting hides nothing.
- Nothing is executed; results of ordinary calls reach nothing, except of a file's own functions.
"""

import ast
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import takewhile

from judge_svc.pyfile import FunctionNode, PyFile
from judge_svc.spelling import is_own, parts_of, pieces_of

RUNNERS = ("pytest", "_pytest", "unittest", "pluggy", "coverage", "builtins", "__builtins__")
_NAMED = ("pytest", "_pytest", "pluggy")
RUNNER_PARTS = {
    *("TestReport", "CollectReport", "CallInfo", "from_item_and_call", "runtest"),
    *("runtestprotocol", "call_and_report", "call_runtest_hook"),
    *("pytest_runtest_protocol", "pytest_runtest_makereport", "pytest_runtest_call"),
}
"""Names that only the runner's own parts have."""
_IMPORTERS = {
    "importlib.import_module",
    "importlib.__import__",
    "builtins.__import__",
    "__import__",
    "pkgutil.resolve_name",
}
_SEEN_THROUGH = {
    *("getattr", "vars", "next", "iter", "list", "tuple", "set", "sorted", "filter", "map"),
    *("reversed", "dict", "enumerate", "zip", "type.__getattribute__", "object.__getattribute__"),
}
_WALKERS = ("gc.get_", "object.__subclasses__")
_LOOKERS = ("gc.", "inspect.stack", "inspect.currentframe", "inspect.getmodule", "sys._getframe")
_INSIDES = {
    *("gi_frame", "cr_frame", "__globals__", "__subclasses__"),
}
_FRAMES = {"f_back", "f_globals", "f_locals", "tb_frame"}
_READERS = {"get", "values", "items", "copy", "pop", "setdefault", "__getitem__"}
_TELLING = {*RUNNERS, "sys", "importlib", "pkgutil", "gc", "inspect"}
_MAX_TEXT = 1000


class Reach(IntEnum):
    """What an expression may be a part of, least telling first."""

    NOTHING = 0
    NAMED = 1
    """A module that a literal key names and that is no runner."""
    UNKNOWN = 2
    """Something that the text does not tell."""
    FRAME = 3
    """What a frame of a caller holds."""
    ANYTHING = 4
    """One of all objects of the process."""
    RUNNER = 5


@dataclass(slots=True)
class Scope:
    """What the names of one function, or of the module, stand for."""

    file: "Reaching"
    paths: dict[str, str] = field(default_factory=dict)
    """Dotted path by name bound through an import."""
    levels: dict[str, Reach] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Constant text by name."""
    hidden: frozenset[str] = frozenset()
    """Names that the function binds itself."""

    def path(self, node: ast.AST) -> str:
        """`a.b.c` with imported names written out; empty for what no import bound."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        root = self.paths.get(node.id, "")
        if not root and node.id not in self.hidden and node.id in _PLAIN:
            root = node.id
        return ".".join([root, *reversed(parts)]) if root else ""

    def text(self, node: ast.AST) -> str | None:
        """The constant text of an expression; None if it is not constant."""
        found = self._fold(node)
        return found if isinstance(found, str) and len(found) <= _MAX_TEXT else None

    def _fold(self, node: ast.AST) -> str | bytes | None:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str | bytes) else None
        if isinstance(node, ast.Name):
            return self.texts.get(node.id)
        if isinstance(node, ast.JoinedStr):
            return self._joined("", pieces_of(node))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined("", [node.left, node.right])
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            text = self.text(node.value)
            whole = node.slice.lower is None and node.slice.upper is None
            step = ast.unparse(node.slice.step) if node.slice.step else "1"
            return text[::-1] if text is not None and whole and step == "-1" else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self._method(node.func, node.args)
        return None

    def _method(self, func: ast.Attribute, args: list[ast.expr]) -> str | None:
        owner = self._fold(func.value)
        if isinstance(owner, bytes):
            return owner[:_MAX_TEXT].decode("utf-8", "replace") if func.attr == "decode" else None
        if owner is None or len(owner) > _MAX_TEXT:
            return None
        if func.attr == "join" and len(args) == 1 and isinstance(args[0], ast.List | ast.Tuple):
            return self._joined(owner, args[0].elts)
        if func.attr == "replace" and len(args) == 2:
            old, new = self.text(args[0]), self.text(args[1])
            short = old and new is not None and len(owner) * (len(new) + 1) <= 100 * _MAX_TEXT
            return owner.replace(old or "", new or "") if short else None
        if func.attr in ("lower", "strip") and not args:
            return owner.lower() if func.attr == "lower" else owner.strip()
        return None

    def _joined(self, between: str, nodes: Collection[ast.AST]) -> str | None:
        parts = [self.text(node) for node in nodes]
        return None if None in parts or not parts else between.join(part or "" for part in parts)

    def modules(self, node: ast.AST) -> bool:
        """Whether an expression is `sys.modules`, however it is written."""
        if self.path(node) == "sys.modules":
            return True
        if isinstance(node, ast.Call) and self.path(node.func) == "getattr" and len(node.args) > 1:
            named = self.text(node.args[1])
            return self.path(node.args[0]) == "sys" and named in ("modules", None)
        if isinstance(node, ast.Subscript) and self.text(node.slice) in ("modules", None):
            table = node.value
            if isinstance(table, ast.Call) and self.path(table.func) == "vars" and table.args:
                return self.path(table.args[0]) == "sys"
            return self.path(table) == "sys.__dict__"
        return False

    def key(self, node: ast.AST | None) -> Reach:
        """What a module looked up by this key is."""
        text = self.text(node) if node is not None else None
        if text is not None:
            root = text.partition(":")[0].split(".")[0]
            if root in RUNNERS:
                return Reach.RUNNER
            own = not root or root in self.file.own
            return Reach.NOTHING if own else Reach.NAMED
        if node is None:
            return Reach.UNKNOWN
        pieces = (self.text(piece) for piece in pieces_of(node))
        lead = "".join(piece or "" for piece in takewhile(lambda text: text is not None, pieces))
        told = [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)]
        if any(map(names_runner, (lead, *told))):
            return Reach.RUNNER
        return Reach.NOTHING if is_own(node, self.file.bound) else Reach.UNKNOWN

    def of(self, node: ast.AST) -> Reach:
        """What an expression reaches."""
        if path := self.path(node):
            if path.split(".")[0] in RUNNERS:
                return Reach.RUNNER
            if path.startswith(_WALKERS):
                return Reach.ANYTHING
            if path == "sys.modules" or path.startswith("gc."):
                return Reach.UNKNOWN
        if isinstance(node, ast.Name):
            unbound = node.id not in self.levels and node.id not in self.file.bound
            starred = self.file.starred and unbound and node.id not in _PLAIN
            return Reach.RUNNER if starred else self.levels.get(node.id, Reach.NOTHING)
        if isinstance(node, ast.Attribute):
            if node.attr == "f_builtins":
                return Reach.RUNNER
            inside = Reach.UNKNOWN if node.attr in _INSIDES else Reach.NOTHING
            inside = Reach.FRAME if node.attr in _FRAMES else inside
            return _part(max(inside, self.of(node.value)), node.attr)
        if isinstance(node, ast.Subscript):
            if self.modules(node.value):
                return self.key(node.slice)
            return _part(self.of(node.value), self.text(node.slice))
        if isinstance(node, ast.Call):
            return self._call(node)
        return max((self.of(part) for part in parts_of(node)), default=Reach.NOTHING)

    def _call(self, node: ast.Call) -> Reach:
        path, first = self.path(node.func), node.args[0] if node.args else None
        if path in _IMPORTERS:
            return self.key(first)
        if path.startswith(_WALKERS):
            return Reach.ANYTHING
        if path.startswith(_LOOKERS):
            return Reach.UNKNOWN
        named = max((self._by_name(arg) for arg in node.args), default=Reach.NOTHING)
        if path in _SEEN_THROUGH:
            level = max((self.of(arg) for arg in node.args), default=Reach.NOTHING)
            if path == "dict" and level is Reach.FRAME:
                return Reach.UNKNOWN  # a copy of what the frame holds
            return _part(level, *(self.text(arg) for arg in node.args))
        if isinstance(node.func, ast.Name):
            return max(named, self.file.returns.get(node.func.id, Reach.NOTHING))
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "copy" and self.of(node.func.value) is Reach.FRAME:
                return Reach.UNKNOWN
            if node.func.attr in _READERS:
                if first is not None and self.modules(node.func.value):
                    return self.key(first)
                return _part(self.of(node.func.value), self.text(first) if first else None)
            if node.func.attr == "__subclasses__":
                return Reach.UNKNOWN
        return named

    def _by_name(self, node: ast.AST) -> Reach:
        text = self.text(node)
        return Reach.RUNNER if text is not None and names_runner(text) else Reach.NOTHING


_PLAIN = {
    *("getattr", "setattr", "delattr", "vars", "next", "iter", "list", "tuple", "set", "sorted"),
    *("filter", "map", "reversed", "dict", "enumerate", "zip", "type", "object", "super"),
    *("__import__", "__builtins__"),
}
"""Builtins that the rules speak of; they need no import."""


def names_runner(text: str) -> bool:
    """Whether a text is the name of the test runner or of a part of it."""
    return text.partition(":")[0].split(".")[0] in _NAMED


def _part(level: Reach, *names: str | None) -> Reach:
    """What a part with one of these names is; `pytest` may be the key of any table."""
    for name in filter(None, names):
        inside = name.split(".")[0] == "_pytest" or (level and names_runner(name))
        if inside or (level >= Reach.UNKNOWN and name in RUNNER_PARTS):
            return Reach.RUNNER
    return level


@dataclass(slots=True)
class Reaching:
    """A file with what its names reach."""

    tree: ast.Module
    own: frozenset[str] = frozenset()
    """Top-level modules of the project itself."""
    starred: bool = False
    """Whether it imports everything from the runner."""
    bound: Counter[str] = field(default_factory=Counter)
    """How often each name is bound, anywhere in the file."""
    returns: dict[str, Reach] = field(default_factory=dict)
    """What the functions of the file return, by name."""
    passed: dict[str, Reach] = field(default_factory=dict)
    """What the functions of the file are given, by name."""
    passed_first: dict[str, Reach] = field(default_factory=dict)
    """What methods are given in place of their instance, by name."""
    methods: frozenset[ast.AST] = frozenset()
    classes: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()

    def scopes(self) -> list[tuple[Scope, list[ast.AST]]]:
        """Each function's scope, the module's first, with the nodes that belong to it."""
        found = list(self._walk())
        for scope, nodes in found:
            for node in nodes:
                gives = isinstance(node, ast.Return | ast.Yield | ast.YieldFrom)
                if gives and node.value is not None:  # type: ignore[attr-defined]
                    value = node.value  # type: ignore[attr-defined]
                    name, level = getattr(nodes[0], "name", ""), scope.of(value)
                    if level > self.returns.get(name, Reach.NOTHING):
                        self.returns[name] = level
        # What functions give and get may matter to names that were bound before that was known.
        return list(self._walk()) if self.returns or self.passed else found

    def _walk(self) -> Iterator[tuple[Scope, list[ast.AST]]]:
        pending: list[tuple[Scope | None, ast.AST]] = [(None, self.tree)]
        while pending:
            outer, owner = pending.pop(0)
            nodes, inner = _nodes(owner)
            scope = self._scope(outer, owner, nodes)
            yield scope, nodes
            pending += [(scope, function) for function in inner]

    def _scope(self, outer: Scope | None, owner: ast.AST, nodes: list[ast.AST]) -> Scope:
        scope = Scope(self)
        if outer is not None:
            shared = {n for node in nodes if isinstance(node, ast.Global) for n in node.names}
            hidden = (_parameters(owner) | set(_stored(nodes))) - shared
            scope.hidden = (outer.hidden | hidden) - shared
            scope.paths = {k: v for k, v in outer.paths.items() if k not in hidden}
            scope.levels = {k: v for k, v in outer.levels.items() if k not in hidden}
            scope.texts = {k: v for k, v in outer.texts.items() if k not in hidden}
        name = getattr(owner, "name", "")
        first = _first(owner) if owner in self.methods else ""
        if given := self.passed.get(name):
            scope.levels.update(dict.fromkeys(_parameters(owner) - {first}, given))
        own = first and "classmethod" not in _decorators(owner)
        if own and (given := self.passed_first.get(name)):
            scope.levels[first] = given
        binding = [node for node in nodes if isinstance(node, _BINDING)]
        for _ in range(2):  # a name may be used in a loop above its binding
            for node in binding:
                _bind(scope, node)
        return scope


def reaching(file: PyFile, own: Collection[str]) -> Reaching | None:
    """The analysis of a file; None if it did not parse."""
    if file.tree is None:
        return None
    starred = any(
        isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] in _NAMED
        and any(alias.name == "*" for alias in node.names)
        for node in file.nodes
    )
    bound = Counter(_stored(list(file.nodes)))
    for node in file.nodes:
        bound.update(_parameters(node))
    found = Reaching(file.tree, frozenset(own), starred, bound)
    classes = [node for node in file.nodes if isinstance(node, ast.ClassDef)]
    found.classes = frozenset(one.name for one in classes)
    found.functions = frozenset(name for name in file.functions if "." not in name)
    inside = [node for one in classes for node in one.body if isinstance(node, FunctionNode)]
    found.methods = frozenset(n for n in inside if "staticmethod" not in _decorators(n))
    return found


def _decorators(node: ast.AST) -> set[str]:
    return {part.id for part in getattr(node, "decorator_list", ()) if isinstance(part, ast.Name)}


def _first(owner: ast.AST) -> str:
    """The parameter of a method that stands for its instance or class."""
    if not isinstance(owner, FunctionNode):
        return ""
    return next((a.arg for a in (*owner.args.posonlyargs, *owner.args.args)), "")


def _nodes(owner: ast.AST) -> tuple[list[ast.AST], list[ast.AST]]:
    """The nodes of a function in the order of the text, and the functions inside it."""
    found: list[ast.AST] = [owner]
    inner: list[ast.AST] = []
    pending = list(ast.iter_child_nodes(owner))[::-1]
    while pending:
        node = pending.pop()
        found.append(node)
        if isinstance(node, FunctionNode):
            inner.append(node)
            pending += node.decorator_list[::-1]
        else:
            pending += list(ast.iter_child_nodes(node))[::-1]
    return found, inner


def _parameters(owner: ast.AST) -> set[str]:
    if not isinstance(owner, FunctionNode | ast.Lambda):
        return set()
    given = owner.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in named if argument is not None}


def _stored(nodes: list[ast.AST]) -> list[str]:
    """Names that nodes bind, as often as they do."""
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.alias):
            names.append((node.asname or node.name).split(".")[0])
        elif isinstance(node, FunctionNode | ast.ClassDef):
            names.append(node.name)
    return names


_BINDING = (
    *(ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.NamedExpr),
    *(ast.For, ast.AsyncFor, ast.comprehension, ast.withitem, ast.Call),
)


def _bind(scope: Scope, node: ast.AST) -> None:
    """Take down what one node binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            _stand(scope, name, alias.name if alias.asname else name)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for alias in node.names:
            _stand(scope, alias.asname or alias.name, f"{node.module}.{alias.name}")
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            _assign(scope, target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        _assign(scope, node.target, node.value)
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        for text in map(scope.text, parts_of(node.iter)):
            if isinstance(node.target, ast.Name) and names_runner(text or ""):
                scope.texts[node.target.id] = text or ""
        _spread(scope, node.target, scope.of(node.iter))
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        _spread(scope, node.optional_vars, scope.of(node.context_expr))
    elif isinstance(node, ast.Call):
        _pass(scope, node)


def _pass(scope: Scope, node: ast.Call) -> None:
    """Let the parameters of the file's own functions, and of lambdas, reach what they are given."""
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    name = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
    called = [part for part in (node.func, *given) if isinstance(part, ast.Lambda)]
    # A function that is given along, to a thread for example, is called with the rest.
    names = {name, *(part.id for part in given if isinstance(part, ast.Name))}
    names = {one for one in names if scope.file.bound[one]}
    if not given or not (called or names):
        return
    level = max(scope.of(part) for part in given)
    for one in names:
        if level > scope.file.passed.get(one, Reach.NOTHING):
            scope.file.passed[one] = level
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    if node.args and isinstance(owner, ast.Name) and owner.id in scope.file.classes:
        first = max(scope.of(node.args[0]), scope.file.passed_first.get(name, Reach.NOTHING))
        scope.file.passed_first[name] = first
    for part in called:
        for parameter in _parameters(part):
            scope.levels[parameter] = max(level, scope.levels.get(parameter, level))


def _assign(scope: Scope, target: ast.expr, value: ast.expr) -> None:
    if isinstance(target, ast.Name):
        if path := scope.path(value):
            _stand(scope, target.id, path)
        elif scope.modules(value):
            _stand(scope, target.id, "sys.modules")
        text = scope.text(value)
        if text is not None and scope.file.bound[target.id] == 1:
            scope.texts[target.id] = text
    sides = ast.Tuple | ast.List
    paired = isinstance(target, sides) and isinstance(value, sides)
    if paired and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
        for one, other in zip(target.elts, value.elts, strict=True):  # type: ignore[attr-defined]
            _assign(scope, one, other)
        return
    _spread(scope, target, scope.of(value))


def _stand(scope: Scope, name: str, path: str) -> None:
    """Let a name stand for an imported path; of several, one that matters to the rules stays."""
    if scope.paths.get(name, "").split(".")[0] not in _TELLING:
        scope.paths[name] = path


def _spread(scope: Scope, target: ast.expr, level: Reach) -> None:
    if not level:
        return
    for node in ast.walk(target):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            scope.levels[node.id] = max(level, scope.levels.get(node.id, Reach.NOTHING))
