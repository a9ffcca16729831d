"""Names that moved: to another module, to another name, to an expression, or a whole module.

- `from old import X` becomes `from new import Y as X`: what the file calls it stays, so that uses
  and what others import from it stay as well.
- `old.X` becomes `new.Y`, with an import where one is needed and its name is free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import libcst as cst

from regreen.rules.resolve import (
    Resolving,
    dotted,
    module_of,
    statement,
    visited,
    without,
)


@dataclass(frozen=True, slots=True)
class At:
    """A name of a module."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Is:
    """An expression, and the modules that it needs, or whole `from` lines."""

    text: str
    modules: tuple[str, ...] = ()


Target = At | Is


def to(module: str, *names: str, **others: str) -> dict[str, At]:
    """Targets in one module: names that stay, and old names with their new ones."""
    return {name: At(module, name) for name in names} | {
        old: At(module, new) for old, new in others.items()
    }


def of(module: str, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Targets by the full name of what they replace."""
    return {f"{module}.{name}": target for name, target in targets.items()}


def renamed(module: str, **names: str) -> dict[str, Target]:
    """Names that are called otherwise in the same module."""
    return {f"{module}.{old}": At(module, new) for old, new in names.items()}


@dataclass(frozen=True, slots=True)
class Moves:
    """A change that moves names."""

    table: Mapping[str, Target]

    def __call__(self, tree: cst.Module) -> cst.Module:
        return visited(tree, _Mover(self.table))


class _Mover(Resolving):
    def __init__(self, table: Mapping[str, Target]) -> None:
        super().__init__()
        self.table = table

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        name = self.stands_for(original_node)
        target = self.table.get(name)
        if target is None or not self.read(original_node):
            return updated_node
        if isinstance(target, Is):
            known = [self.need(original_node, module) for module in target.modules]
            known = known or [self.free(original_node, _first_word(target.text))]
            return cst.parse_expression(target.text) if all(known) else updated_node
        if target.module == name.rpartition(".")[0]:
            return updated_node.with_changes(attr=cst.Name(target.name))
        if not self.need(original_node, target.module):
            return updated_node
        return dotted(f"{target.module}.{target.name}")

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel:
        small = original_node.body[0]
        if len(original_node.body) != 1 or not isinstance(small, cst.ImportFrom):
            return updated_node
        module = module_of(small)
        if not module:
            return updated_node
        assert not isinstance(small.names, cst.ImportStar)
        found = {
            place: self.table[f"{module}.{alias.evaluated_name}"]
            for place, alias in enumerate(small.names)
            if f"{module}.{alias.evaluated_name}" in self.table
        }
        if not found:
            return updated_node
        homes = {target.module for target in found.values() if isinstance(target, At)}
        whole = len(found) == len(small.names) and len(homes) == 1
        if whole and all(isinstance(target, At) for target in found.values()):
            names = [_called(a, found[p]) for p, a in enumerate(small.names)]
            moved = small.with_changes(module=dotted(homes.pop()), names=names)
            return updated_node.with_changes(body=[moved])
        return self._split(updated_node, small, found)

    def _split(
        self,
        line: cst.SimpleStatementLine,
        small: cst.ImportFrom,
        found: Mapping[int, Target],
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel:
        """What stays of the import, and lines of their own for what moved."""
        assert not isinstance(small.names, cst.ImportStar)
        aliases: Sequence[cst.ImportAlias] = small.names
        imports: dict[str, list[str]] = {}
        more: list[str] = []
        for place, target in found.items():
            local = aliases[place].evaluated_alias or aliases[place].evaluated_name
            if isinstance(target, At):
                called = "" if local == target.name else f" as {local}"
                imports.setdefault(target.module, []).append(f"{target.name}{called}")
            else:
                more += [m if m.startswith("from ") else f"import {m}" for m in target.modules]
                more += [f"{local} = {target.text}"] if local != target.text else []
        lines = [f"from {module} import {', '.join(names)}" for module, names in imports.items()]
        new = [statement(text) for text in (*lines, *dict.fromkeys(more))]
        kept = without(small, [aliases[place] for place in found])
        if kept.node is not None:
            return cst.FlattenSentinel([line.with_changes(body=[kept.node]), *new])
        if not new:
            return cst.RemoveFromParent()
        new[0] = new[0].with_changes(leading_lines=line.leading_lines)
        new[-1] = new[-1].with_changes(trailing_whitespace=line.trailing_whitespace)
        return cst.FlattenSentinel(new)


def _called(alias: cst.ImportAlias, target: Target) -> cst.ImportAlias:
    """The alias for a new name, under which the file still calls it what it did."""
    assert isinstance(target, At)
    local = alias.evaluated_alias or alias.evaluated_name
    if local == target.name:
        return alias.with_changes(name=cst.Name(target.name), asname=None)
    kept = alias.asname or cst.AsName(name=cst.Name(local))
    return alias.with_changes(name=cst.Name(target.name), asname=kept)


def _first_word(text: str) -> str:
    return text.lstrip("-(").partition(".")[0].partition("(")[0]


@dataclass(frozen=True, slots=True)
class Modules:
    """A change that moves whole modules, with all that is in them."""

    table: Mapping[str, str]
    leave: tuple[str, ...] = ()
    """Modules below an old one that stay."""

    def __call__(self, tree: cst.Module) -> cst.Module:
        return visited(tree, _ModuleMover(self))


class _ModuleMover(Resolving):
    def __init__(self, moves: Modules) -> None:
        super().__init__()
        self.moves = moves

    def _new(self, module: str) -> str:
        for old, new in self.moves.table.items():
            stays = any(module == one or module.startswith(f"{one}.") for one in self.moves.leave)
            if not stays and (module == old or module.startswith(f"{old}.")):
                return new + module[len(old) :]
        return ""

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom:
        self._parent_import = None
        module = module_of(original_node)
        new = self._new(module) if module else ""
        if not new:
            return updated_node
        assert not isinstance(original_node.names, cst.ImportStar)
        if any(f"{module}.{a.evaluated_name}" in self.moves.leave for a in original_node.names):
            return updated_node
        return updated_node.with_changes(module=dotted(new))

    def leave_ImportAlias(
        self, original_node: cst.ImportAlias, updated_node: cst.ImportAlias
    ) -> cst.ImportAlias:
        if isinstance(self._parent_import, cst.Import):
            new = self._new(original_node.evaluated_name)
            if new:
                return updated_node.with_changes(name=dotted(new))
        return updated_node

    _parent_import: cst.CSTNode | None = None

    def visit_Import(self, node: cst.Import) -> None:
        self._parent_import = node

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        self._parent_import = node

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        self._parent_import = None
        return updated_node

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        return self.stands_for(node) not in self.moves.leave

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        return self._moved(original_node, updated_node)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return self._moved(original_node, updated_node)

    def _moved(
        self, original: cst.Name | cst.Attribute, updated: cst.Name | cst.Attribute
    ) -> cst.BaseExpression:
        """`import old` binds the first part of a dotted name, so uses name the module in full."""
        written = cst.Module([]).code_for_node(original)
        if written not in self.moves.table or not self.read(original):
            return updated
        if self._parent_import is not None or self.stands_for(original) != written:
            return updated
        return dotted(self.moves.table[written])
