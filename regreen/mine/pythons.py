"""What releases of Python took away, and what gives its use away unread.

- A table of facts, each with the page of What's New that says so. Rows that are `strict` only warn,
  and break where a project's own settings make errors of warnings.
- A sign is text in a module of the project or of its tests. It only says where to look: what breaks
  is run. What stands behind a check (`try`, a version) is no sign, nor is anything of a Python that
  the project says it runs on.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from packaging.version import Version

RELEASED = {
    "3.9": date(2020, 10, 5), "3.10": date(2021, 10, 4), "3.11": date(2022, 10, 24),
    "3.12": date(2023, 10, 2), "3.13": date(2024, 10, 7), "3.14": date(2025, 10, 7),
}  # fmt: skip
MAX_BYTES, MAX_FILES = 400_000, 2000
_SETTINGS = frozenset({"setup.cfg", "tox.ini", "pytest.ini", "pyproject.toml"})
_METADATA = "PKG-INFO"
_CLAIM = re.compile(r"^Classifier: Programming Language :: Python :: (3\.\d+)\s*$", re.MULTILINE)
_STRICT = re.compile(
    r"""^[ \t]*["']?filterwarnings["']?[ \t]*=\s*(?:\[\s*)?["']?error\b""", re.MULTILINE
)
_ASIDE = re.compile(
    r"^(?:docs?|examples?|samples?|benchmarks?|scripts?|build|tools|\.[^/]+)/|"
    r"^(?:setup|noxfile|fabfile|tasks|versioneer)\.py$|/_?vendor(?:ed)?/"
)
_CHECK = re.compile(
    r"try\s*:|except\b.*(?:Import|ModuleNotFound|Attribute)Error|"
    r"(?:el)?if\b.*(?:version|\bPY_?[23]|\bpy_?[23]|hasattr|TYPE_CHECKING)"
)
_BRANCH = re.compile(r"(?:else|elif|except|finally)\b")


@dataclass(frozen=True, slots=True)
class Removal:
    """One thing that a release of Python took away or changed."""

    python: str
    note: str
    sign: re.Pattern[str]
    section: str = "removed"
    strict: bool = False
    """It only warns."""

    @property
    def changelog(self) -> str:
        """Where it says so."""
        return f"https://docs.python.org/3/whatsnew/{self.python}.html#{self.section}"


@dataclass(frozen=True, slots=True)
class Step:
    """Two interpreters next to each other, and what lies between them."""

    good: str
    bad: str
    signs: tuple[Removal, ...]


def _re(*texts: str) -> re.Pattern[str]:
    return re.compile("|".join(texts), re.MULTILINE)


def _module(names: str) -> str:
    """An import of one of these modules."""
    one = f"(?:{'|'.join(names.split())})"
    before = r"(?:[\w.]+(?:[ \t]+as[ \t]+\w+)?[ \t]*,[ \t]*)*"
    return rf"^[ \t]*(?:import[ \t]+{before}{one}\b|from[ \t]+{one}(?:\.\w+)*[ \t]+import\b)"


def _name(module: str, names: str) -> str:
    """One of these names of a module, imported or used."""
    one, dotted = f"(?:{'|'.join(names.split())})", re.escape(module)
    after = r"(?:\([^)]*?|[^\n(#]*?)"
    imported = rf"^[ \t]*from[ \t]+{dotted}[ \t]+import[ \t]+{after}\b{one}\b"
    return rf"(?<![\w.]){dotted}\.{one}\b|{imported}"


def _method(names: str) -> str:
    """A call of one of these methods of a test case."""
    return rf"\bself\.(?:{'|'.join(names.split())})\("


_ABCS = (
    "Awaitable Coroutine AsyncIterable AsyncIterator AsyncGenerator Hashable Iterable Iterator "
    "Generator Reversible Container Collection Callable Set MutableSet Mapping MutableMapping "
    "MappingView KeysView ItemsView ValuesView Sequence MutableSequence ByteString"
)
_ALIASES = (
    "failUnless failUnlessEqual failIf failIfEqual failUnlessRaises failUnlessAlmostEqual "
    "failIfAlmostEqual assert_ assertEquals assertNotEquals assertAlmostEquals "
    "assertNotAlmostEquals assertRegexpMatches assertNotRegexpMatches assertRaisesRegexp "
    "assertDictContainsSubset"
)
_BATTERIES = (
    "aifc audioop cgi cgitb chunk crypt imghdr mailcap msilib nis nntplib ossaudiodev pipes sndhdr "
    "spwd sunau telnetlib uu xdrlib"
)
_RESOURCES = "contents is_resource open_binary open_text path read_binary read_text"
_NODES = "Num Str Bytes NameConstant Ellipsis"
_QUOTED = r"[rbu]{0,2}([\"'])"
REMOVALS = (
    Removal("3.9", "base64.encodestring and decodestring",
            _re(_name("base64", "encodestring decodestring"))),
    Removal("3.9", "fractions.gcd", _re(_name("fractions", "gcd"))),
    Removal("3.9", "plistlib.readPlist and others",
            _re(_name("plistlib", "readPlist writePlist readPlistFromBytes writePlistToBytes"))),
    Removal("3.9", "xml.etree.cElementTree",
            _re(_module(r"xml\.etree\.cElementTree"), _name("xml.etree", "cElementTree"))),
    Removal("3.9", "dummy_threading and _dummy_thread",
            _re(_module("dummy_threading _dummy_thread"))),
    Removal("3.9", "Thread.isAlive, Element.getchildren",
            _re(r"\.(?:isAlive|getchildren)\(\)")),
    Removal("3.9", "HTMLParser.unescape", _re(r"HTMLParser\(\)\.unescape\b")),
    Removal("3.9", "json.loads takes no encoding",
            _re(r"\bjson\.loads?\([^\n]*\bencoding[ \t]*=")),
    Removal("3.9", "asyncio.Task.all_tasks and current_task",
            _re(r"\bTask\.(?:all_tasks|current_task)\b")),
    Removal("3.10", "aliases of abstract base classes in collections",
            _re(_name("collections", _ABCS))),
    Removal("3.10", "asyncio takes no loop",
            _re(r"\basyncio\.(?:sleep|wait|wait_for|gather|shield|as_completed|Lock|Event|Queue|"
                r"Condition|Semaphore|BoundedSemaphore|open_connection|start_server)"
                r"\([^\n]*\bloop[ \t]*=")),
    Removal("3.10", "formatter, parser, symbol", _re(_module("formatter parser symbol"))),
    Removal("3.10", "distutils warns", _re(_module("distutils")), "deprecated", strict=True),
    Removal("3.11", "inspect.getargspec and formatargspec",
            _re(_name("inspect", "getargspec formatargspec"))),
    Removal("3.11", "asyncio.coroutine", _re(_name("asyncio", "coroutine"))),
    Removal("3.11", "binhex", _re(_module("binhex"))),
    Removal("3.11", "gettext.lgettext and others",
            _re(_name("gettext", "lgettext ldgettext lngettext ldngettext bind_textdomain_codeset"),
                r"\bgettext\.translation\([^\n]*\bcodeset[ \t]*=")),
    Removal("3.11", "random.sample takes no set",
            _re(r"\brandom\.sample\(\s*(?:set\(|frozenset\(|\{|[^,\n]*\.keys\(\))"),
            "porting-to-python-3-11"),
    Removal("3.11", "open takes no mode U",
            _re(r"\bopen\([^\n]*,[ \t]*(?:mode[ \t]*=[ \t]*)?[\"'](?:r?U[bt]?|U?r[bt]?U)[\"']"),
            "porting-to-python-3-11"),
    Removal("3.11", "flags in the middle of a regular expression",
            _re(r"\bre\.(?:compile|match|search|fullmatch|sub|split|findall|finditer)\(\s*"
                + _QUOTED + r"(?!\(\?[aiLmsux]+\))[^\"'\n]+\(\?[aiLmsux]+\)"),
            "porting-to-python-3-11"),
    Removal("3.11", "defaults of data classes that cannot be hashed",
            _re(r"^[ \t]+\w+[ \t]*:[ \t]*(?:\w+\.)*(\w+)[ \t]*=[ \t]*(?:\w+\.)*\1\("),
            "dataclasses"),
    Removal("3.11", "format of an enum with a type is that of str",
            _re(r"^class \w+\((?:str|int),[ \t]*(?:enum\.)?Enum\)"), "enum"),
    Removal("3.11", "modules of PEP 594 warn", _re(_module(_BATTERIES)), "deprecated", strict=True),
    Removal("3.11", "functions of importlib.resources warn",
            _re(_name("importlib.resources", _RESOURCES)), "deprecated", strict=True),
    Removal("3.12", "asynchat, asyncore, imp, smtpd", _re(_module("asynchat asyncore imp smtpd"))),
    Removal("3.12", "distutils", _re(_module("distutils"))),
    Removal("3.12", "aliases of methods of unittest", _re(_method(_ALIASES))),
    Removal("3.12", "configparser.SafeConfigParser, readfp",
            _re(_name("configparser", "SafeConfigParser"), r"\.readfp\(")),
    Removal("3.12", "pkgutil.ImpImporter and ImpLoader",
            _re(_name("pkgutil", "ImpImporter ImpLoader"))),
    Removal("3.12", "ssl.wrap_socket, match_hostname, RAND_pseudo_bytes",
            _re(_name("ssl", "wrap_socket match_hostname RAND_pseudo_bytes"))),
    Removal("3.12", "locale.format", _re(_name("locale", "format"))),
    Removal("3.12", "find_loader and others of importlib",
            _re(_name("importlib", "find_loader"), _name("importlib.abc", "Finder"),
                _name("importlib.util", "module_for_loader set_package set_loader"))),
    Removal("3.12", "sqlite3.OptimizedUnicode and enable_shared_cache",
            _re(_name("sqlite3", "OptimizedUnicode enable_shared_cache"))),
    Removal("3.12", "utcnow and utcfromtimestamp warn",
            _re(r"\bdatetime\.(?:utcnow|utcfromtimestamp)\("), "deprecated", strict=True),
    Removal("3.12", "nodes of before ast.Constant warn", _re(_name("ast", _NODES)), "deprecated",
            strict=True),
    Removal("3.12", "pkgutil.find_loader and get_loader warn",
            _re(_name("pkgutil", "find_loader get_loader")), "deprecated", strict=True),
    Removal("3.13", "modules of PEP 594", _re(_module(_BATTERIES)),
            "pep-594-remove-dead-batteries-from-the-standard-library"),
    Removal("3.13", "lib2to3", _re(_module("lib2to3"))),
    Removal("3.13", "unittest.makeSuite, findTestCases, getTestCaseNames",
            _re(_name("unittest", "makeSuite findTestCases getTestCaseNames"))),
    Removal("3.13", "locale.resetlocale", _re(_name("locale", "resetlocale"))),
    Removal("3.13", "typing.io and typing.re",
            _re(r"(?<![\w.])typing\.(?:io|re)\b", r"^[ \t]*from[ \t]+typing\.(?:io|re)[ \t]")),
    Removal("3.13", "configparser.LegacyInterpolation",
            _re(_name("configparser", "LegacyInterpolation"))),
    Removal("3.13", "re.template", _re(r"(?<![\w.])re\.(?:template|TEMPLATE)\b")),
    Removal("3.13", "docstrings lose their indentation",
            _re(r"(?:==|\bassertEqual\()[^\n]*\.__doc__\b", r"\.__doc__\b[^\n]*(?:==|\.split)"),
            "other-language-changes"),
    Removal("3.14", "nodes of before ast.Constant", _re(_name("ast", _NODES))),
    Removal("3.14", "pkgutil.find_loader and get_loader",
            _re(_name("pkgutil", "find_loader get_loader"))),
    Removal("3.14", "child watchers of asyncio",
            _re(r"\basyncio\.(?:\w+ChildWatcher|[gs]et_child_watcher)\b")),
    Removal("3.14", "importlib.abc.ResourceReader, Traversable",
            _re(_name("importlib.abc", "ResourceReader Traversable TraversableResources"))),
    Removal("3.14", "urllib.request.URLopener and FancyURLopener",
            _re(_name("urllib.request", "URLopener FancyURLopener"))),
)  # fmt: skip


def texts_of(archive: bytes) -> dict[str, str]:
    """Modules of a source archive with those of its tests, its metadata and settings."""
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            wanted = path in {*_SETTINGS, _METADATA}
            wanted = wanted or (path.endswith(".py") and not _ASIDE.search(path))
            if not wanted or not member.isfile() or member.size > MAX_BYTES:
                continue
            stream = tar.extractfile(member)
            if stream is not None and len(found) < MAX_FILES:
                found[path] = stream.read().decode("utf-8", "replace")
    return found


def signed(texts: Mapping[str, str]) -> list[Removal]:
    """What these texts use of what a Python took away."""
    strict = any(_STRICT.search(texts.get(path, "")) for path in _SETTINGS)
    claims = map(Version, _CLAIM.findall(texts.get(_METADATA, "")))
    newest = max(claims, default=Version("3"))
    modules = [text for path, text in texts.items() if path.endswith(".py")]
    rows = [row for row in REMOVALS if Version(row.python) > newest and (strict or not row.strict)]
    return [row for row in rows if any(_uses(text, row.sign) for text in modules)]


def _uses(text: str, sign: re.Pattern[str]) -> bool:
    return any(not _behind_check(text, match.start()) for match in sign.finditer(text))


def _behind_check(text: str, at: int) -> bool:
    """Whether a place is inside a `try` or a branch that asks for a version."""
    start = text.rfind("\n", 0, at) + 1
    line = text[start:].partition("\n")[0]
    if line.lstrip().startswith("#"):
        return True
    depth, opener = _indent(line), False
    for above in reversed(text[:start].splitlines()):
        if not above.strip() or _indent(above) > depth or (_indent(above) == depth and not opener):
            continue
        word = above.strip()
        if _CHECK.match(word):
            return True
        # An `else` hangs on what opened it, at the same depth.
        depth, opener = _indent(above), _BRANCH.match(word) is not None
        if not depth and not opener:
            return False
    return False


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def steps_of(signs: Iterable[Removal], interpreters: Sequence[str]) -> list[Step]:
    """The pairs of interpreters at hand between which something was taken away, newest first."""
    every = sorted(interpreters, key=Version)
    found: dict[str, list[Removal]] = {}
    for sign in signs:
        later = [version for version in every if Version(version) >= Version(sign.python)]
        if later and later[0] != every[0]:
            found.setdefault(later[0], []).append(sign)
    return [
        Step(every[every.index(bad) - 1], bad, tuple(found[bad]))
        for bad in sorted(found, key=Version, reverse=True)
    ]
