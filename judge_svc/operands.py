"""Whether the answer of a comparison depends on what is compared, as far as its text can tell.

- Content counts: what type an operand has, or that it has a name, is no content.
- An answer is free if some way through the method gives it without a comparison or call that
  involves all operands; a guard that involves them makes everything after it depend on them.
- Names carry on what was assigned to them; calls of the file's own functions are looked into.
- Nothing is executed. A function that is too large to be told has `told` off and no free answer.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise

from judge_svc.pyfile import FunctionNode, body_of, dotted

Callee = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
SELF, OTHER = "self", "other"
_TYPE_ONLY = {"isinstance", "issubclass", "type", "hasattr", "callable", "print"}
_NO_ANSWER = {*_TYPE_ONLY, "bool", "id", "len", "hash", "repr", "str", "all", "any", "zip"}
_TYPE_NAMES = {"__class__", "__name__", "__qualname__", "__module__", "__doc__"}
_DEPTH = 3
_MAX_NODES = 1500
_BINDING = (
    *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.AsyncFor),
    *(ast.comprehension, ast.withitem, ast.Match, ast.Call),
)


@dataclass(slots=True)
class Operands:
    """One comparing function: where its operands go."""

    function: Callee
    callees: Mapping[str, Callee] = field(default_factory=dict)
    """Functions and methods of the same file, by their last name."""
    needed: frozenset[str] = frozenset({SELF, OTHER})
    """Operands that an answer must depend on."""
    depth: int = 0
    taints: dict[str, frozenset[str]] = field(default_factory=dict)
    joint_names: set[str] = field(default_factory=set)
    told: bool = True
    others: "dict[tuple[int, int], Operands]" = field(default_factory=dict)
    """Functions that were looked into already, by identity and depth."""
    _decides: bool | None = None
    _free: dict[bool, list[ast.AST]] = field(default_factory=dict)
    _known: dict[int, frozenset[str]] | None = None
    """Taints by node, once all names are bound."""

    def __post_init__(self) -> None:
        given = self.function.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
        for position, name in enumerate(names):
            self.taints[name] = frozenset({OTHER if position else SELF})
        every = list(islice(ast.walk(self.function), _MAX_NODES + 1))
        self.told = len(every) <= _MAX_NODES
        nodes = [node for node in every if isinstance(node, _BINDING)] if self.told else []
        for _ in range(3):  # a name may be used above its binding in a loop
            self._known = {}
            for node in nodes:
                self._bind(node)
        self._known = {}

    def free(self, answer: bool) -> list[ast.AST]:
        """Where `answer` is given whatever the operands hold."""
        if self.told and answer not in self._free:
            found: list[ast.AST] = []
            if isinstance(self.function, ast.Lambda):
                body = self.function.body
                found += [body] if self.may_be(body, answer) else []
            else:
                self._walk(body_of(self.function), answer, found)
            self._free[answer] = found
        return self._free.get(answer, [])

    def _walk(self, body: Iterable[ast.stmt], answer: bool, found: list[ast.AST]) -> bool:
        """Collect free answers; whether what follows depends on a guard."""
        for node in body:
            if isinstance(node, ast.Return):
                if node.value is not None and self.may_be(node.value, answer):
                    found.append(node)
                return False
            if isinstance(node, ast.Raise):
                return False
            if isinstance(node, FunctionNode | ast.ClassDef):
                continue
            if any(self.joint(part) for part in _deciding(node)):
                return True
            for block in _blocks(node):
                if self._walk(block, answer, found):
                    return True
        return False

    def may_be(self, node: ast.AST, answer: bool) -> bool:
        """Whether an expression may be `answer` without looking at all operands."""
        if isinstance(node, ast.Constant):
            return bool(node.value) is answer
        if isinstance(node, ast.Name) and node.id == "NotImplemented":
            return False
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self.may_be(node.operand, not answer)
        if isinstance(node, ast.BoolOp):
            one_is_enough = isinstance(node.op, ast.Or) is answer
            parts = [self.may_be(value, answer) for value in node.values]
            return any(parts) if one_is_enough else all(parts)
        if isinstance(node, ast.IfExp):
            if self.joint(node.test):
                return False
            return self.may_be(node.body, answer) or self.may_be(node.orelse, answer)
        if isinstance(node, ast.Call) and dotted(node.func) == "bool" and len(node.args) == 1:
            return self.may_be(node.args[0], answer)
        if isinstance(node, ast.NamedExpr):
            return self.may_be(node.value, answer)
        called = isinstance(node, ast.Call) and not any(map(self.joint, _pieces(node)))
        callee = self._callee(node) if called and isinstance(node, ast.Call) else None
        if callee is not None:
            return any(not callee.one_sided(leaf) for leaf in callee.free(answer))
        return not self.joint(node)

    def one_sided(self, node: ast.AST) -> bool:
        """Whether an answer looks at the content of one operand, and at no literal text."""
        value = node.value if isinstance(node, ast.Return) else node
        if value is None or not self.taint(value):
            return False
        texts = (part for part in ast.walk(value) if isinstance(part, ast.Constant))
        return not any(isinstance(part.value, str | bytes) for part in texts)

    def decides(self) -> bool:
        """Whether some answer or guard involves all operands."""
        if self._decides is None:
            self._decides = any(self.joint(part) for part in _answers(self.function))
        return self._decides

    def joint(self, node: ast.AST) -> bool:
        """Whether something inside compares, or calls with, all operands."""
        return any(self._joins(part) for part in ast.walk(node))

    def _joins(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.joint_names
        if len(self.needed) == 1:
            told = isinstance(node, ast.Compare | ast.Call | ast.BinOp | ast.Subscript)
            return told and self.taint(node) >= self.needed
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            return any(self._across([a, b]) for a, b in pairwise(sides))
        if isinstance(node, ast.BinOp):
            return self._across([node.left, node.right])
        if isinstance(node, ast.Call):
            return self._calls(node)
        return False

    def _calls(self, node: ast.Call) -> bool:
        if dotted(node.func) in _NO_ANSWER or not self._across(_pieces(node)):
            return False
        callee = self._callee(node)
        return callee is None or callee.decides()

    def _callee(self, node: ast.Call) -> "Operands | None":
        """The file's own function that is called with all operands."""
        name, first = dotted(node.func), next(iter(self.taints), "")
        if name.startswith(f"{first}."):
            name = f"{SELF}.{name.removeprefix(f'{first}.')}"
        function = self.callees.get(name)
        known = function is not None and function is not self.function and self.depth < _DEPTH
        if not known or function is None or not self._across(_pieces(node)):
            return None
        key = (id(function), self.depth + 1)
        if key not in self.others:
            self.others[key] = Operands(
                function, self.callees, self.needed, self.depth + 1, others=self.others
            )
        return self.others[key]

    def _across(self, pieces: list[ast.expr]) -> bool:
        """Whether one piece brings one operand and another piece the other."""
        taints = [self.taint(piece) for piece in pieces]
        return any(
            SELF in one and OTHER in two
            for n, one in enumerate(taints)
            for m, two in enumerate(taints)
            if n != m
        )

    def taint(self, node: ast.AST) -> frozenset[str]:
        """The operands whose content is in an expression."""
        known = self._known if self._known is not None else {}
        if id(node) not in known:
            known[id(node)] = self._taint(node)
        return known[id(node)]

    def _taint(self, node: ast.AST) -> frozenset[str]:
        if isinstance(node, ast.Name):
            return self.taints.get(node.id, frozenset())
        if isinstance(node, ast.Attribute) and node.attr in _TYPE_NAMES:
            return frozenset()
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in _TYPE_ONLY:
                return frozenset()
            if name == "super":
                return frozenset({SELF})
        if isinstance(node, ast.Lambda):
            return frozenset()
        return frozenset().union(*map(self.taint, ast.iter_child_nodes(node)))

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            if isinstance(owner, ast.Name) and any(map(self.joint, node.args)):
                self.joint_names.add(owner.id)  # a list that the answer is made of
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._store(target, node.value)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
            if node.value is not None:
                self._store(node.target, node.value)
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            self._store(node.target, node.iter)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._store(node.optional_vars, node.context_expr)
        elif isinstance(node, ast.Match):
            given = self.taint(node.subject)
            for part in (p for case in node.cases for p in ast.walk(case.pattern)):
                if isinstance(part, ast.MatchAs | ast.MatchStar) and part.name:
                    self._add(part.name, given)

    def _store(self, target: ast.AST, value: ast.AST) -> None:
        sides = (ast.Tuple, ast.List)
        paired = isinstance(target, sides) and isinstance(value, sides)
        if paired and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
            for one, two in zip(target.elts, value.elts, strict=True):  # type: ignore[attr-defined]
                self._store(one, two)
            return
        given, joint = self.taint(value), self.joint(value)
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                self._add(part.id, given)
                if joint:
                    self.joint_names.add(part.id)

    def _add(self, name: str, given: frozenset[str]) -> None:
        if not given <= self.taints.get(name, frozenset()):
            self.taints[name] = self.taints.get(name, frozenset()) | given
            self._known = {}


def _pieces(node: ast.Call) -> list[ast.expr]:
    """What a call brings together."""
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    return [*given, node.func.value] if isinstance(node.func, ast.Attribute) else given


def _deciding(node: ast.stmt) -> Iterator[ast.AST]:
    """What decides which way a statement goes."""
    if isinstance(node, ast.Assert) or (isinstance(node, ast.If | ast.While) and _acts(node)):
        yield node.test
    elif isinstance(node, ast.Match):
        yield node.subject
        yield from (case.guard for case in node.cases if case.guard is not None)
    elif isinstance(node, ast.Try) and any(map(_acts, node.handlers)):
        yield from (part for part in node.body if isinstance(part, ast.Expr | ast.Assign))
    if isinstance(node, ast.For | ast.AsyncFor | ast.While):
        for inner in ast.walk(node):
            if isinstance(inner, ast.If) and _acts(inner):
                yield inner.test


def _acts(node: ast.AST) -> bool:
    """Whether a branch does anything that the answer could depend on."""
    acts = (ast.Return, ast.Raise, ast.Assign, ast.AugAssign, ast.Break, ast.Continue)
    return any(isinstance(inner, acts) for inner in ast.walk(node))


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield block
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body


def _answers(function: Callee) -> Iterator[ast.AST]:
    if isinstance(function, ast.Lambda):
        yield function.body
        return
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            yield node.value
        elif isinstance(node, ast.If | ast.While):
            yield node.test
