"""Rules for clients, tokens, checks of data and concurrency: httpx, PyJWT, pydantic, and others."""

import libcst as cst

from regreen.rules.calls import Calls, Keywords, plain
from regreen.rules.names import At, Modules, Moves, of, renamed, to
from regreen.rules.resolve import Resolving, visited
from regreen.rules.rule import Rule

_EQUAL = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
_DECREPIT = ("ARC4", "TripleDES", "Blowfish", "CAST5", "SEED", "IDEA")


class _Transport:
    """`app=` is a transport made for it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(
        self, visitor: Calls.Visitor, original: cst.Call, updated: cst.Call
    ) -> cst.BaseExpression:
        words = {arg.keyword.value for arg in updated.args if arg.keyword is not None}
        func = updated.func
        if "app" not in words or "transport" in words or not isinstance(func, cst.Attribute):
            return updated
        made = func.with_changes(attr=cst.Name(self.kind))
        args = [
            arg.with_changes(
                keyword=cst.Name("transport"),
                value=cst.Call(made, [cst.Arg(arg.value, cst.Name("app"), equal=_EQUAL)]),
            )
            if arg.keyword is not None and arg.keyword.value == "app"
            else arg
            for arg in updated.args
        ]
        return updated.with_changes(args=args)


class _Undecoded(Resolving):
    """`jwt.encode(...).decode(...)`: a token is a string already."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        func, new = original_node.func, updated_node.func
        if not isinstance(func, cst.Attribute) or func.attr.value != "decode":
            return updated_node
        if not isinstance(func.value, cst.Call) or not isinstance(new, cst.Attribute):
            return updated_node
        plainly = plain(updated_node, "encoding", "errors") is not None
        known = self.callee(func.value) in ("jwt.encode", "jwt.api_jwt.encode")
        return new.value if plainly and known else updated_node


def _unverified(
    visitor: Calls.Visitor, original: cst.Call, updated: cst.Call
) -> cst.BaseExpression:
    """`verify=False` is an option."""
    words = {arg.keyword.value: arg.value for arg in updated.args if arg.keyword is not None}
    off = words.get("verify")
    if "options" in words or not isinstance(off, cst.Name) or off.value != "False":
        return updated
    option = cst.parse_expression('{"verify_signature": False}')
    args = [
        arg.with_changes(keyword=cst.Name("options"), value=option)
        if arg.keyword is not None and arg.keyword.value == "verify"
        else arg
        for arg in updated.args
    ]
    return updated.with_changes(args=args)


def _undecoded(tree: cst.Module) -> cst.Module:
    return visited(tree, _Undecoded())


_MARSHMALLOW = "https://marshmallow.readthedocs.io/en/latest/changelog.html"
_PYJWT = "https://pyjwt.readthedocs.io/en/stable/changelog.html#v2-0-0"
_URLLIB3 = "https://github.com/urllib3/urllib3/blob/main/CHANGES.rst"
_ANYIO = "https://anyio.readthedocs.io/en/stable/migration.html"

RULES = (
    Rule(
        name="httpx-app", culprit="httpx", since="0.27.0", gone="0.28.0",
        source="https://github.com/encode/httpx/blob/master/CHANGELOG.md",
        heading="0.28.0 (28th November, 2024)",
        what="an application is called through a transport",
        signs=("app",),
        changes=(Calls({
            "httpx.AsyncClient": _Transport("ASGITransport"),
            "httpx.Client": _Transport("WSGITransport"),
        }),),
    ),
    Rule(
        name="urllib3-retry", culprit="urllib3", since="1.26.0", gone="2.0.0",
        source=_URLLIB3, heading="2.0.0 (2023-04-26)",
        what="method_whitelist is allowed_methods",
        signs=("method_whitelist", "VerifiedHTTPSConnection"),
        changes=(
            Keywords({
                f"{module}.Retry": {"method_whitelist": "allowed_methods"}
                for module in ("urllib3", "urllib3.util", "urllib3.util.retry")
            }),
            Moves(renamed("urllib3.connection", VerifiedHTTPSConnection="HTTPSConnection")),
        ),
    ),
    Rule(
        name="pyjwt-text", culprit="pyjwt", since="2.0.0", gone="2.0.0",
        source=_PYJWT, heading="v2.0.0",
        what="encode gives a string",
        signs=("encode",),
        changes=(_undecoded,),
    ),
    Rule(
        name="pyjwt-verify", culprit="pyjwt", since="2.0.0", gone="2.0.0",
        source=_PYJWT, heading="v2.0.0",
        what="verify=False is an option; expired and invalid are errors by name",
        signs=("verify", "ExpiredSignature", "InvalidAudience", "InvalidIssuer"),
        changes=(
            Calls({"jwt.decode": _unverified}),
            Moves({
                **renamed("jwt", ExpiredSignature="ExpiredSignatureError",
                          InvalidAudience="InvalidAudienceError",
                          InvalidIssuer="InvalidIssuerError"),
                **renamed("jwt.exceptions", ExpiredSignature="ExpiredSignatureError",
                          InvalidAudience="InvalidAudienceError",
                          InvalidIssuer="InvalidIssuerError"),
            }),
        ),
    ),
    Rule(
        name="cryptography-decrepit", culprit="cryptography", since="43.0.0", gone="48.0.0",
        source="https://cryptography.io/en/latest/changelog/#v43-0-0", heading="43.0.0",
        what="old ciphers come from the decrepit module",
        signs=_DECREPIT,
        changes=(Moves(of(
            "cryptography.hazmat.primitives.ciphers.algorithms",
            to("cryptography.hazmat.decrepit.ciphers.algorithms", *_DECREPIT),
        )),),
    ),
    Rule(
        name="marshmallow-defaults", culprit="marshmallow", since="3.13.0", gone="4.0.0",
        source=_MARSHMALLOW, heading="3.13.0 (2021-07-21)",
        what="missing is load_default, default is dump_default",
        signs=("missing", "default"),
        changes=(Keywords({
            "marshmallow.fields.*": {"missing": "load_default", "default": "dump_default"},
        }),),
    ),
    Rule(
        name="marshmallow-pass-collection", culprit="marshmallow", since="4.0.0", gone="4.0.0",
        source="https://marshmallow.readthedocs.io/en/latest/upgrading.html",
        heading="Upgrading to 4.0",
        what="pass_many of the decorators is pass_collection",
        signs=("pass_many",),
        changes=(Keywords({
            f"{module}.{name}": {"pass_many": "pass_collection"}
            for module in ("marshmallow", "marshmallow.decorators")
            for name in ("pre_load", "post_load", "pre_dump", "post_dump", "validates_schema")
        }),),
    ),
    Rule(
        name="pydantic-typing", culprit="pydantic", since="2.0", gone="2.0",
        source="https://docs.pydantic.dev/latest/migration/", heading="Removed in Pydantic V2",
        what="names of typing come from typing",
        signs=("typing",),
        changes=(Moves(of("pydantic.typing", to(
            "typing", "Annotated", "Literal", "ForwardRef", "ClassVar", "NoReturn",
        ))),),
    ),
    Rule(
        name="pydantic-v1", culprit="pydantic", since="2.0", gone="2.0",
        source="https://docs.pydantic.dev/latest/migration/",
        heading="Continue using Pydantic V1 features",
        what="what was written for version 1 comes from pydantic.v1",
        signs=("pydantic",),
        changes=(Modules({"pydantic": "pydantic.v1"}, leave=("pydantic.v1",)),),
        sweeping=True,
    ),
    Rule(
        name="anyio-4-names", culprit="anyio", since="3.0.0", gone="4.0.0",
        source=_ANYIO, heading="Migrating from AnyIO 2 to AnyIO 3",
        what="functions for threads and locks come from where AnyIO 3 put them",
        signs=("start_blocking_portal", "run_sync_in_worker_thread", "run_async_from_thread",
               "run_sync_from_thread", "create_capacity_limiter", "create_event", "create_lock",
               "create_condition", "create_semaphore", "open_cancel_scope"),
        changes=(Moves({
            "anyio.start_blocking_portal": At("anyio.from_thread", "start_blocking_portal"),
            "anyio.run_sync_in_worker_thread": At("anyio.to_thread", "run_sync"),
            "anyio.run_async_from_thread": At("anyio.from_thread", "run"),
            "anyio.run_sync_from_thread": At("anyio.from_thread", "run_sync"),
            **renamed("anyio", create_capacity_limiter="CapacityLimiter", create_event="Event",
                      create_lock="Lock", create_condition="Condition",
                      create_semaphore="Semaphore", open_cancel_scope="CancelScope"),
        }),),
    ),
)  # fmt: skip
