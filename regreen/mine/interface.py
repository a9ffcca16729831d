"""What modules offer: whether a release adds something, or only repairs what there was.

- Read from the syntax tree; nothing is imported.
- A public name is one without a leading underscore: of a module, of a class, or of a parameter.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence

Body = Sequence[ast.stmt]


def additions(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Public names that the files of `before` offer only in `after`, as `path:name`.

    A file that cannot be parsed in either says nothing.
    """
    found = []
    for path in sorted({*before} & {*after}):
        if path.endswith(".py") and before[path] != after[path]:
            new = offered(after[path]) - offered(before[path])
            found += [f"{path}:{name}" for name in sorted(new)]
    return found


def offered(source: bytes) -> frozenset[str]:
    """Dotted public names of a module; a parameter is `function(name)`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return frozenset()
    return frozenset(_names(tree.body, ""))


def _names(body: Body, prefix: str) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _of_function(node, prefix)
            case ast.ClassDef(name=name) if _public(name):
                yield f"{prefix}{name}"
                yield from _names(node.body, f"{prefix}{name}.")
            case ast.Assign(targets=targets):
                yield from (f"{prefix}{name}" for target in targets for name in _targets(target))
            case ast.AnnAssign(target=target):
                yield from (f"{prefix}{name}" for name in _targets(target))
            case ast.If() | ast.With():
                yield from _names([*node.body, *getattr(node, "orelse", ())], prefix)
            case ast.Try():
                inner = [statement for handler in node.handlers for statement in handler.body]
                every = [*node.body, *inner, *node.orelse, *node.finalbody]
                yield from _names(every, prefix)


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Iterator[str]:
    """A function and its parameters; of `__init__` only these, which are the class's."""
    if not _public(node.name) and node.name != "__init__":
        return
    name = f"{prefix}{node.name}"
    if _public(node.name):
        yield name
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    yield from (f"{name}({one.arg})" for one in every if _public(one.arg))


def _targets(target: ast.expr) -> Iterator[str]:
    match target:
        case ast.Name(id=name) if _public(name):
            yield name
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            for part in parts:
                yield from _targets(part)


def _public(name: str) -> bool:
    return not name.startswith("_")
