"""A Python file as rules see it: syntax tree if it parses, its tests and functions, its lines.

- Hostile source never raises: what does not parse, is too long or too deep has `tree is None`,
  and rules fall back to text.
- The last definition of a name wins, as it does when Python runs the file.
"""

import ast
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

MAX_CHARS = 1_000_000
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (ast.If, ast.Try, ast.With, ast.For, ast.While)


@dataclass(frozen=True, slots=True)
class PyFile:
    """A parsed file; both tables are keyed by dotted name."""

    text: str
    tree: ast.Module | None
    functions: dict[str, FunctionNode] = field(default_factory=dict)
    tests: dict[str, FunctionNode] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    nodes: tuple[ast.AST, ...] = ()
    """All nodes of the tree, walked once."""

    def line(self, number: int) -> str:
        """The stripped text of line `number`, bounded, or empty."""
        known = 0 < number <= len(self.lines)
        return self.lines[number - 1].strip()[:240].strip() if known else ""


def parse(text: str | None) -> PyFile:
    """Parse `text`; None is an absent file, which parses as an empty one."""
    text = text or ""
    lines = tuple(text.split("\n"))
    tree = _tree(text)
    if tree is None:
        return PyFile(text, None, lines=lines)
    functions = dict(_functions(tree.body, ""))
    tests = {name: node for name, node in functions.items() if _is_test(name)}
    return PyFile(text, tree, functions, tests, lines, tuple(ast.walk(tree)))


def _tree(text: str) -> ast.Module | None:
    if len(text) > MAX_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    for node in body:
        if isinstance(node, FunctionNode):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, _BLOCKS):
            test = getattr(node, "test", None)
            never = isinstance(test, ast.Constant) and not test.value
            for inner in ([] if never else node.body, getattr(node, "orelse", [])):
                yield from _functions(inner, prefix)
            for handler in getattr(node, "handlers", []):
                yield from _functions(handler.body, prefix)


def _is_test(name: str) -> bool:
    *classes, function = name.split(".")
    return function.startswith("test") and not any(c.startswith("_") for c in classes)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name, attribute or call; empty for anything else."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Name):
            return ".".join([node.id, *reversed(parts)])
        else:
            return ""


def source_of(node: ast.AST) -> str:
    """`ast.unparse`, or the node's dump-free name when it is too deep."""
    try:
        return ast.unparse(node)
    except (RecursionError, ValueError, MemoryError):
        return type(node).__name__


def body_of(function: FunctionNode) -> list[ast.stmt]:
    """The statements of a function without its docstring."""
    body = function.body
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return body[1:] if isinstance(first.value.value, str) else body
    return body


def statements(*nodes: ast.AST) -> int:
    """Number of statements inside `nodes`, definitions and docstrings not counted."""
    count = 0
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.stmt) and not isinstance(inner, FunctionNode | ast.ClassDef):
                constant = isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant)
                count += not constant
    return count


def reachable(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Nodes of `body` up to the first unconditional return or raise, nested scopes included."""
    for node in body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant):
            yield from reachable(node.body if node.test.value else node.orelse)
            continue
        yield from ast.walk(node)
        if isinstance(node, ast.Return | ast.Raise):
            return


def find(file: PyFile, want: Callable[[ast.AST], bool]) -> list[ast.AST]:
    """All nodes of a file that `want` accepts; none if it did not parse."""
    return [node for node in file.nodes if want(node)]
