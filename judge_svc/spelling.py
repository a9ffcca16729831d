"""How keys and texts are put together in source, piece by piece.

- Only the shape of an expression is looked at; nothing is executed.
"""

import ast
from collections.abc import Collection

_OWN_NAMES = {"__name__", "__package__", "__spec__"}


def is_own(node: ast.AST, rebound: Collection[str]) -> bool:
    """Whether a key is the module's own name, or that name, a dot and something."""
    if isinstance(node, ast.Name):
        return node.id in _OWN_NAMES and node.id not in rebound
    if isinstance(node, ast.Attribute):
        own = isinstance(node.value, ast.Name) and node.value.id == "__spec__"
        return own and node.attr in ("name", "parent") and "__spec__" not in rebound
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call):
        func = node.value.func
        first = isinstance(node.slice, ast.Constant) and node.slice.value == 0
        cut = isinstance(func, ast.Attribute) and func.attr in ("split", "partition")
        return first and cut and isinstance(func, ast.Attribute) and is_own(func.value, rebound)
    pieces = pieces_of(node)
    if len(pieces) < 2 or not isinstance(pieces[1], ast.Constant):
        return False
    return str(pieces[1].value).startswith(".") and is_own(pieces[0], rebound)


def pieces_of(node: ast.AST) -> list[ast.AST]:
    """What a sum or an f-string puts together, from the left."""
    if isinstance(node, ast.JoinedStr):
        shaped = [v for v in node.values if getattr(v, "format_spec", None) is not None]
        found = [v.value if isinstance(v, ast.FormattedValue) else v for v in node.values]
        return [] if shaped else list(found)
    pieces: list[ast.AST] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pieces.insert(0, node.right)
        node = node.left
    return [node, *pieces]


def parts_of(node: ast.AST) -> list[ast.expr]:
    """The expressions whose reach an expression inherits."""
    if isinstance(node, ast.NamedExpr | ast.Starred | ast.Await):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return node.elts
    if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
        return [generator.iter for generator in node.generators]
    return []
