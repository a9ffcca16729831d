"""Lets pytest show many failures in the time of a few: where statements are is remembered.

- Standard library only, Python 3.7 and newer, pytest 3.0 and newer.
- To show a frame pytest looks for the end of its statement: it parses the whole file and walks the
  whole tree, for every frame of every failure. Of a suite that a change of a framework has broken
  that is most of the time. Here a text is parsed once, each of its lines looked up once, and that
  in a tree that has statements alone, which is all that is asked of it. What is shown is the same.
"""

from __future__ import annotations

import ast
import functools
import sys
from typing import Any

HOME = "_pytest._code.source"
NAME = "getstatementrange_ast"
TREES = 16
"""Files whose trees stay: one is larger than its text."""
TEXTS = 512
"""Texts whose lines stay."""
ASKED = frozenset(("body", "orelse", "finalbody", "handlers", "cases", "decorator_list"))
"""Fields of statements that say where others begin."""


def strip(tree: ast.AST) -> None:
    """Leave nothing of a tree but its statements."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            for field in set(node._fields) - ASKED:
                vars(node).pop(field, None)


def remember_statements() -> None:
    """Have the pytest that is imported remember; one that looks elsewhere is left as it is."""
    find: Any = getattr(sys.modules.get(HOME), NAME, None)
    if find is None:
        return
    known: dict[tuple[str, ...], dict[int, tuple[int, int]]] = {}
    trees: dict[tuple[str, ...], Any] = {}

    @functools.wraps(find)
    def remembered(
        lineno: int, source: Any, assertion: bool = False, astnode: Any = None
    ) -> tuple[Any, int, int]:
        text = tuple(source.lines)
        ranges = known[text] = known.pop(text, {})
        tree = trees.pop(text, astnode)
        if lineno not in ranges:
            known_tree = tree
            tree, start, end = find(lineno, source, assertion, tree)
            ranges[lineno] = (start, end)
            if tree is not known_tree:
                strip(tree)
        if tree is not None:
            trees[text] = tree
        for kept, most in ((trees, TREES), (known, TEXTS)):
            while len(kept) > most:
                del kept[next(iter(kept))]
        return (tree, *ranges[lineno])

    for name in [HOME, *sys.modules]:
        module = sys.modules[name]
        if name.startswith("_pytest.") and vars(module).get(NAME) is find:
            setattr(module, NAME, remembered)
