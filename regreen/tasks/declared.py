"""What a project says of itself: name, interpreters, and what it and its tests need.

- Files are read, never executed; `setup.py` is therefore not asked.
- Requirements come out as PEP 508 text with the file that they stand in; Poetry's are translated.
- What is for tests is told by the name of an extra or group: test, tests, testing or dev.
"""

import configparser
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from regreen.lockfile import normalize
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.reading import bounded

TEST_NAMES = frozenset({"test", "tests", "testing", "dev"})
MAX_FILE_BYTES = 64 << 20
_PARTS = re.compile(r"^(\^|~=|~|===?|!=|[<>]=?)?\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Declared:
    """The metadata of a project."""

    name: str
    version: str = "0"
    requires_python: str = ""
    """Version specifiers; alternatives are separated by `||`."""
    source: str = "pyproject.toml"
    """The file that it was read from."""
    dependencies: tuple[str, ...] = ()
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    """Requirements files that the declaration refers to."""

    def for_tests(self) -> tuple[str, ...]:
        """Requirements of the extras and groups for tests."""
        parts = (*self.extras.items(), *self.groups.items())
        return tuple(line for name, lines in parts if name in TEST_NAMES for line in lines)

    def every(self) -> tuple[str, ...]:
        """Requirements of the project with all extras and groups."""
        parts = (*self.extras.values(), *self.groups.values())
        return (*self.dependencies, *(line for lines in parts for line in lines))


def read_declared(root: Path) -> Declared:
    """The declaration of the project in `root`; that of its folder's name where it makes none.

    Raises:
        InvalidArgument: a file cannot be read, or holds something else than it should.
    """
    try:
        return _read(root)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, InvalidArgument):
            raise
        name = "pyproject.toml" if (root / "pyproject.toml").exists() else "setup.cfg"
        problem = f"declares what cannot be read ({type(error).__name__}: {error})"
        raise InvalidArgument(name, problem, "correct it") from error


def _read(root: Path) -> Declared:
    own = normalize(root.resolve().name)
    path = root / "pyproject.toml"
    document = read_toml(path) if path.exists() else {}
    tool = document.get("tool", {})
    project, poetry = document.get("project", {}), tool.get("poetry", {})
    if project or poetry:
        return _of_pyproject(own, project, poetry, _groups(document, poetry), tool)
    found = _of_setup_cfg(own, root / "setup.cfg")
    return Declared(**{**found, "groups": _groups(document, {})})


def build_requires(root: Path) -> tuple[str, ...]:
    """What the build of the project in `root` requires (PEP 518), as PEP 508 text.

    Nothing where it does not say, or says what cannot be followed.
    """
    path = root / "pyproject.toml"
    try:
        system = read_toml(path).get("build-system", {}) if path.exists() else {}
        lines = system.get("requires", ()) if isinstance(system, Mapping) else ()
        return tuple(str(Requirement(line)) for line in lines if not Requirement(line).url)
    except (InvalidArgument, InvalidRequirement, TypeError):
        return ()


def read_text(path: Path) -> str:
    """The text of a file of the project.

    Raises:
        InvalidArgument: it cannot be read.
    """
    return bounded(path, path.name, MAX_FILE_BYTES).decode("utf-8-sig", "replace")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file of the project; raises as `read_text`, and where it is malformed."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(path.name, str(error), "correct it") from error
    except RecursionError as error:
        raise InvalidArgument(path.name, "is nested too deeply", "correct it") from error


def _of_pyproject(
    own: str,
    project: Mapping[str, Any],
    poetry: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    tool: Mapping[str, Any],
) -> Declared:
    wanted = dict(poetry.get("dependencies", {}))
    python = poetry_specifier(str(wanted.pop("python", "")))
    extras = {
        normalize(name): tuple(map(str, lines))
        for name, lines in project.get("optional-dependencies", {}).items()
    }
    for name, members in poetry.get("extras", {}).items():
        chosen = {k: v for k, v in wanted.items() if normalize(k) in set(map(normalize, members))}
        extras.setdefault(normalize(name), _poetry_lines(chosen, optional=True))
    dependencies = tuple(map(str, project.get("dependencies", ())))
    if "dependencies" not in project:
        dependencies = _poetry_lines(wanted)
    dynamic = tool.get("setuptools", {}).get("dynamic", {})
    files = dynamic.get("dependencies", {}).get("file", ())
    return Declared(
        name=normalize(str(project.get("name") or poetry.get("name") or own)),
        version=str(project.get("version") or poetry.get("version") or "0"),
        requires_python=str(project.get("requires-python") or python),
        dependencies=dependencies,
        extras=extras,
        groups=groups,
        files=(files,) if isinstance(files, str) else tuple(map(str, files)),
    )


def _groups(document: Mapping[str, Any], poetry: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Groups of PEP 735, and those that uv, PDM and Poetry had before it."""
    tables = document.get("dependency-groups", {})
    tool = document.get("tool", {})
    found = {normalize(name): _members(tables, name, ()) for name in tables}
    for name, lines in {
        **tool.get("pdm", {}).get("dev-dependencies", {}),
        "dev": tool.get("uv", {}).get("dev-dependencies", ()),
    }.items():
        found[normalize(name)] = (*found.get(normalize(name), ()), *map(str, lines))
    old = {"dev": {"dependencies": poetry.get("dev-dependencies", {})}}
    for name, table in (*old.items(), *poetry.get("group", {}).items()):
        lines = _poetry_lines(table.get("dependencies", {}))
        found[normalize(name)] = (*found.get(normalize(name), ()), *lines)
    return {name: lines for name, lines in found.items() if lines}


def _members(tables: Mapping[str, Any], name: str, above: tuple[str, ...]) -> tuple[str, ...]:
    if name in above:
        raise InvalidArgument("pyproject.toml", f"group {name} includes itself", "correct it")
    lines: list[str] = []
    for item in tables.get(name, ()):
        if isinstance(item, str):
            lines.append(item)
        elif isinstance(item, Mapping) and "include-group" in item:
            lines += _members(tables, str(item["include-group"]), (*above, name))
    return tuple(lines)


def _of_setup_cfg(own: str, path: Path) -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None)
    if path.exists():
        try:
            parser.read_string(read_text(path))
        except configparser.Error as error:
            raise InvalidArgument("setup.cfg", str(error).splitlines()[0], "correct it") from error

    def lines(text: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in text.splitlines() if line.strip())

    extras = "options.extras_require"
    needed = lines(parser.get("options", "install_requires", fallback=""))
    return {
        "name": normalize(parser.get("metadata", "name", fallback="") or own),
        "version": parser.get("metadata", "version", fallback="") or "0",
        "requires_python": parser.get("options", "python_requires", fallback=""),
        "source": "setup.cfg",
        "dependencies": tuple(line for line in needed if not line.startswith("file:")),
        "extras": {
            normalize(name): lines(text)
            for name, text in (parser.items(extras) if parser.has_section(extras) else [])
        },
        "files": tuple(line[5:].strip() for line in needed if line.startswith("file:")),
    }


def _poetry_lines(table: Mapping[str, Any], *, optional: bool = False) -> tuple[str, ...]:
    lines: list[str] = []
    for name, value in table.items():
        for item in value if isinstance(value, list) else [value]:
            if optional or not (isinstance(item, Mapping) and item.get("optional")):
                lines.append(poetry_requirement(name, item))
    return tuple(lines)


def poetry_requirement(name: str, value: Any) -> str:
    """One dependency of Poetry as PEP 508 text."""
    if not isinstance(value, Mapping):
        return f"{name}{_hull(poetry_specifier(str(value)))}"
    for kind in ("git", "url", "path", "file"):
        if kind in value:
            prefix = {"git": "git+", "url": "", "path": "file:", "file": "file:"}[kind]
            return f"{name} @ {prefix}{value[kind]}"
    extras = ",".join(value.get("extras", ()))
    markers = [f"({value['markers']})"] if value.get("markers") else []
    if python := poetry_specifier(str(value.get("python", ""))):
        markers.append(f"({' or '.join(map(_python_marker, python.split('||')))})")
    if value.get("platform"):
        markers.append(f"sys_platform == '{value['platform']}'")
    text = f"{name}{f'[{extras}]' if extras else ''}"
    text += _hull(poetry_specifier(str(value.get("version", "*"))))
    return f"{text} ; {' and '.join(markers)}" if markers else text


def _python_marker(specifier: str) -> str:
    clauses = (_PARTS.match(clause.strip()) for clause in specifier.split(","))
    texts = [f"python_full_version {c[1]} '{c[2]}'" for c in clauses if c and c[1]]
    return f"({' and '.join(texts)})" if texts else "python_version > '0'"


def _hull(specifier: str) -> str:
    """Alternatives as the one range around them, since PEP 440 has none."""
    first, *others = specifier.split("||")
    if not others:
        return first
    low = [c for c in first.split(",") if c.strip().startswith(">")]
    high = [c for c in others[-1].split(",") if c.strip().startswith("<")]
    return ",".join(c.strip() for c in (*low, *high))


def poetry_specifier(text: str) -> str:
    """A version constraint of Poetry as PEP 440 specifiers; alternatives stay separated by `||`."""
    return "||".join(
        ",".join(filter(None, (_clause(part) for part in _clauses(alternative))))
        for alternative in re.split(r"\|\|?", text)
    )


def _clauses(text: str) -> Iterable[str]:
    return re.findall(r"(?:\^|~=|~|===?|!=|[<>]=?)?\s*[^\s,]+", text)


def _clause(text: str) -> str:
    found = _PARTS.match(text.strip())
    assert found is not None
    sign, version = found[1] or "", found[2].strip()
    if version in ("", "*"):
        return ""
    if sign not in ("^", "~"):
        return f"{sign or '=='}{version}"
    numbers = [int(n) for n in re.findall(r"\d+", re.split(r"[a-zA-Z+-]", version)[0])]
    if sign == "~":
        at = min(len(numbers), 2) - 1
    else:
        at = next((i for i, n in enumerate(numbers) if n), len(numbers) - 1)
    end = [*numbers[:at], numbers[at] + 1]
    return f">={version},<{'.'.join(map(str, end))}"
