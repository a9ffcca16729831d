"""Calls that are written otherwise: keywords that were renamed or are gone, methods, wrapped calls.

- A function is known by what it was imported as. A method is known by its name alone, so only names
  that nothing else bears are listed, and only files that import the package are looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import libcst as cst

from regreen.rules.resolve import Resolving, module_of, visited

Keyword = Mapping[str, str | None]
"""New names of keywords; None: it is gone."""


@dataclass(frozen=True, slots=True)
class Keywords:
    """A change of the keywords of some calls; a name that ends in `.*` is all of a module."""

    table: Mapping[str, Keyword]

    def __call__(self, tree: cst.Module) -> cst.Module:
        return visited(tree, _Keywords(self.table))


class _Keywords(Resolving):
    def __init__(self, table: Mapping[str, Keyword]) -> None:
        super().__init__()
        self.table = table

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        name = self.callee(original_node)
        known = self.table.get(name) or self.table.get(f"{name.rpartition('.')[0]}.*")
        if not name or known is None:
            return updated_node
        return with_keywords(updated_node, known)


def with_keywords(call: cst.Call, known: Keyword) -> cst.Call:
    """The call with keywords renamed or left out; untouched where a new one is there already."""
    words = {arg.keyword.value for arg in call.args if arg.keyword is not None}
    if not words & set(known) or words & {new for new in known.values() if new}:
        return call
    args: list[cst.Arg] = []
    for arg in call.args:
        word = arg.keyword.value if arg.keyword is not None else ""
        new = known.get(word, word) if word else word
        if new is None:
            continue
        args.append(arg.with_changes(keyword=cst.Name(new)) if new != word else arg)
    if args and len(args) < len(call.args):
        args[-1] = args[-1].with_changes(comma=call.args[-1].comma)
    return call.with_changes(args=args)


@dataclass(frozen=True, slots=True)
class Methods:
    """A change of the names of methods, in files that import a package and define no such name."""

    package: str
    table: Mapping[str, str]

    def __call__(self, tree: cst.Module) -> cst.Module:
        seen = _Seen(self.package)
        tree.visit(seen)
        if not seen.imported:
            return tree
        table = {old: new for old, new in self.table.items() if old not in seen.defined}
        return visited(tree, _Methods(table))


class _Seen(cst.CSTVisitor):
    """Whether a package is imported, and which functions and classes a file defines."""

    def __init__(self, package: str) -> None:
        super().__init__()
        self.package, self.imported = package, False
        self.defined: set[str] = set()

    def visit_Import(self, node: cst.Import) -> None:
        self._see(*(alias.evaluated_name for alias in node.names))

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        self._see(module_of(node))

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self.defined.add(node.name.value)

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.defined.add(node.name.value)

    def _see(self, *modules: str) -> None:
        self.imported |= any(name.partition(".")[0] == self.package for name in modules)


class _Methods(Resolving):
    def __init__(self, table: Mapping[str, str]) -> None:
        super().__init__()
        self.table = table

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        func = updated_node.func
        if not isinstance(func, cst.Attribute) or self.callee(original_node):
            return updated_node
        new = self.table.get(func.attr.value)
        if new is None:
            return updated_node
        return updated_node.with_changes(func=func.with_changes(attr=cst.Name(new)))


Rewrite = Callable[["Calls.Visitor", cst.Call, cst.Call], cst.BaseExpression]
"""Takes the visitor, the call as it was and as it is; gives what stands in its place."""


@dataclass(frozen=True, slots=True)
class Calls:
    """A change of calls by functions of ours, by the full name of what is called."""

    table: Mapping[str, Rewrite]

    class Visitor(Resolving):
        """Hands each known call to its function."""

        def __init__(self, table: Mapping[str, Rewrite]) -> None:
            super().__init__()
            self.table = table

        def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
            rewrite = self.table.get(self.callee(original_node))
            return rewrite(self, original_node, updated_node) if rewrite else updated_node

    def __call__(self, tree: cst.Module) -> cst.Module:
        return visited(tree, Calls.Visitor(self.table))


def written(text: str, **parts: cst.BaseExpression) -> cst.BaseExpression:
    """An expression with others in the place of names."""
    return _filled(cst.parse_expression(text), parts)


def _filled(
    node: cst.BaseExpression, parts: Mapping[str, cst.BaseExpression]
) -> cst.BaseExpression:
    class Fill(cst.CSTTransformer):
        def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
            return parts.get(original_node.value, updated_node)

    found = node.visit(Fill())
    assert isinstance(found, cst.BaseExpression)
    return found


def plain(call: cst.Call, *names: str) -> Sequence[cst.BaseExpression | None] | None:
    """The values of a call's parameters in order, None for those left out; None if it is not plain.

    A call is plain if it has no star and no parameters beyond these.
    """
    found: dict[str, cst.BaseExpression] = {}
    for place, arg in enumerate(call.args):
        if arg.star:
            return None
        name = arg.keyword.value if arg.keyword else names[place] if place < len(names) else ""
        if name not in names or name in found:
            return None
        found[name] = arg.value
    return [found.get(name) for name in names]
