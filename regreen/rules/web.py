"""Rules for Flask and what it stands on: Werkzeug, Jinja, MarkupSafe, ItsDangerous, and WTForms."""

import libcst as cst

from regreen.rules.calls import Calls, plain, written
from regreen.rules.names import At, Is, Modules, Moves, of, renamed, to
from regreen.rules.resolve import Dropping, Resolving, visited
from regreen.rules.rule import Rule

_FLASK = "https://flask.palletsprojects.com/en/stable/changes/"
_WERKZEUG = "https://werkzeug.palletsprojects.com/en/stable/changes/"
_JINJA = "https://jinja.palletsprojects.com/en/stable/changes/"
_MARKUPSAFE = "https://markupsafe.palletsprojects.com/en/stable/changes/"
_ITSDANGEROUS = "https://itsdangerous.palletsprojects.com/en/stable/changes/"
_WTFORMS = "https://wtforms.readthedocs.io/en/stable/changes/"
_STACKS = ("_request_ctx_stack", "_app_ctx_stack")
_TOPS = {"flask._request_ctx_stack.top": "request_ctx", "flask._app_ctx_stack.top": "app_ctx"}
_EXTENSIONS = ("jinja2.ext.autoescape", "jinja2.ext.with_")


class _Stacks(Resolving):
    """`_request_ctx_stack.top` is the context itself, or None outside of any."""

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        names = [
            n.replace("flask.globals.", "flask.", 1) for n in self.may_stand_for(original_node)
        ]
        tops = [_TOPS.get(name) for name in names]  # two where one is imported if the other is not
        new = tops[0] if tops and all(tops) else None
        if new is None or not self.read(original_node) or not self.free(original_node, new):
            return updated_node
        self.needed[f"from flask.globals import {new}"] = None
        text = f"({new}._get_current_object() if {new} else None)"
        return cst.parse_expression(text)


class _Extensions(cst.CSTTransformer):
    """Names of extensions that are built in, in lists of them."""

    def _left(self, node: "cst.List | cst.Tuple | cst.Set") -> list[cst.BaseElement] | None:
        left = [e for e in node.elements if not _is_text(e.value, _EXTENSIONS)]
        if len(left) == len(node.elements) or (isinstance(node, cst.Set) and not left):
            return None
        if left and node.elements[-1] is not left[-1]:
            left[-1] = left[-1].with_changes(comma=node.elements[-1].comma)
        return left

    def leave_List(self, original_node: cst.List, updated_node: cst.List) -> cst.List:
        left = self._left(updated_node)
        return updated_node if left is None else updated_node.with_changes(elements=left)

    def leave_Tuple(self, original_node: cst.Tuple, updated_node: cst.Tuple) -> cst.Tuple:
        left = self._left(updated_node)
        if left is None or len(left) < 2:
            return updated_node
        return updated_node.with_changes(elements=left)


class _Json(Resolving):
    """`request.get_json()` and `request.json` were None where the request has another type."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if self.callee(original_node) != "flask.request.get_json" or original_node.args:
            return updated_node
        return _if_json(updated_node, updated_node.func)

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        if self.stands_for(original_node) != "flask.request.json" or not self.read(original_node):
            return updated_node
        return _if_json(updated_node, updated_node)

    def visit_IfExp(self, node: cst.IfExp) -> bool:
        return not isinstance(node.test, cst.Attribute) or node.test.attr.value != "is_json"


def _if_json(asked: cst.BaseExpression, of: cst.BaseExpression) -> cst.BaseExpression:
    if not isinstance(of, cst.Attribute):
        return asked
    return written("(A if R.is_json else None)", A=asked, R=of.value)


def _json(tree: cst.Module) -> cst.Module:
    return visited(tree, _Json())


def _is_text(node: cst.BaseExpression, texts: tuple[str, ...]) -> bool:
    return isinstance(node, cst.SimpleString) and node.evaluated_value in texts


def _stacks(tree: cst.Module) -> cst.Module:
    return visited(tree, _Stacks())


def _extensions(tree: cst.Module) -> cst.Module:
    return tree.visit(_Extensions())


def _url_decode(
    visitor: Calls.Visitor, original: cst.Call, updated: cst.Call
) -> cst.BaseExpression:
    """A query, of text or bytes, as the dictionary of many values that it was."""
    words = ("s", "charset", "errors", "cls")
    if sum(arg.keyword is None for arg in updated.args) > 2:  # later ones changed their places
        return updated
    found = plain(updated, *words)
    if found is None or found[0] is None or not visitor.free(original, "query"):
        return updated
    if not all(visitor.need(original, m) for m in ("urllib.parse", "werkzeug.datastructures")):
        return updated
    text, options = "query if isinstance(query := S, str) else query.decode(E, R)", ""
    options += ", encoding=E" if found[1] is not None else ""
    options += ", errors=R" if found[2] is not None else ""
    made = "(C or werkzeug.datastructures.MultiDict)" if found[3] is not None else _MULTI
    charset = found[1] or cst.SimpleString('"utf-8"')
    errors = found[2] or cst.SimpleString('"replace"')
    whole = f"{made}(urllib.parse.parse_qsl({text}, keep_blank_values=True{options}))"
    parts = {"S": found[0], "E": charset, "R": errors}
    return written(whole, **parts, **({"C": found[3]} if found[3] is not None else {}))


_MULTI = "werkzeug.datastructures.MultiDict"


def _url_encode(
    visitor: Calls.Visitor, original: cst.Call, updated: cst.Call
) -> cst.BaseExpression:
    """All values of a dictionary of many, without those that are None, sorted if that is asked."""
    found = plain(updated, "obj", "sort")
    if found is None or found[0] is None:
        return updated
    order = found[1]
    if order is not None and not (isinstance(order, cst.Name) and order.value in _SORTS):
        return updated
    if not all(visitor.need(original, m) for m in ("urllib.parse", "werkzeug.datastructures")):
        return updated
    pairs = "[(k, v) for k, v in werkzeug.datastructures.iter_multi_items(O) if v is not None]"
    if isinstance(order, cst.Name) and order.value == "True":
        pairs = f"sorted({pairs})"
    return written(f"urllib.parse.urlencode({pairs})", O=found[0])


_SORTS = ("True", "False")
_FROM_TOP = {
    "werkzeug.security": "generate_password_hash check_password_hash safe_join",
    "werkzeug.utils": "secure_filename cached_property import_string find_modules redirect",
    "werkzeug.datastructures": "MultiDict CombinedMultiDict ImmutableMultiDict Headers FileStorage "
    "EnvironHeaders ImmutableDict Accept Authorization CallbackDict TypeConversionDict",
    "werkzeug.wrappers": "Request Response BaseRequest BaseResponse",
    "werkzeug.urls": "url_encode url_decode url_quote url_unquote url_quote_plus url_unquote_plus "
    "url_fix iri_to_uri uri_to_iri Href",
    "werkzeug.exceptions": "abort Aborter",
    "werkzeug.test": "Client EnvironBuilder create_environ run_wsgi_app",
    "werkzeug.serving": "run_simple",
    "werkzeug.http": "http_date parse_date parse_options_header dump_cookie parse_cookie "
    "generate_etag quote_etag unquote_etag is_resource_modified HTTP_STATUS_CODES",
    "werkzeug.wsgi": "wrap_file get_host get_current_url ClosingIterator FileWrapper "
    "responder pop_path_info peek_path_info",
    "werkzeug.local": "Local LocalManager LocalProxy LocalStack release_local",
}

_ENCODER = Is(
    'type("JSONEncoder", (PlainJSONEncoder,), '
    '{"default": lambda self, o: DefaultJSONProvider.default(o)})',
    (
        "from json import JSONEncoder as PlainJSONEncoder",
        "from flask.json.provider import DefaultJSONProvider",
    ),
)
"""Both turn dates, decimals, UUIDs, data classes and objects with `__html__` to text alike."""

RULES = (
    Rule(
        name="flask-markup", culprit="flask", since="2.3.0", gone="3.0.0",
        source=f"{_FLASK}#version-2-3-0", heading="Version 2.3.0",
        what="escape and Markup come from markupsafe",
        signs=("Markup", "escape"),
        changes=(Moves(of("flask", to("markupsafe", "Markup", "escape"))),),
    ),
    Rule(
        name="flask-context-stacks", culprit="flask", since="2.2.0", gone="2.3.0",
        source=f"{_FLASK}#version-2-2-0", heading="Version 2.2.0",
        what="the top of a context stack is the context in flask.globals",
        signs=("_request_ctx_stack", "_app_ctx_stack"),
        changes=(_stacks, *(Dropping(m, _STACKS) for m in ("flask", "flask.globals"))),
    ),
    Rule(
        name="flask-json-encoder", culprit="flask", since="2.2.0", gone="2.3.0",
        source=f"{_FLASK}#version-2-2-0", heading="Version 2.2.0",
        what="what Flask's encoder did beyond that of json is done by the JSON provider",
        signs=("JSONEncoder", "json_encoder"),
        changes=(Moves({
            "flask.json.JSONEncoder": _ENCODER, "flask.current_app.json_encoder": _ENCODER,
        }),),
    ),
    Rule(
        name="flask-version", culprit="flask", since="3.0.0", gone="3.2.0",
        source=f"{_FLASK}#version-3-0-0", heading="Version 3.0.0",
        what="the version is asked of importlib.metadata",
        signs=("__version__",),
        changes=(Moves({
            "flask.__version__": Is('importlib.metadata.version("flask")', ("importlib.metadata",)),
        }),),
    ),
    Rule(
        name="werkzeug-top-level", culprit="werkzeug", since="0.16.0", gone="1.0.0",
        source=f"{_WERKZEUG}#version-1-0-0", heading="Version 1.0.0",
        what="names come from the module that defines them",
        signs=("werkzeug",),
        changes=(Moves({
            f"werkzeug.{name}": At(module, name)
            for module, names in _FROM_TOP.items() for name in names.split()
        }),),
    ),
    Rule(
        name="werkzeug-safe-str-cmp", culprit="werkzeug", since="2.0.0", gone="2.1.0",
        source=f"{_WERKZEUG}#version-2-1-0", heading="Version 2.1.0",
        what="strings are compared by hmac.compare_digest",
        signs=("safe_str_cmp",),
        changes=(Moves(of("werkzeug.security", to("hmac", safe_str_cmp="compare_digest"))),),
    ),
    Rule(
        name="werkzeug-base-wrappers", culprit="werkzeug", since="2.0.0", gone="2.1.0",
        source=f"{_WERKZEUG}#version-2-0-0", heading="Version 2.0.0",
        what="BaseRequest and BaseResponse are Request and Response",
        signs=("BaseRequest", "BaseResponse"),
        changes=(Moves({
            **renamed("werkzeug.wrappers", BaseRequest="Request", BaseResponse="Response"),
            "werkzeug.wrappers.base_request.BaseRequest": At("werkzeug.wrappers", "Request"),
            "werkzeug.wrappers.base_response.BaseResponse": At("werkzeug.wrappers", "Response"),
        }),),
    ),
    Rule(
        name="werkzeug-escape", culprit="werkzeug", since="2.0.0", gone="2.1.0",
        source=f"{_WERKZEUG}#version-2-1-0", heading="Version 2.1.0",
        what="escape comes from markupsafe, unescape from html",
        signs=("escape", "unescape"),
        changes=(Moves({
            "werkzeug.utils.escape": At("markupsafe", "escape"),
            "werkzeug.utils.unescape": At("html", "unescape"),
        }),),
    ),
    Rule(
        name="werkzeug-urls", culprit="werkzeug", since="2.3.0", gone="3.0.0",
        source=f"{_WERKZEUG}#version-2-3-0", heading="Version 2.3.0",
        what="functions on addresses come from urllib.parse",
        signs=("url_quote", "url_quote_plus", "url_unquote", "url_unquote_plus",
               "url_parse", "url_join", "url_unparse"),
        changes=(Moves(of("werkzeug.urls", to(
            "urllib.parse", url_quote="quote", url_quote_plus="quote_plus", url_unquote="unquote",
            url_unquote_plus="unquote_plus", url_parse="urlsplit",
            url_join="urljoin", url_unparse="urlunsplit",
        ))),),
    ),
    Rule(
        name="werkzeug-url-queries", culprit="werkzeug", since="2.3.0", gone="3.0.0",
        source=f"{_WERKZEUG}#version-2-3-0", heading="Version 2.3.0",
        what="a query is parsed and made by urllib.parse",
        signs=("url_decode", "url_encode"),
        changes=(
            Calls({"werkzeug.urls.url_decode": _url_decode,
                   "werkzeug.urls.url_encode": _url_encode}),
            Dropping("werkzeug.urls", ("url_decode", "url_encode")),
        ),
    ),
    Rule(
        name="werkzeug-from-header", culprit="werkzeug", since="2.3.0", gone="3.0.0",
        source=f"{_WERKZEUG}#version-2-3-0", heading="Version 2.3.0",
        what="headers of authorization are read by from_header",
        signs=("parse_authorization_header", "parse_www_authenticate_header"),
        changes=(Moves({
            "werkzeug.http.parse_authorization_header":
                Is("werkzeug.datastructures.Authorization.from_header",
                   ("werkzeug.datastructures",)),
            "werkzeug.http.parse_www_authenticate_header":
                Is("werkzeug.datastructures.WWWAuthenticate.from_header",
                   ("werkzeug.datastructures",)),
        }),),
    ),
    Rule(
        name="werkzeug-get-json", culprit="werkzeug", since="2.1.0", gone="2.1.0",
        source=f"{_WERKZEUG}#version-2-1-0", heading="Version 2.1.0",
        what="what is no JSON is not asked for as JSON",
        signs=("get_json", "json"),
        changes=(_json,),
    ),
    Rule(
        name="werkzeug-version", culprit="werkzeug", since="3.0.0", gone="3.1.0",
        source=f"{_WERKZEUG}#version-3-0-0", heading="Version 3.0.0",
        what="the version is asked of importlib.metadata",
        signs=("__version__",),
        changes=(Moves({
            "werkzeug.__version__":
                Is('importlib.metadata.version("werkzeug")', ("importlib.metadata",)),
        }),),
    ),
    Rule(
        name="jinja2-pass-context", culprit="jinja2", since="3.0.0", gone="3.1.0",
        source=f"{_JINJA}#version-3-1-0", heading="Version 3.1.0",
        what="decorators that pass a context have one name each",
        signs=("contextfilter", "contextfunction", "evalcontextfilter", "evalcontextfunction",
               "environmentfilter", "environmentfunction"),
        changes=(Moves({
            f"{module}.{old}": At("jinja2", new)
            for module in ("jinja2", "jinja2.filters", "jinja2.utils")
            for old, new in {
                "contextfilter": "pass_context", "contextfunction": "pass_context",
                "evalcontextfilter": "pass_eval_context",
                "evalcontextfunction": "pass_eval_context",
                "environmentfilter": "pass_environment",
                "environmentfunction": "pass_environment",
            }.items()
        }),),
    ),
    Rule(
        name="jinja2-markup", culprit="jinja2", since="3.0.0", gone="3.1.0",
        source=f"{_JINJA}#version-3-1-0", heading="Version 3.1.0",
        what="Markup and escape come from markupsafe",
        signs=("Markup", "escape", "soft_unicode", "soft_str"),
        changes=(Moves({
            **of("jinja2", to("markupsafe", "Markup", "escape")),
            **of("jinja2.utils", to("markupsafe", "Markup", "escape", soft_unicode="soft_str")),
            **of("jinja2.filters", to("markupsafe", "Markup", "escape", soft_unicode="soft_str")),
        }),),
    ),
    Rule(
        name="jinja2-built-in-extensions", culprit="jinja2", since="3.0.0", gone="3.1.0",
        source=f"{_JINJA}#version-3-1-0", heading="Version 3.1.0",
        what="autoescape and with are no extensions",
        signs=("autoescape", "with_"),
        changes=(_extensions,),
    ),
    Rule(
        name="markupsafe-soft-str", culprit="markupsafe", since="2.0.0", gone="2.1.0",
        source=f"{_MARKUPSAFE}#version-2-1-0", heading="Version 2.1.0",
        what="soft_unicode is soft_str",
        signs=("soft_unicode",),
        changes=(Moves(renamed("markupsafe", soft_unicode="soft_str")),),
    ),
    Rule(
        name="itsdangerous-json", culprit="itsdangerous", since="2.0.0", gone="2.1.0",
        source=f"{_ITSDANGEROUS}#version-2-1-0", heading="Version 2.1.0",
        what="json is that of the standard library",
        signs=("json",),
        changes=(Moves({"itsdangerous.json": Is("json", ("json",))}),),
    ),
    Rule(
        name="wtforms-names", culprit="wtforms", since="3.0.0a1", gone="3.0.0a1",
        source=f"{_WTFORMS}#version-3-0-0a1", heading="Version 3.0.0a1",
        what="HTMLString is markupsafe.Markup, TextField StringField, fields of HTML 5 are fields",
        signs=("HTMLString", "TextField", "html5", "text_type", "string_types"),
        changes=(
            Moves({
                "wtforms.widgets.HTMLString": At("markupsafe", "Markup"),
                "wtforms.widgets.core.HTMLString": At("markupsafe", "Markup"),
                **renamed("wtforms", TextField="StringField"),
                **renamed("wtforms.fields", TextField="StringField"),
                **renamed("wtforms.fields.core", TextField="StringField"),
                "wtforms.compat.text_type": Is("str"),
                "wtforms.compat.string_types": Is("(str,)"),
            }),
            Modules({"wtforms.fields.html5": "wtforms.fields",
                     "wtforms.widgets.html5": "wtforms.widgets"}),
        ),
    ),
)  # fmt: skip
