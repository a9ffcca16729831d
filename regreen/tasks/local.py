"""Makes a task of a project on disk: what it is, what it runs on, what is installed.

- Nothing of the project is executed here: metadata and installed versions are read as files.
- What is installed comes from, in this order: a lock file that the caller names, the project's own
  virtual environment, its lock or pinned requirements, or a fresh resolution of what it declares.
- The tree is packed without version control, environments and caches, and is bounded in size.
- Paths in the archive are relative; links that leave the project are left out.
"""

import configparser
import hashlib
import io
import os
import re
import tarfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from regreen.blobs import Digest
from regreen.common import v1 as common_pb
from regreen.lockfile import normalize
from regreen.pkgindex import PackageIndex, find_uv, index_urls
from regreen.rpc.errors import InvalidArgument, MissingDependency, NotFound
from regreen.sandbox import v1 as pb
from regreen.tasks.model import DistributionRecord
from regreen.tasks.offers import neighbours
from regreen.tasks.pin import Pinner

MAX_TREE_BYTES = 256 << 20
SKIPPED = frozenset(
    {".git", ".hg", ".svn", ".venv", "venv", "env", ".env", ".tox", ".nox", "node_modules"}
    | {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "build", "dist", ".eggs"}
)
ENVIRONMENTS = (".venv", "venv", "env")
_MARKERS = ("pyproject.toml", "setup.py", "setup.cfg", "requirements.txt", "requirements.lock")
_PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([A-Za-z0-9.!+_-]+)")
_LOCK_PYTHON = re.compile(r"^#\s*python==(\d+\.\d+)\s*$", re.MULTILINE)
_MTIME = 1_600_000_000
_TEST_EXTRAS = frozenset({"test", "tests", "testing", "dev"})
_INSTALLERS = frozenset({"pip", "wheel", "distribute", "uv"})


@dataclass(frozen=True, slots=True)
class Project:
    """A Python project on disk and the environment that its tests fail in."""

    root: Path
    name: str
    version: str
    python: str
    """Interpreter, `major.minor`."""
    pins: tuple[str, ...]
    """Installed packages as `name==version`."""
    origin: str
    """Where the pins come from, for people."""
    pin_file: str
    """Path of the file with `name==version` lines that they come from; empty for another source."""
    requirements: tuple[str, ...]
    """What it declares that it needs; used when nothing says what is installed."""
    test_arguments: tuple[str, ...]
    installable: bool
    """Whether the project has a build configuration."""


def detect(
    root: Path,
    interpreters: Iterable[str],
    *,
    python: str = "",
    lock: Path | None = None,
    tests: Sequence[str] = (),
) -> Project:
    """What can be read of a project; pins are empty when they must be resolved.

    Raises:
        InvalidArgument: no Python project there.
        MissingDependency: no interpreter here fits.
    """
    check_root(root)
    declared = _declared(root)
    pins, origin = installed(root, lock)
    return Project(
        root=root,
        name=normalize(str(declared.get("name") or root.resolve().name)),
        version=str(declared.get("version") or "0"),
        python=choose_interpreter(root, declared, interpreters, python),
        pins=tuple(sorted(pins)),
        origin=origin,
        pin_file=_pin_file(root, origin, lock),
        requirements=_requirements(root, declared),
        test_arguments=tuple(tests) or _test_arguments(root),
        installable=_installable(root),
    )


def check_root(root: Path) -> None:
    """Whether there is a Python project at all.

    Raises:
        InvalidArgument: there is none.
    """
    if not root.is_dir():
        raise InvalidArgument("path", f"{root} is no directory", "give a project's directory")
    if not any((root / marker).exists() for marker in _MARKERS) and not any(root.glob("*.py")):
        wanted = ", ".join(_MARKERS)
        raise InvalidArgument("path", f"{root} is no Python project", f"one of {wanted} is needed")


def _installable(root: Path) -> bool:
    """Whether the project says how it is built; a `pyproject.toml` may only configure tools."""
    if (root / "setup.py").exists():
        return True
    path = root / "pyproject.toml"
    return path.exists() and bool({"project", "build-system"} & set(_toml(path)))


def installed(root: Path, lock: Path | None = None) -> tuple[set[str], str]:
    """Installed packages and where they were read; an empty set when nothing says.

    Raises:
        InvalidArgument: the lock that was named has no pin.
    """
    if lock is not None:
        pins = _pins_of_text(_read(lock))
        if not pins:
            raise InvalidArgument("lock", f"{lock} has no name==version line", "give a pinned file")
        return pins, str(lock)
    for name in ENVIRONMENTS:
        if (root / name / "pyvenv.cfg").exists():
            return _pins_of_environment(root / name, root), f"the environment {name}"
    for name in ("requirements.lock", "uv.lock", "poetry.lock", "requirements.txt"):
        path = root / name
        if path.exists():
            text = _read(path)
            pins = (
                _pins_of_toml(text) if name in ("uv.lock", "poetry.lock") else _pins_of_text(text)
            )
            if pins:
                return pins, name
    return set(), "a fresh resolution"


def _pin_file(root: Path, origin: str, lock: Path | None) -> str:
    """The text file of pins inside the project, relative to it."""
    if lock is None:
        return origin if origin in ("requirements.lock", "requirements.txt") else ""
    path = lock.resolve()
    inside = path.is_relative_to(root.resolve())
    return str(path.relative_to(root.resolve())) if inside else ""


def choose_interpreter(
    root: Path, declared: Mapping[str, Any], interpreters: Iterable[str], asked: str = ""
) -> str:
    """The interpreter to use: the one asked for, the project's, else the newest that fits.

    Raises:
        MissingDependency: none fits; names what is wanted and what is here.
    """
    have = sorted(interpreters, key=Version)
    wanted = asked or _environment_python(root)
    if wanted:
        short = ".".join(wanted.split(".")[:2])
        if short in have:
            return short
        raise MissingDependency(
            f"python: the project uses Python {short}; found {', '.join(have) or 'none'}; "
            "install it, or choose one with --python"
        )
    try:
        allowed = SpecifierSet(str(declared.get("requires-python") or ""))
    except InvalidSpecifier as error:
        raise InvalidArgument("requires-python", str(error), "correct it") from error
    fitting = [version for version in have if allowed.contains(f"{version}.99")]
    if not fitting:
        raise MissingDependency(
            f"python: the project needs Python {allowed}; found {', '.join(have) or 'none'}"
        )
    return fitting[-1]


def pack(root: Path) -> tuple[bytes, Digest]:
    """The project's files as a tar archive; equal trees give equal bytes.

    Raises:
        InvalidArgument: the tree is too large.
    """
    buffer = io.BytesIO()
    size = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(_files(root)):
            info = archive.gettarinfo(str(path), arcname=str(path.relative_to(root)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = _MTIME
            size += info.size
            if size > MAX_TREE_BYTES:
                limit = MAX_TREE_BYTES >> 20
                raise InvalidArgument("path", f"holds over {limit} MiB", "remove build products")
            try:
                with path.open("rb") as content:
                    archive.addfile(info, content)
            except OSError as error:
                raise InvalidArgument("path", str(error), "make it readable") from error
    data = buffer.getvalue()
    return data, Digest(hashlib.sha256(data).hexdigest(), len(data))


async def environment_of(project: Project, tree: Digest) -> pb.EnvironmentSpec:
    """The environment spec of a project, every release by hash, with other versions to choose from.

    Raises:
        InvalidArgument: a package or release is not on the index.
        Unavailable: the index cannot be reached.
    """
    today = datetime.now(UTC).date().isoformat()
    async with PackageIndex(index_urls()) as index:
        pinner = Pinner(index, find_uv())
        try:
            pins = await _pins(project, pinner)
            offered = await _offered(pins, project.python, pinner)
            tools = await pinner.tools(project.python, today)
            pinner.need([*pins, *offered, *tools], [project.python])
            known = {record.pin: record for record in await pinner.distributions()}
        except NotFound as error:
            raise InvalidArgument("pins", error.message, f"correct {project.origin}") from error
    lost = [pin for pin in pins if pin not in known]
    if lost:
        problem = f"{lost[0]} has no file on the index"
        raise InvalidArgument("pins", problem, f"correct {project.origin}")
    return _spec(project, tree, pins, sorted(offered - set(pins)), tools, known)


async def _pins(project: Project, pinner: Pinner) -> list[str]:
    """What is installed, or a fresh resolution; pytest is added where it is missing."""
    pins = list(project.pins)
    if not pins:
        pins = await pinner.resolve([*project.requirements, "pytest"], project.python)
    names = {pin.partition("==")[0] for pin in pins}
    if "pytest" in names:
        return pins
    try:
        runner = await pinner.resolve(["pytest", *pins], project.python)
    except NotFound:  # a pin without a wheel, or one that no pytest of today fits
        runner = await pinner.resolve(["pytest"], project.python)
    return pins + [pin for pin in runner if pin.partition("==")[0] not in names]


async def _offered(pins: Sequence[str], python: str, pinner: Pinner) -> set[str]:
    """Other releases to choose from: the newest that fit together, and those near each pin."""
    names = sorted({pin.partition("==")[0] for pin in pins})
    offered = set(await pinner.newest(names, python))
    for pin in pins:
        offered.update(await neighbours(pinner.index, pin, python))
    return offered


def _spec(
    project: Project,
    tree: Digest,
    pins: Sequence[str],
    offered: Sequence[str],
    tools: Sequence[str],
    known: Mapping[str, DistributionRecord],
) -> pb.EnvironmentSpec:
    def message(pin: str) -> pb.Pin:
        record = known[pin]
        files = [pb.DistFile(filename=f.filename, sha256=f.sha256) for f in record.files]
        return pb.Pin(name=record.name, version=record.version, files=files)

    spec = pb.EnvironmentSpec(
        builder="python",
        package=project.name,
        version=project.version,
        source_tree=common_pb.Digest(sha256=tree.sha256, size_bytes=tree.size_bytes),
        python=project.python,
        pins=[message(pin) for pin in sorted(pins)],
        wheelhouse=[message(pin) for pin in offered if pin in known],
        build_pins=[message(pin) for pin in tools if pin in known],
        install_mode="editable" if project.installable else "path",
    )
    spec.test.arguments.extend(project.test_arguments)
    spec.test.timeout.FromSeconds(600)
    return spec


def _declared(root: Path) -> Mapping[str, Any]:
    path = root / "pyproject.toml"
    if path.exists():
        project: Mapping[str, Any] = _toml(path).get("project", {})
        if project:
            return project
    parser = configparser.ConfigParser(interpolation=None)
    if (root / "setup.cfg").exists():
        try:
            parser.read_string(_read(root / "setup.cfg"))
        except configparser.Error as error:
            raise InvalidArgument("setup.cfg", str(error).splitlines()[0], "correct it") from error
    if not parser.has_section("metadata"):
        return {}
    return {
        "name": parser.get("metadata", "name", fallback=""),
        "requires-python": parser.get("options", "python_requires", fallback=""),
        "dependencies": parser.get("options", "install_requires", fallback="").splitlines(),
        "optional-dependencies": {
            name: text.splitlines()
            for name, text in (
                parser.items("options.extras_require")
                if parser.has_section("options.extras_require")
                else []
            )
        },
    }


def _requirements(root: Path, declared: Mapping[str, Any]) -> tuple[str, ...]:
    """What the project declares that it and its tests need, for a fresh resolution."""
    lines = [str(line) for line in declared.get("dependencies", [])]
    for extra, wanted in declared.get("optional-dependencies", {}).items():
        lines += [str(line) for line in wanted if extra in _TEST_EXTRAS]
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-test.txt"):
        if (root / name).exists():
            lines += _read(root / name).splitlines()
    own = normalize(str(declared.get("name") or root.resolve().name))
    found = set()
    for line in lines:
        try:
            requirement = Requirement(line.partition(" #")[0].strip())
        except InvalidRequirement:
            continue
        if requirement.url is None and normalize(requirement.name) != own:
            found.add(str(requirement))
    return tuple(sorted(found))


def _environment_python(root: Path) -> str:
    pinned = root / ".python-version"
    if pinned.exists():
        return _read(pinned).strip().partition("\n")[0].removeprefix("python")
    lock = root / "requirements.lock"
    if lock.exists() and (found := _LOCK_PYTHON.search(_read(lock))):
        return found.group(1)
    for name in ENVIRONMENTS:
        path = root / name / "pyvenv.cfg"
        if path.exists():
            found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+)", _read(path), re.MULTILINE)
            return found.group(1) if found else ""
    return ""


def _pins_of_environment(environment: Path, root: Path) -> set[str]:
    """Installed distributions, read from their metadata; the project itself left out."""
    own = normalize(str(_declared(root).get("name") or root.resolve().name))
    pins = set()
    for packages in environment.glob("lib/python*/site-packages"):
        for found in distributions(path=[str(packages)]):
            name = normalize(found.metadata["Name"] or "")
            if name and name != own and name not in _INSTALLERS:
                pins.add(f"{name}=={found.version}")
    return pins


def _pins_of_text(text: str) -> set[str]:
    found = (_PINNED.match(line.strip()) for line in text.splitlines())
    return {f"{normalize(pin.group(1))}=={pin.group(2)}" for pin in found if pin}


def _pins_of_toml(text: str) -> set[str]:
    try:
        packages = tomllib.loads(text).get("package", [])
    except tomllib.TOMLDecodeError:
        return set()
    return {
        f"{normalize(entry['name'])}=={entry['version']}"
        for entry in packages
        if "version" in entry and not {"virtual", "editable"} & set(entry.get("source", {}))
    }


def _test_arguments(root: Path) -> tuple[str, ...]:
    return next(((name,) for name in ("tests", "test", "testing") if (root / name).is_dir()), ())


def _files(root: Path) -> Iterable[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [
            name for name in names if name not in SKIPPED and not name.endswith(".egg-info")
        ]
        for name in files:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                yield path


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read(path))
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(path.name, str(error), "correct it") from error


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError as error:
        raise InvalidArgument(path.name, str(error), "make it readable") from error
