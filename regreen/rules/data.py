"""Rules for what holds data: NumPy, pandas, NetworkX, SQLAlchemy, Pillow."""

import libcst as cst

from regreen.rules.calls import Calls, Keywords, Methods, plain
from regreen.rules.names import At, Is, Modules, Moves, of, renamed
from regreen.rules.rule import Rule

_NUMPY = "https://numpy.org/doc/stable/release"
_PANDAS = "https://pandas.pydata.org/docs/whatsnew"
_SQLALCHEMY = "https://docs.sqlalchemy.org/en/20/changelog"


def _copy_if_needed(
    visitor: Calls.Visitor, original: cst.Call, updated: cst.Call
) -> cst.BaseExpression:
    """`copy=False` of old is `copy=None`: a copy only where one is needed."""
    args = [
        arg.with_changes(value=cst.Name("None"))
        if arg.keyword is not None
        and arg.keyword.value == "copy"
        and isinstance(arg.value, cst.Name)
        and arg.value.value == "False"
        else arg
        for arg in updated.args
    ]
    return updated.with_changes(args=args)


def _as_float(visitor: Calls.Visitor, original: cst.Call, updated: cst.Call) -> cst.BaseExpression:
    found = plain(updated, "a")
    if found is None or found[0] is None or not isinstance(updated.func, cst.Attribute):
        return updated
    dtype = cst.Arg(
        cst.Name("float"),
        cst.Name("dtype"),
        equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
    )
    func = updated.func.with_changes(attr=cst.Name("asarray"))
    return updated.with_changes(func=func, args=[cst.Arg(found[0]), dtype])


def _index_of(dtype: str) -> "_Index":
    return _Index(dtype)


class _Index:
    """A class of indexes of one type is an Index of that type; only where it is called."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __call__(
        self, visitor: Calls.Visitor, original: cst.Call, updated: cst.Call
    ) -> cst.BaseExpression:
        words = {arg.keyword.value for arg in updated.args if arg.keyword is not None}
        if not isinstance(updated.func, cst.Attribute) or "dtype" in words:
            return updated
        if any(arg.star for arg in updated.args):
            return updated
        dtype = cst.Arg(
            cst.SimpleString(f'"{self.dtype}"'),
            cst.Name("dtype"),
            equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
        )
        func = updated.func.with_changes(attr=cst.Name("Index"))
        return updated.with_changes(func=func, args=[*updated.args, dtype])


def _select(visitor: Calls.Visitor, original: cst.Call, updated: cst.Call) -> cst.BaseExpression:
    """`select([a, b])` is `select(a, b)`."""
    if len(updated.args) != 1 or updated.args[0].keyword or updated.args[0].star:
        return updated
    value = updated.args[0].value
    if not isinstance(value, cst.List) or not value.elements:
        return updated
    args = [
        cst.Arg(
            element.value,
            star="*" if isinstance(element, cst.StarredElement) else "",
            comma=element.comma,
        )
        for element in value.elements
    ]
    return updated.with_changes(args=args)


def _numpy(table: dict[str, str]) -> dict[str, Is]:
    return {f"numpy.{old}": Is(new) for old, new in table.items()}


RULES = (
    Rule(
        name="numpy-builtin-aliases", culprit="numpy", since="1.20.0", gone="1.24.0",
        source=f"{_NUMPY}/1.24.0-notes.html", heading="Expired deprecations",
        what="aliases of builtin types are the builtin types",
        signs=("float", "int", "bool", "object", "str", "complex"),
        changes=(Moves(_numpy({
            "float": "float", "int": "int", "bool": "bool", "object": "object", "str": "str",
            "complex": "complex",
        })),),
    ),
    Rule(
        name="numpy-type-dict", culprit="numpy", since="1.21.0", gone="2.0.0",
        source=f"{_NUMPY}/1.21.0-notes.html", heading="The np.typeDict attribute is deprecated",
        what="typeDict is sctypeDict",
        signs=("typeDict",),
        changes=(Moves(renamed("numpy", typeDict="sctypeDict")),),
    ),
    Rule(
        name="numpy-2-names", culprit="numpy", since="2.0.0", gone="2.0.0",
        source=f"{_NUMPY}/2.0.0-notes.html", heading="NumPy 2.0 Python API removals",
        what="names that were spelled twice have one spelling",
        signs=("Inf", "Infinity", "infty", "PINF", "NINF", "PZERO", "NZERO", "NaN", "float_",
               "complex_", "longfloat", "singlecomplex", "cfloat", "clongfloat", "longcomplex",
               "unicode_", "string_", "product", "cumproduct", "sometrue", "alltrue", "round_",
               "row_stack", "mat", "asfarray"),
        changes=(
            Moves({
                **renamed(
                    "numpy", Inf="inf", Infinity="inf", infty="inf", PINF="inf", NaN="nan",
                    float_="float64", complex_="complex128", longfloat="longdouble",
                    singlecomplex="complex64", cfloat="complex128", clongfloat="clongdouble",
                    longcomplex="clongdouble", unicode_="str_", string_="bytes_", product="prod",
                    cumproduct="cumprod", sometrue="any", alltrue="all", round_="round",
                    row_stack="vstack", mat="asmatrix",
                ),
                "numpy.NINF": Is('float("-inf")'),
                "numpy.PZERO": Is("0.0"),
                "numpy.NZERO": Is("-0.0"),
            }),
            Calls({"numpy.asfarray": _as_float}),
        ),
    ),
    Rule(
        name="numpy-2-exceptions", culprit="numpy", since="2.0.0", gone="2.0.0",
        source=f"{_NUMPY}/2.0.0-notes.html", heading="NumPy 2.0 Python API removals",
        what="warnings and errors come from numpy.exceptions",
        signs=("AxisError", "ComplexWarning", "DTypePromotionError", "ModuleDeprecationWarning",
               "RankWarning", "TooHardError", "VisibleDeprecationWarning"),
        changes=(Moves({
            f"numpy.{name}": At("numpy.exceptions", name)
            for name in ("AxisError", "ComplexWarning", "DTypePromotionError",
                         "ModuleDeprecationWarning", "RankWarning", "TooHardError",
                         "VisibleDeprecationWarning")
        }),),
    ),
    Rule(
        name="numpy-2-copy", culprit="numpy", since="2.0.0", gone="2.0.0",
        source="https://numpy.org/doc/stable/numpy_2_0_migration_guide.html",
        heading="Adapting to changes in the copy keyword",
        what="copy=False of numpy.array is copy=None",
        signs=("copy",),
        changes=(Calls({"numpy.array": _copy_if_needed}),),
    ),
    Rule(
        name="numpy-2-4-names", culprit="numpy", since="2.0.0", gone="2.4.0",
        source=f"{_NUMPY}/2.4.0-notes.html", heading="Expired deprecations",
        what="in1d is isin, trapz is trapezoid",
        signs=("in1d", "trapz"),
        changes=(Moves(renamed("numpy", in1d="isin", trapz="trapezoid")),),
    ),
    Rule(
        name="pandas-items", culprit="pandas", since="1.5.0", gone="2.0.0",
        source=f"{_PANDAS}/v2.0.0.html",
        heading="Removal of prior version deprecations/changes",
        what="iteritems is items",
        signs=("iteritems",),
        changes=(Methods("pandas", {"iteritems": "items"}),),
    ),
    Rule(
        name="pandas-map", culprit="pandas", since="2.1.0", gone="3.0.0",
        source=f"{_PANDAS}/v2.1.0.html", heading="Deprecations",
        what="DataFrame.applymap is map",
        signs=("applymap",),
        changes=(Methods("pandas", {"applymap": "map"}),),
    ),
    Rule(
        name="pandas-numeric-index", culprit="pandas", since="1.4.0", gone="2.0.0",
        source=f"{_PANDAS}/v2.0.0.html",
        heading="Index can now hold numpy numeric dtypes",
        what="an Int64Index is an Index of int64, and so the others",
        signs=("Int64Index", "UInt64Index", "Float64Index"),
        changes=(Calls({
            "pandas.Int64Index": _index_of("int64"), "pandas.UInt64Index": _index_of("uint64"),
            "pandas.Float64Index": _index_of("float64"),
        }),),
    ),
    Rule(
        name="pandas-names", culprit="pandas", since="1.0.0", gone="2.0.0",
        source=f"{_PANDAS}/v2.0.0.html",
        heading="Removal of prior version deprecations/changes",
        what="pandas.util.testing is pandas.testing, json_normalize is pandas's own",
        signs=("testing", "json_normalize"),
        changes=(
            Moves({"pandas.io.json.json_normalize": At("pandas", "json_normalize")}),
            Modules({"pandas.util.testing": "pandas.testing"}),
        ),
    ),
    Rule(
        name="networkx-ordered", culprit="networkx", since="2.8", gone="3.0",
        source="https://networkx.org/documentation/stable/release/release_3.0.html",
        heading="NetworkX 3.0",
        what="ordered graphs are graphs, matrices of NumPy and SciPy are arrays",
        signs=("OrderedGraph", "OrderedDiGraph", "OrderedMultiGraph", "OrderedMultiDiGraph",
               "from_numpy_matrix", "to_scipy_sparse_matrix", "from_scipy_sparse_matrix"),
        changes=(Moves(renamed(
            "networkx", OrderedGraph="Graph", OrderedDiGraph="DiGraph",
            OrderedMultiGraph="MultiGraph", OrderedMultiDiGraph="MultiDiGraph",
            from_numpy_matrix="from_numpy_array", to_scipy_sparse_matrix="to_scipy_sparse_array",
            from_scipy_sparse_matrix="from_scipy_sparse_array",
        )),),
    ),
    Rule(
        name="sqlalchemy-select", culprit="sqlalchemy", since="1.4.0", gone="2.0.0",
        source=f"{_SQLALCHEMY}/migration_20.html",
        heading="select() no longer accepts varied constructor arguments, "
        "columns are passed positionally",
        what="columns are passed to select one by one",
        signs=("select",),
        changes=(Calls({
            f"{module}.select": _select
            for module in ("sqlalchemy", "sqlalchemy.sql", "sqlalchemy.sql.expression",
                           "sqlalchemy.future")
        }),),
    ),
    Rule(
        name="sqlalchemy-orm-names", culprit="sqlalchemy", since="1.4.0", gone="2.0.0",
        source=f"{_SQLALCHEMY}/migration_20.html",
        heading="Declarative becomes a first class API",
        what="the declarative base comes from sqlalchemy.orm; relation is relationship",
        signs=("declarative_base", "relation", "eagerload"),
        changes=(Moves({
            "sqlalchemy.ext.declarative.declarative_base":
                At("sqlalchemy.orm", "declarative_base"),
            **renamed("sqlalchemy.orm", relation="relationship", eagerload="joinedload"),
        }),),
    ),
    Rule(
        name="sqlalchemy-row", culprit="sqlalchemy", since="1.4.0", gone="1.4.0",
        source=f"{_SQLALCHEMY}/migration_14.html",
        heading='RowProxy is no longer a "proxy"; is now called Row',
        what="RowProxy is Row",
        signs=("RowProxy",),
        changes=(Moves(of("sqlalchemy.engine", {
            "RowProxy": At("sqlalchemy.engine", "Row"),
            "result.RowProxy": At("sqlalchemy.engine", "Row"),
        })),),
    ),
    Rule(
        name="pillow-resampling", culprit="pillow", since="9.1.0", gone="10.0.0",
        source="https://pillow.readthedocs.io/en/stable/releasenotes/10.0.0.html",
        heading="Constants",
        what="filters have one name each",
        signs=("ANTIALIAS", "LINEAR", "CUBIC"),
        changes=(Moves(renamed(
            "PIL.Image", ANTIALIAS="LANCZOS", LINEAR="BILINEAR", CUBIC="BICUBIC",
        )),),
    ),
    Rule(
        name="django-4-names", culprit="django", since="3.0", gone="4.0",
        source="https://docs.djangoproject.com/en/stable/releases/4.0/",
        heading="Features removed in 4.0",
        what="functions of texts and addresses have no u and no force_text any more",
        signs=("ugettext", "ugettext_lazy", "ugettext_noop", "ungettext", "ungettext_lazy",
               "force_text", "smart_text", "url", "urlquote", "urlquote_plus", "urlunquote",
               "urlunquote_plus", "is_safe_url", "providing_args"),
        changes=(
            Moves({
                **renamed(
                    "django.utils.translation", ugettext="gettext", ugettext_lazy="gettext_lazy",
                    ugettext_noop="gettext_noop", ungettext="ngettext",
                    ungettext_lazy="ngettext_lazy",
                ),
                **renamed("django.utils.encoding", force_text="force_str", smart_text="smart_str"),
                **renamed("django.utils.http", is_safe_url="url_has_allowed_host_and_scheme"),
                "django.conf.urls.url": At("django.urls", "re_path"),
                "django.utils.http.urlquote": At("urllib.parse", "quote"),
                "django.utils.http.urlquote_plus": At("urllib.parse", "quote_plus"),
                "django.utils.http.urlunquote": At("urllib.parse", "unquote"),
                "django.utils.http.urlunquote_plus": At("urllib.parse", "unquote_plus"),
            }),
            Keywords({
                "django.dispatch.Signal": {"providing_args": None},
                "django.dispatch.dispatcher.Signal": {"providing_args": None},
            }),
        ),
    ),
    Rule(
        name="django-utc", culprit="django", since="4.1", gone="5.0",
        source="https://docs.djangoproject.com/en/stable/releases/5.0/",
        heading="Features removed in 5.0",
        what="utc is that of datetime",
        signs=("utc",),
        changes=(Moves({"django.utils.timezone.utc": Is("datetime.timezone.utc", ("datetime",))}),),
    ),
)  # fmt: skip
