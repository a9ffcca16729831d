"""Rules for what builds, documents, packages and tests: setuptools, click, Markdown, and others."""

import libcst as cst

from regreen.rules.calls import Calls, Keywords, Methods, plain, written
from regreen.rules.names import At, Is, Modules, Moves, Target, of, renamed, to
from regreen.rules.resolve import Dropping, Resolving, visited
from regreen.rules.rule import Rule

_PYTHON = "https://docs.python.org/3/whatsnew"


class _PkgResources(Resolving):
    """What asks pkg_resources of distributions and of files beside modules."""

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        call = original_node.value
        if original_node.attr.value != "version" or not isinstance(call, cst.Call):
            return updated_node
        if self.callee(call) != "pkg_resources.get_distribution":
            return updated_node
        found = plain(call, "dist")
        if found is None or found[0] is None or not self.need(call, "importlib.metadata"):
            return updated_node
        return written("importlib.metadata.version(D)", D=found[0])

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        name = self.callee(original_node)
        if name == "pkg_resources.iter_entry_points":
            return self._entry_points(original_node, updated_node)
        text = {
            "pkg_resources.resource_filename": "str(importlib.resources.files(P).joinpath(R))",
            "pkg_resources.resource_string":
                "importlib.resources.files(P).joinpath(R).read_bytes()",
            "pkg_resources.resource_stream":
                'importlib.resources.files(P).joinpath(R).open("rb")',
        }.get(name)  # fmt: skip
        found = plain(updated_node, "package_or_requirement", "resource_name")
        if text is None or found is None or found[0] is None or found[1] is None:
            return updated_node
        package = found[0]
        if isinstance(package, cst.Name) and package.value == "__name__":
            package = cst.Name("__package__")  # pkg_resources looks beside the module
        elif not isinstance(package, cst.SimpleString):
            return updated_node
        if not self.need(original_node, "importlib.resources"):
            return updated_node
        return written(text, P=package, R=found[1])

    def _entry_points(self, original: cst.Call, updated: cst.Call) -> cst.BaseExpression:
        found = plain(updated, "group", "name")
        if found is None or found[0] is None or not self.need(original, "importlib.metadata"):
            return updated
        if found[1] is None:
            return written("importlib.metadata.entry_points(group=G)", G=found[0])
        return written("importlib.metadata.entry_points(group=G, name=N)", G=found[0], N=found[1])


class _Namespaces(cst.CSTTransformer):
    """`__import__("pkg_resources").declare_namespace(__name__)`, as namespaces were declared."""

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine:
        text = cst.Module([original_node]).code.replace('"', "'").strip()
        if text != "__import__('pkg_resources').declare_namespace(__name__)":
            return updated_node
        new = '__path__ = __import__("pkgutil").extend_path(__path__, __name__)'
        return updated_node.with_changes(body=cst.parse_statement(new).body)  # type: ignore[union-attr]


class _EntryPoints(Resolving):
    """`entry_points().get(G, ...)` and `entry_points()[G]` are `entry_points(group=G)`."""

    MODULES = ("importlib_metadata", "importlib.metadata")

    def _whole(self, node: cst.BaseExpression) -> cst.Call | None:
        """A call of entry_points that asks for all of them."""
        if not isinstance(node, cst.Call) or node.args:
            return None
        return node if self.callee(node) in [f"{m}.entry_points" for m in self.MODULES] else None

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        func = original_node.func
        if not isinstance(func, cst.Attribute) or func.attr.value != "get":
            return updated_node
        call = self._whole(func.value)
        found = plain(updated_node, "key", "default")
        if call is None or found is None or found[0] is None:
            return updated_node
        return written("F(group=G)", F=call.func, G=found[0])

    def leave_Subscript(
        self, original_node: cst.Subscript, updated_node: cst.Subscript
    ) -> cst.BaseExpression:
        call = self._whole(original_node.value)
        inside = updated_node.slice[0].slice
        if call is None or len(updated_node.slice) != 1 or not isinstance(inside, cst.Index):
            return updated_node
        return written("F(group=G)", F=call.func, G=inside.value)


class _Extend(Resolving):
    """`extendMarkdown(self, md, md_globals)` takes no globals."""

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        params = updated_node.params.params
        if original_node.name.value != "extendMarkdown" or len(params) != 3:
            return updated_node
        used = _Names()
        original_node.body.visit(used)
        if params[2].name.value in used.seen:
            return updated_node
        kept = [params[0], params[1].with_changes(comma=cst.MaybeSentinel.DEFAULT)]
        return updated_node.with_changes(params=updated_node.params.with_changes(params=kept))


class _Names(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def visit_Name(self, node: cst.Name) -> None:
        self.seen.add(node.value)


def _loader(visitor: Calls.Visitor, original: cst.Call, updated: cst.Call) -> cst.BaseExpression:
    """`yaml.load(stream)` used the full loader."""
    found = plain(updated, "stream", "Loader")
    func = updated.func
    if found is None or found[0] is None or found[1] is not None:
        return updated
    if not isinstance(func, cst.Attribute):
        return updated
    return written("F(S, Loader=M.FullLoader)", F=func, S=found[0], M=func.value)


def _pkg_resources(tree: cst.Module) -> cst.Module:
    return visited(tree.visit(_Namespaces()), _PkgResources())


def _entry_points(tree: cst.Module) -> cst.Module:
    return visited(tree, _EntryPoints())


def _extend(tree: cst.Module) -> cst.Module:
    return visited(tree, _Extend())


_ABCS = (
    "Awaitable Coroutine AsyncIterable AsyncIterator AsyncGenerator Hashable Iterable Iterator "
    "Generator Reversible Sized Container Callable Collection Set MutableSet Mapping "
    "MutableMapping MappingView KeysView ItemsView ValuesView Sequence MutableSequence ByteString"
)

_ERRORS: dict[str, Target] = {
    "ErrorString": At("docutils.io", "error_string"),
    "SafeString": Is("str"),
}

RULES = (
    Rule(
        name="setuptools-pkg-resources", culprit="setuptools", since="67.5.0", gone="82.0.0",
        source="https://setuptools.pypa.io/en/stable/history.html#v82-0-0", heading="v82.0.0",
        what="importlib.metadata and importlib.resources take the place of pkg_resources",
        signs=("pkg_resources",),
        changes=(
            _pkg_resources,
            Moves({
                "pkg_resources.DistributionNotFound":
                    At("importlib.metadata", "PackageNotFoundError"),
                "pkg_resources.parse_version": At("packaging.version", "parse"),
            }),
            Dropping("pkg_resources"),
        ),
    ),
    Rule(
        name="importlib-metadata-entry-points", culprit="importlib-metadata", since="3.6.0",
        gone="5.0.0",
        source="https://importlib-metadata.readthedocs.io/en/latest/history.html#v5-0-0",
        heading="v5.0.0",
        what="entry points of a group are asked for by its name",
        signs=("entry_points",),
        changes=(_entry_points,),
    ),
    Rule(
        name="click-names", culprit="click", since="8.0.0", gone="8.1.0",
        source="https://click.palletsprojects.com/en/stable/changes/#version-8-1-0",
        heading="Version 8.1.0",
        what="resultcallback is result_callback, the size of a terminal is asked of shutil",
        signs=("resultcallback", "get_terminal_size"),
        changes=(
            Methods("click", {"resultcallback": "result_callback"}),
            Moves(of("click", to("shutil", "get_terminal_size"))),
        ),
    ),
    Rule(
        name="click-8-2-commands", culprit="click", since="8.2.0", gone="9.0.0",
        source="https://click.palletsprojects.com/en/stable/changes/#version-8-2-0",
        heading="Version 8.2.0",
        what="BaseCommand and MultiCommand are Command and Group",
        signs=("BaseCommand", "MultiCommand"),
        changes=(Moves({
            **renamed("click", BaseCommand="Command", MultiCommand="Group"),
            **renamed("click.core", BaseCommand="Command", MultiCommand="Group"),
        }),),
    ),
    Rule(
        name="click-8-2-runner", culprit="click", since="8.2.0", gone="8.2.0",
        source="https://click.palletsprojects.com/en/stable/changes/#version-8-2-0",
        heading="Version 8.2.0",
        what="CliRunner always keeps its two outputs apart",
        signs=("mix_stderr",),
        changes=(Keywords({"click.testing.CliRunner": {"mix_stderr": None}}),),
    ),
    Rule(
        name="markdown-names", culprit="markdown", since="3.2", gone="3.4",
        source="https://python-markdown.github.io/changelog/#340-2022-07-15", heading="3.4.0",
        what="old objects are those that took their place",
        signs=("version", "version_info", "etree", "string_type", "text_type", "int2str",
               "iterrange"),
        changes=(Moves({
            **renamed("markdown", version="__version__", version_info="__version_info__"),
            "markdown.util.etree": At("xml.etree", "ElementTree"),
            "markdown.util.string_type": Is("str"), "markdown.util.text_type": Is("str"),
            "markdown.util.int2str": Is("chr"), "markdown.util.iterrange": Is("range"),
        }),),
    ),
    Rule(
        name="markdown-md-globals", culprit="markdown", since="3.0", gone="3.4",
        source="https://python-markdown.github.io/changelog/#340-2022-07-15", heading="3.4.0",
        what="extendMarkdown takes no globals",
        signs=("extendMarkdown",),
        changes=(_extend,),
    ),
    Rule(
        name="docutils-error-string", culprit="docutils", since="0.19", gone="0.19",
        source="https://docutils.sourceforge.io/HISTORY.html#release-0-19-2022-07-05",
        heading="Release 0.19 (2022-07-05)",
        what="errors are told by docutils.io.error_string, strings are safe",
        signs=("ErrorString", "SafeString"),
        changes=(Moves({
            f"docutils.{module}.{old}": new
            for module in ("core", "utils", "utils.error_reporting", "statemachine", "io")
            for old, new in _ERRORS.items()
        }),),
    ),
    Rule(
        name="sphinx-display", culprit="sphinx", since="6.1", gone="8.0.0",
        source="https://www.sphinx-doc.org/en/master/changes/8.0.html",
        heading="Incompatible changes",
        what="progress is shown by sphinx.util.display",
        signs=("status_iterator", "progress_message", "SkipProgressMessage", "display_chunk"),
        changes=(Moves(of("sphinx.util", to(
            "sphinx.util.display", "status_iterator", "progress_message", "SkipProgressMessage",
            "display_chunk",
        ))),),
    ),
    Rule(
        name="pyyaml-loader", culprit="pyyaml", since="5.1", gone="6.0",
        source="https://github.com/yaml/pyyaml/blob/main/CHANGES", heading="6.0 (2021-10-13)",
        what="load names its loader",
        signs=("load", "load_all"),
        changes=(Calls({"yaml.load": _loader, "yaml.load_all": _loader}),),
    ),
    Rule(
        name="pyparsing-names", culprit="pyparsing", since="3.0.0", gone="3.0.0",
        source="https://github.com/pyparsing/pyparsing/blob/master/CHANGES",
        heading="Version 3.0.0",
        what="operatorPrecedence is infixNotation",
        signs=("operatorPrecedence",),
        changes=(Moves(renamed("pyparsing", operatorPrecedence="infixNotation")),),
    ),
    Rule(
        name="python-collections-abc", culprit="python", since="3.3", gone="3.10",
        source=f"{_PYTHON}/3.10.html", heading="Removed",
        what="abstract classes come from collections.abc",
        signs=("collections",),
        changes=(Moves(of("collections", to("collections.abc", *_ABCS.split()))),),
    ),
    Rule(
        name="python-getargspec", culprit="python", since="3.3", gone="3.11",
        source=f"{_PYTHON}/3.11.html", heading="Removed",
        what="getargspec is getfullargspec",
        signs=("getargspec",),
        changes=(Moves(renamed("inspect", getargspec="getfullargspec")),),
    ),
    Rule(
        name="python-moved", culprit="python", since="3.5", gone="3.9",
        source=f"{_PYTHON}/3.9.html", heading="Removed",
        what="ElementTree has no second name, gcd is in math",
        signs=("cElementTree", "gcd"),
        changes=(
            Moves({
                "fractions.gcd": At("math", "gcd"),
                "xml.etree.cElementTree": At("xml.etree", "ElementTree"),
            }),
            Modules({"xml.etree.cElementTree": "xml.etree.ElementTree"}),
        ),
    ),
    Rule(
        name="python-quote", culprit="python", since="3.3", gone="3.13",
        source=f"{_PYTHON}/3.13.html", heading="Removed Modules And APIs",
        what="quote is in shlex",
        signs=("pipes",),
        changes=(Moves({"pipes.quote": At("shlex", "quote")}), Dropping("pipes")),
    ),
)  # fmt: skip
