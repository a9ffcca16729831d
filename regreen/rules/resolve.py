"""Visitors that know what a name stands for, and the handling of imports.

- A name stands for something only if every binding that may be in force is the same import;
  anything that is bound otherwise as well is left alone.
- Only what is read is rewritten, never what is assigned or deleted.
- A top-level name that the file uses for something else is never taken for an import.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import libcst as cst
from libcst import metadata as meta

Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement


class Resolving(cst.CSTTransformer):
    """A transformer that resolves names and collects the imports that its changes need."""

    METADATA_DEPENDENCIES = (
        meta.QualifiedNameProvider,
        meta.ScopeProvider,
        meta.ExpressionContextProvider,
    )

    def __init__(self) -> None:
        super().__init__()
        self.needed: dict[str, None] = {}

    def stands_for(self, node: cst.CSTNode) -> str:
        """The dotted name of what is imported here; empty if that is unsure."""
        found = self.may_stand_for(node)
        return found[0] if len(found) == 1 else ""

    def may_stand_for(self, node: cst.CSTNode) -> list[str]:
        """What may be imported here, if it is sure to be an import."""
        names = self.get_metadata(meta.QualifiedNameProvider, node, set())
        found = list(names() if callable(names) else names or ())
        if any(one.source is not meta.QualifiedNameSource.IMPORT for one in found):
            return []
        return sorted(str(one.name) for one in found)

    def callee(self, call: cst.Call) -> str:
        """What a call calls; empty if that is unsure."""
        return self.stands_for(call.func)

    def read(self, node: cst.CSTNode) -> bool:
        """Whether a node is read, not assigned or deleted."""
        context = self.get_metadata(meta.ExpressionContextProvider, node, None)
        return context in (None, meta.ExpressionContext.LOAD)

    def free(self, node: cst.CSTNode, name: str, module: str = "") -> bool:
        """Whether a name is bound to nothing, or to that module alone, wherever it may be seen."""
        scope = self.get_metadata(meta.ScopeProvider, node, None)
        if not isinstance(scope, meta.Scope):
            return False
        return all(_is_module(bound, module) for bound in scope[name])

    def need(self, node: cst.CSTNode, module: str) -> bool:
        """Ask for `import module`, or for a whole `from` line; false where its name is taken."""
        if module.startswith("from "):
            if not self.free(node, module.split()[-1]):
                return False
            self.needed[module] = None
            return True
        if not self.free(node, module.partition(".")[0], module):
            return False
        self.needed[f"import {module}"] = None
        return True

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.BaseSuite:
        return _filled(updated_node)

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        return with_imports(updated_node, self.needed)


def _is_module(bound: meta.BaseAssignment, module: str) -> bool:
    """Whether a binding is a builtin, or the import of a module or of its package."""
    if isinstance(bound, meta.BuiltinAssignment):
        return True
    if not module or not isinstance(bound, meta.ImportAssignment):
        return False
    node = bound.node
    if not isinstance(node, cst.Import):
        return False
    top = module.partition(".")[0]
    names = [alias for alias in node.names if _local(alias) == top]
    return all(alias.asname is None or alias.evaluated_name == top for alias in names)


def _local(alias: cst.ImportAlias) -> str:
    """The name that an alias of a plain import binds."""
    return alias.evaluated_alias or alias.evaluated_name.partition(".")[0]


def dotted(name: str) -> cst.Name | cst.Attribute:
    """An expression of a dotted name."""
    found: cst.Name | cst.Attribute | None = None
    for part in name.split("."):
        found = cst.Name(part) if found is None else cst.Attribute(found, cst.Name(part))
    assert found is not None
    return found


def module_of(node: cst.ImportFrom) -> str:
    """The module of an absolute import without a star; empty for others."""
    if node.relative or node.module is None or isinstance(node.names, cst.ImportStar):
        return ""
    return cst.Module([]).code_for_node(node.module)


def statement(text: str) -> cst.SimpleStatementLine:
    """One line as a statement."""
    found = cst.parse_statement(text)
    assert isinstance(found, cst.SimpleStatementLine)
    return found


def with_imports(module: cst.Module, lines: Iterable[str]) -> cst.Module:
    """The module with these import lines after its first import, where it lacks them."""
    body = list(module.body)
    have = {module.code_for_node(s).strip() for s in body if isinstance(s, cst.SimpleStatementLine)}
    new = [statement(line) for line in lines if line not in have]
    if not new:
        return module
    at = 0
    for place, one in enumerate(body):
        if not isinstance(one, cst.SimpleStatementLine):
            break
        small = one.body[0]
        if isinstance(small, cst.Import) or (
            isinstance(small, cst.ImportFrom) and module_of(small) != "__future__"
        ):
            at = place + 1
            break
        docstring = place == 0 and isinstance(small, cst.Expr)
        if docstring or isinstance(small, cst.ImportFrom):
            at = place + 1
    if at == 0 and body:  # comments before the first statement stay in front
        first = body[0]
        new[0] = new[0].with_changes(leading_lines=getattr(first, "leading_lines", ()))
        body[0] = first.with_changes(leading_lines=())
    return module.with_changes(body=[*body[:at], *new, *body[at:]])


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of an import after some of its names were taken out."""

    node: cst.ImportFrom | None


def without(node: cst.ImportFrom, gone: Sequence[cst.ImportAlias]) -> Kept:
    """An import without some of its names; the layout of the others stays."""
    assert not isinstance(node.names, cst.ImportStar)
    names = [alias for alias in node.names if all(alias is not one for one in gone)]
    if not names:
        return Kept(None)
    if node.names[-1] is not names[-1]:
        names[-1] = names[-1].with_changes(comma=node.names[-1].comma)
    return Kept(node.with_changes(names=names))


class _Unused(cst.CSTTransformer):
    """Takes out imports that nothing refers to."""

    METADATA_DEPENDENCIES = (meta.ScopeProvider,)

    def __init__(self, module: str, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def _goes(self, node: cst.Import | cst.ImportFrom, alias: cst.ImportAlias) -> bool:
        """Whether an import is of these, and nothing refers to what it binds."""
        scope = self.get_metadata(meta.ScopeProvider, node, None)
        if not isinstance(scope, meta.Scope):
            return False
        if self.names and alias.evaluated_name not in self.names:
            return False
        whole = isinstance(node, cst.Import)
        name = _local(alias) if whole else alias.evaluated_alias or alias.evaluated_name
        return not any(len(bound.references) for bound in scope.assignments[name])

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        small = original_node.body[0]
        if len(original_node.body) != 1:
            return updated_node
        if isinstance(small, cst.Import) and len(small.names) == 1 and not self.names:
            alias = small.names[0]
            mine = alias.evaluated_name == self.module
            return cst.RemoveFromParent() if mine and self._goes(small, alias) else updated_node
        if not isinstance(small, cst.ImportFrom) or module_of(small) != self.module:
            return updated_node
        assert not isinstance(small.names, cst.ImportStar)
        gone = [alias for alias in small.names if self._goes(small, alias)]
        kept = without(small, gone)
        if kept.node is None:
            return cst.RemoveFromParent()
        return updated_node.with_changes(body=[kept.node]) if gone else updated_node

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.BaseSuite:
        return _filled(updated_node)


def _filled(block: cst.IndentedBlock) -> cst.BaseSuite:
    """A block that is never empty."""
    return block if block.body else block.with_changes(body=[statement("pass")])


@dataclass(frozen=True, slots=True)
class Dropping:
    """A change that takes out imports from a module that nothing refers to: these names, or all."""

    module: str
    names: tuple[str, ...] = ()

    def __call__(self, tree: cst.Module) -> cst.Module:
        return visited(tree, _Unused(self.module, self.names))


def visited(tree: cst.Module, visitor: cst.CSTTransformer) -> cst.Module:
    """The module as a visitor leaves it."""
    return meta.MetadataWrapper(tree, unsafe_skip_copy=True).visit(visitor)
