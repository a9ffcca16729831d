"""What a source archive says before anything of it runs: its tests, and what they need.

- An archive without tests, or with code to compile, is known from its list of names alone.
- Requirements are read from metadata and files; `setup.py` is parsed and never executed.
- What only checks, formats or publishes a project is no requirement of its tests.
"""

import ast
import configparser
import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from regreen.lockfile import normalize
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.complete import requires_of_sdist
from regreen.tasks.declared import Declared, build_requires, read_declared
from regreen.tasks.wanted import Requirements

MAX_FILES = 4000
MAX_UNPACKED = 64 << 20
_TEST_FILE = re.compile(r"(?:^|/)(?:test_[^/]*|[^/]*_tests?|tests?)\.py$")
_ASIDE = re.compile(r"^(?:examples?|docs?|build|demo)/|/data/")
_TEST_FOLDERS = frozenset({"test", "tests", "testing", "unittests"})
_COMPILED = (".pyx", ".c", ".cpp", ".cc", ".rs", ".f90", ".go")
_NOT_NEEDED = re.compile(
    r"^(?:black|mypy|flake8|pylint|twine|tox|nox|pre-commit|build|wheel|coveralls|codecov|isort|"
    r"ruff|ipython|ipdb|pudb|check-manifest|bump2?version|bumpversion|zest-releaser|pyright|"
    r"sphinx-.*|mkdocs-.*|types-.*|flake8-.*|pytest-(?:black|flake8|mypy|pylint|ruff|xdist|"
    r"sugar|cov|checkdocs|enabler|isort|pycodestyle|pep8|travis-fold|randomly|watch|timeout)|"
    r"pytest-runner|detox|pip|virtualenv|towncrier|bandit|safety|vulture|docformatter|yapf|"
    r"pycodestyle|pydocstyle|pyupgrade|interrogate|codespell|doc8|mkdocs|furo|commitizen|"
    r"python-semantic-release|memory-profiler|tox-.*|nox-.*|jupyter|notebook|invoke|reno)$"
)
_KEPT_PLUGINS = frozenset({"pytest-timeout", "pytest-xdist", "pytest-cov", "pytest-randomly"})
_FILES = re.compile(r"(?:^|[-_./])(?:dev|tests?|testing)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a project and its tests require, as PEP 508 text."""

    runtime: tuple[str, ...]
    tests: tuple[str, ...]
    """Without bounds: the day decides."""
    build: tuple[str, ...] = ()
    """What the project's own build asks for."""

    def names(self) -> tuple[str, ...]:
        """Every requirement without bounds, its extras kept."""
        return tuple(dict.fromkeys(map(unbound, (*self.runtime, *self.tests))))

    def with_tests(self, names: Iterable[str]) -> "Needs":
        """The same with more for the tests."""
        return replace(self, tests=tuple(dict.fromkeys((*self.tests, *names))))


def unbound(requirement: str) -> str:
    """A requirement's name with its extras, nothing else."""
    found = Requirement(requirement)
    extras = f"[{','.join(sorted(found.extras))}]" if found.extras else ""
    return f"{normalize(found.name)}{extras}"


def member_names(archive: bytes) -> list[str]:
    """Paths of the files of a gzipped tar archive, below its top folder.

    Raises:
        InvalidArgument: the archive cannot be read, or is too large.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = [m for m in tar.getmembers() if m.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidArgument("sdist", f"cannot be read ({error})", "choose another") from error
    if len(members) > MAX_FILES or sum(m.size for m in members) > MAX_UNPACKED:
        raise InvalidArgument("sdist", "is too large", "choose a smaller package")
    return [m.name.partition("/")[2] for m in members]


def test_roots(names: Sequence[str]) -> list[str]:
    """Paths to run the tests from; empty if there are none."""
    files = [name for name in names if _TEST_FILE.search(name) and not _ASIDE.search(name)]
    folders: dict[str, int] = {}
    for name in files:
        parts = name.split("/")[:-1]
        depth = next((i for i, part in enumerate(parts) if part in _TEST_FOLDERS), None)
        if depth is not None:
            root = "/".join(parts[: depth + 1])
            folders[root] = folders.get(root, 0) + 1
    top = [root for root in folders if "/" not in root]
    if top:
        return sorted(top)
    if folders:
        return sorted(folders)[:8]
    loose = [n for n in files if n.count("/") <= 2 and n.rpartition("/")[2].startswith("test_")]
    return sorted(loose)[:40]


def is_test_module(path: str) -> bool:
    """Whether a file is a module of tests by its name."""
    name = path.rpartition("/")[2]
    return bool(re.fullmatch(r"test_.*\.py|.*_tests?\.py", name))


def compiled(names: Sequence[str]) -> bool:
    """Whether the archive holds code that must be compiled."""
    return any(n.endswith(_COMPILED) and "test" not in n and "doc" not in n for n in names)


def unpack(archive: bytes, into: Path) -> Path:
    """Lay an archive out for reading; the project's folder.

    Raises:
        InvalidArgument: it has paths that leave it.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(into, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidArgument("sdist", f"cannot be unpacked ({error})", "choose another") from error
    folders = [path for path in into.iterdir() if path.is_dir()]
    return folders[0] if len(folders) == 1 else into


def licence_of(root: Path) -> str:
    """The licence that a project's metadata names, shortly."""
    path = root / "PKG-INFO"
    if not path.exists():
        return ""
    headers = HeaderParser().parsestr(path.read_text("utf-8", "replace"))
    expression = headers.get("License-Expression") or ""
    classifiers = [c for c in headers.get_all("Classifier") or [] if c.startswith("License ::")]
    named = classifiers[0].rpartition(" :: ")[2] if classifiers else ""
    text = expression or named or (headers.get("License") or "").strip().partition("\n")[0]
    return "" if text in ("UNKNOWN", "OSI Approved") else text[:60]


def needs_of(root: Path, archive: bytes, python: str, package: str) -> Needs:
    """What the project in `root` and its tests require on an interpreter."""
    try:
        declared = read_declared(root)
    except InvalidArgument:
        declared = Declared(name=package)
    runtime = requires_of_sdist(archive, python)
    runtime += _plain([*declared.dependencies, *_setup_py(root, "install_requires")], root, python)
    tests: list[str] = []
    for extra in ("test", "tests", "testing"):
        tests += requires_of_sdist(archive, python, extra)
    tests += _plain([*_setup_py(root, "tests_require"), *_of_tox(root)], root, python)
    tests += _of_files(root, python)
    tests += _plain(declared.for_tests(), root, python)
    if not tests:
        tests += requires_of_sdist(archive, python, "dev")
    if _mentions(root, "pkg_resources"):
        tests.append("setuptools")
    own = normalize(package)
    needed = tuple(line for line in _unique(runtime) if normalize(Requirement(line).name) != own)
    building = _plain(build_requires(root), root, python)
    return Needs(needed, _for_tests(tests, {own, *map(unbound, needed)}), tuple(building))


def _for_tests(lines: Iterable[str], had: set[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for line in [*_unique(lines), "pytest"]:
        name = normalize(Requirement(line).name)
        if unbound(line) not in had and (name in _KEPT_PLUGINS or not _NOT_NEEDED.match(name)):
            found.setdefault(unbound(line))
    return tuple(found)


def _unique(lines: Iterable[str]) -> list[str]:
    """Requirements that can be followed, the first of each name, without markers."""
    found: dict[str, str] = {}
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.url is None:
            requirement.marker = None
            found.setdefault(normalize(requirement.name), str(requirement))
    return list(found.values())


def _plain(lines: Iterable[str], root: Path, python: str) -> list[str]:
    """Requirements whose markers hold; what cannot be followed is left out."""
    asked = Requirements(root, Declared(name="-"), python)
    for line in lines:
        try:
            asked.add(line, "declared")
        except InvalidArgument:
            continue
    return [item.text for item in asked.wanted]


def _of_files(root: Path, python: str) -> list[str]:
    """Lines of requirements files for tests."""
    found: list[str] = []
    places = [*root.glob("*.txt"), *(root / "requirements").glob("*.txt")]
    places += [*root.glob("test*/*.txt")]
    for path in sorted(places):
        name = str(path.relative_to(root))
        if "require" not in name or not _FILES.search(name):
            continue
        asked = Requirements(root, Declared(name="-"), python)
        try:
            asked.add_file(path)
        except (InvalidArgument, RecursionError):
            pass  # what stood before the line that cannot be followed is kept
        found += [item.text for item in asked.wanted]
    return found


def _of_tox(root: Path) -> list[str]:
    """Requirements of the default test environment."""
    path = root / "tox.ini"
    if not path.exists():
        return []
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(path.read_text("utf-8", "replace"))
    except configparser.Error:
        return []
    lines = parser.get("testenv", "deps", fallback="").splitlines()
    return [line.strip() for line in lines if re.match(r"^\s*[A-Za-z][\w.-]*\s*[<>=!~]?", line)]


def _setup_py(root: Path, keyword: str) -> list[str]:
    """A literal list that `setup()` is given."""
    path = root / "setup.py"
    if not path.exists():
        return []
    try:
        tree = ast.parse(path.read_text("utf-8", "replace"))
    except (SyntaxError, ValueError):
        return []
    values = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == keyword
    ]
    values += [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id.lower() == keyword for t in node.targets)
    ]
    for value in values:
        try:
            found = ast.literal_eval(value)
        except ValueError:
            continue
        if isinstance(found, list | tuple):
            return [line for line in found if isinstance(line, str)]
    return []


def _mentions(root: Path, word: str) -> bool:
    paths = sorted(root.rglob("*.py"))[:600]
    return any(word in path.read_text("utf-8", "replace") for path in paths if path.is_file())
