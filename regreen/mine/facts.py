"""What a broken run says: which tests really fail, where the blame lies, of what kind it is.

- A test that passed before is broken only if it failed, or if nothing of its module reported any
  more. Ids that are gone while their module still reports were renamed, and are never required.
- Ids that hold a path of a machine or an address of memory are never required.
- Blame is where the deepest line of the traceback stands that is neither the standard library's
  nor the culprit's own: the caller that no longer fits, not the callee that moved.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from regreen.lockfile import normalize
from regreen.rollout.logs import ASSERTIONS, Frame, PrimaryError, analyse

_MACHINE = re.compile(
    r"/work/|/tmp/|/root/|/home/|/var/|/usr/|0x[0-9a-f]{6,}|\bat 0x|"
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d"
)
_RUNNER = frozenset({"_pytest", "pytest", "pluggy", "py", "xdist", "pytest_cov"})
_LIBRARY = r"<frozen[^\"]*|(?!/opt/regreen/|[^\"]*/site-packages/)[^\"]*/lib/python3\.[^\"]*"
_OWN_CRASH = re.compile(
    rf"""^(?:INTERNALERROR>[ ])?
        (?:[ ][ ]File[ ]"/opt/regreen/[^"]+",[ ]line[ ]\d+,[ ]in[ ].*
        |\S*/opt/regreen/\S+\.py:\d+:[ ]in[ ].*)\n
        (?:(?:INTERNALERROR>[ ])?[ ]{{4}}.*\n
        |(?:INTERNALERROR>[ ])?[ ][ ]\[Previous[ ]line[ ]repeated.*\n
        |(?:INTERNALERROR>[ ])?[ ][ ]File[ ]"(?:{_LIBRARY})",.*\n)*
        (?:INTERNALERROR>[ ]|E[ ]+)?(?P<error>\w[\w.]*(?::[ ].*)?)$""",
    re.MULTILINE | re.VERBOSE,
)
"""A traceback that ends in the files of the trusted runner, or from there in Python's library."""
_MODULES = {
    "pyyaml": "yaml", "beautifulsoup4": "bs4", "python-dateutil": "dateutil", "pyjwt": "jwt",
    "markdown": "markdown", "attrs": "attr", "pillow": "pil", "gitpython": "git",
    "setuptools": "pkg_resources", "django-rest-framework": "rest_framework",
    "djangorestframework": "rest_framework", "dnspython": "dns", "pyopenssl": "openssl",
    "protobuf": "google", "scikit-learn": "sklearn", "opencv-python": "cv2",
    "ruamel-yaml": "ruamel",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the tests said."""

    passed: frozenset[str]
    failed: frozenset[str]
    reported: frozenset[str]
    log: str = ""
    seconds: float = 0.0
    messages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Damage:
    """What a run lost of the tests that passed before."""

    broken: frozenset[str]
    renamed: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.broken)


def stable_ids(ids: Iterable[str]) -> frozenset[str]:
    """Ids without a path of a machine, an address or a time of day in them."""
    return frozenset(i for i in ids if not _MACHINE.search(i))


def damage(before: frozenset[str], run: Run) -> Damage:
    """What `run` lost of `before`."""
    gone = before - run.passed
    # One that could not be collected reports itself, and no test.
    alive = {i.partition("::")[0] for i in run.reported if "::" in i}
    broken = {i for i in gone if i in run.failed or i.partition("::")[0] not in alive}
    if not run.failed & gone and not re.search(r"\b(?:ERRORS?|Error|error|Interrupted)\b", run.log):
        broken = set()
    return Damage(frozenset(broken), frozenset(gone - broken))


def module_of(name: str) -> str:
    """The top-level module that a distribution most likely brings, lower case."""
    return _MODULES.get(name, name.replace("-", "_")).lower()


def blame_of(error: PrimaryError | None, culprit: str) -> str:
    """`source`, `tests`, `third-party`, `test-runner` or `unclear`."""
    if error is None:
        return "unclear"
    own = {module_of(culprit), culprit.replace("-", "_")}
    if culprit == "setuptools":
        own.add("setuptools")
    for frame in reversed(error.frames):
        if frame.place in ("stdlib", "unknown") or frame.module.lower() in own:
            continue
        if frame.place == "third-party":
            if _runs_tests(frame):
                continue
            return "third-party"
        return frame.place
    if any(_runs_tests(frame) for frame in error.frames):
        return "test-runner"
    return "unclear"


def _runs_tests(frame: Frame) -> bool:
    return frame.module in _RUNNER or "/twisted/trial/" in frame.file


def own_crash(log: str) -> str:
    """The error that our own runner of the tests raised in a run; empty where it raised none."""
    found = _OWN_CRASH.search(log)
    return found["error"] if found else ""


def category_of(error: PrimaryError | None) -> str:
    """The kind of break, told from the type of its error."""
    if error is None:
        return "runtime-error"
    kind = error.type.rpartition(".")[2]
    if kind in ("ImportError", "ModuleNotFoundError"):
        return "import-error"
    if kind == "AttributeError":
        return "attribute-error"
    if kind == "TypeError":
        return "type-error"
    if kind.endswith("Warning"):
        return "deprecation-as-error"
    if kind in ASSERTIONS:
        return "behaviour-change"
    return "runtime-error"


def stage_of(error: PrimaryError | None) -> str:
    """When it strikes."""
    return "test-run" if error is None or error.stage == "test" else error.stage


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The facts of a break that a record holds."""

    blame: str
    category: str
    stage: str
    error_lines: tuple[str, ...]


def diagnose(run: Run, culprit: str, broken: Collection[str]) -> Diagnosis:
    """Blame, kind and first lines of what `run` says of the tests that it broke."""
    error = analyse(_about(run.log, broken)) or analyse(run.log)
    counts: dict[str, int] = {}
    for test, message in run.messages.items():
        line = message.strip().partition("\n")[0][:300]
        if line and test in broken:
            counts[line] = counts.get(line, 0) + 1
    lines = sorted(counts, key=lambda line: (-counts[line], line))
    if not lines and error is not None:
        lines = [error.text[:300]]
    return Diagnosis(
        blame_of(error, culprit), category_of(error), stage_of(error), tuple(lines[:8])
    )


def _about(log: str, broken: Collection[str]) -> str:
    """The parts of a log that are about these tests; those of others failed before as well."""
    names = {i.partition("::")[2].replace("::", ".") for i in broken}
    files = {i.partition("::")[0] for i in broken}
    kept: list[str] = []
    within = False
    for line in log.splitlines():
        if title := re.match(r"_{3,} (.+?) _{3,}$", line):
            about = re.sub(r"^ERROR (?:at (?:setup|teardown) of|collecting) ", "", title[1])
            within = about in names or about in files
        elif re.match(r"={3,} .+ ={3,}$", line):
            within = False
            kept.append(line)
        if within:
            kept.append(line)
    return "\n".join(kept)


MISSING = {
    "mock": "mock", "yaml": "pyyaml", "six": "six", "pytz": "pytz", "dateutil": "python-dateutil",
    "pkg_resources": "setuptools", "setuptools": "setuptools", "requests": "requests",
    "freezegun": "freezegun", "hypothesis": "hypothesis", "parameterized": "parameterized",
    "nose": "nose", "bs4": "beautifulsoup4", "lxml": "lxml", "attr": "attrs", "PIL": "pillow",
    "numpy": "numpy", "pandas": "pandas", "django": "django", "flask": "flask", "jwt": "pyjwt",
    "simplejson": "simplejson", "toml": "toml", "tomli": "tomli", "responses": "responses",
    "testfixtures": "testfixtures", "httpx": "httpx", "aiohttp": "aiohttp", "webtest": "webtest",
    "markdown": "markdown", "docutils": "docutils", "pygments": "pygments", "sphinx": "sphinx",
    "sqlalchemy": "sqlalchemy", "jinja2": "jinja2", "click": "click", "rich": "rich",
    "typing_extensions": "typing-extensions", "importlib_metadata": "importlib-metadata",
    "marshmallow": "marshmallow", "pydantic": "pydantic", "tornado": "tornado", "trio": "trio",
    "anyio": "anyio", "asgiref": "asgiref", "jsonschema": "jsonschema", "ddt": "ddt",
    "rest_framework": "djangorestframework", "html5lib": "html5lib", "blinker": "blinker",
    "ujson": "ujson", "orjson": "orjson", "cryptography": "cryptography", "redis": "redis",
    "starlette": "starlette", "fastapi": "fastapi", "uvicorn": "uvicorn", "factory": "factory-boy",
    "pytest_mock": "pytest-mock", "pytest_asyncio": "pytest-asyncio", "coverage": "coverage",
    "openpyxl": "openpyxl", "matplotlib": "matplotlib", "scipy": "scipy", "networkx": "networkx",
    "defusedxml": "defusedxml", "babel": "babel", "mistune": "mistune", "tabulate": "tabulate",
    "psutil": "psutil", "ruamel": "ruamel-yaml", "multipart": "python-multipart",
    "dotenv": "python-dotenv", "requests_mock": "requests-mock", "sybil": "sybil", "py": "py",
    "zope.testing": "zope-testing", "zope": "zope-interface", "jaraco": "jaraco-functools",
    "aiofiles": "aiofiles", "email_validator": "email-validator", "peewee": "peewee",
    "wtforms": "wtforms", "werkzeug": "werkzeug", "flask_sqlalchemy": "flask-sqlalchemy",
    "graphene": "graphene", "packaging": "packaging", "twisted": "twisted", "pip": "pip",
    "semantic_version": "semantic-version", "docopt": "docopt", "colorama": "colorama",
    "termcolor": "termcolor", "tqdm": "tqdm",
}  # fmt: skip
"""Distributions by the module that they bring. Nothing is guessed from a module's name."""
_FIXTURES = {
    "mocker": "pytest-mock", "benchmark": "pytest-benchmark", "requests_mock": "requests-mock",
    "httpx_mock": "pytest-httpx", "subtests": "pytest-subtests", "freezer": "pytest-freezer",
    "datadir": "pytest-datadir", "shared_datadir": "pytest-datadir", "vcr": "pytest-recording",
    "httpserver": "pytest-httpserver", "httpbin": "pytest-httpbin", "respx_mock": "respx",
    "aiohttp_client": "pytest-aiohttp", "aiohttp_server": "pytest-aiohttp",
    "loop": "pytest-aiohttp", "event_loop": "pytest-asyncio", "anyio_backend": "anyio",
    "settings": "pytest-django", "rf": "pytest-django", "live_server": "pytest-django",
    "admin_client": "pytest-django", "snapshot": "syrupy", "faker": "faker", "fs": "pyfakefs",
    "data_regression": "pytest-regressions", "file_regression": "pytest-regressions",
    "image_regression": "pytest-regressions", "regtest": "pytest-regtest",
}  # fmt: skip


def lacking(run: Run, curated: Collection[str] = ()) -> set[str]:
    """Distributions that a run of the untouched tests lacks, as far as they are known.

    Those of `curated` are known to bring a module of their own name.
    """
    found: set[str] = set()
    text = "\n".join([run.log, *run.messages.values()])
    for module in re.findall(r"No module named '?([\w.]+)'?", text):
        top = module.partition(".")[0]
        name = MISSING.get(module) or MISSING.get(top)
        if not name and normalize(top) in curated:
            name = normalize(top)
        found.update([name] if name else [])
    for fixture in re.findall(r"fixture '(\w+)' not found", text):
        found.update([_FIXTURES[fixture]] if fixture in _FIXTURES else [])
    if "async def functions are not natively supported" in text:
        found.add("pytest-asyncio")
    if "Requested settings, but settings are not configured" in text:
        found.add("pytest-django")
    return {normalize(name) for name in found} - {"pytest"}
