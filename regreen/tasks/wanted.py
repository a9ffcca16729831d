"""Requirements of a project for one interpreter, each with the place that it stands in.

- A line is taken, left out because its marker is false, or refused by file and line; an option
  that is not followed is noted. Nothing is dropped in silence.
- `-r` and `-c` are followed. URLs, version control and paths are refused.
- The project itself is no requirement of its own, but the extras that it is named with are.
"""

import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import (
    Marker,
    UndefinedComparison,
    UndefinedEnvironmentName,
    default_environment,
)
from packaging.requirements import InvalidRequirement, Requirement

from regreen.lockfile import normalize
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.declared import Declared, read_text
from regreen.tasks.reading import top_of

_COMMENT = re.compile(r"(?<!\S)#.*$")
_OPTION = re.compile(r"^(--[\w-]+|-\w)(?:[\s=]+)?(.*)$")
_OWN = re.compile(r"^(?:file:)?\.?/?(?:\[([\w.,\s-]+)\])?$")
_NOT_OF_INDEX = re.compile(r"://|^(?:git|hg|svn|bzr)\+|^(?:file:|\.{0,2}/)|\.(?:whl|zip|tar\.\w+)$")
_SOURCES = ("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--no-index")
REMEDY = "take it out, or name a file of name==version lines with --lock"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One requirement whose marker holds."""

    name: str
    """Normalised."""
    text: str
    """PEP 508 without the marker."""
    where: str
    """File, and line where there is one."""
    version: str = ""
    """The one release that it allows; empty for a range."""

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"


def marker_environment(python: str) -> dict[str, str]:
    """What markers see in a sandbox with that interpreter; of its releases the latest is taken."""
    full = f"{python}.99"
    return {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python,
        "python_full_version": full,
        "implementation_name": "cpython",
        "implementation_version": full,
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": platform.machine(),
        "extra": "",
    }


def holds(marker: str | Marker, environment: Mapping[str, str]) -> bool:
    """Whether a marker is true."""
    try:
        found = Marker(marker) if isinstance(marker, str) else marker
        return found.evaluate(dict(environment))
    except (UndefinedEnvironmentName, UndefinedComparison):
        return False


class Requirements:
    """Collects what is wanted."""

    def __init__(self, root: Path, declared: Declared, python: str) -> None:
        self.root, self.declared = root, declared
        self.places = [top_of(root)]
        """Directories that files may lie in."""
        self.environment = marker_environment(python)
        self.wanted: dict[Wanted, None] = {}
        self.constraints: dict[Wanted, None] = {}
        self.notes: list[str] = []
        self._files: set[tuple[Path, bool]] = set()
        self._extras: set[str] = set()

    def add(self, text: str, where: str, *, constraint: bool = False) -> None:
        """Take one requirement if its marker holds.

        Raises:
            InvalidArgument: it is malformed, or no release of an index.
        """
        if own := _OWN.fullmatch(text):
            return self._own_extras(filter(None, map(str.strip, (own[1] or "").split(","))))
        if " @ " not in text and _NOT_OF_INDEX.search(text.partition(";")[0].strip()):
            raise _refused(where, text)
        try:
            found = Requirement(text)
        except (InvalidRequirement, RecursionError) as error:
            reason = str(error).splitlines()[0]
            problem = f"{text[:80]!r} is no requirement ({reason})"
            raise InvalidArgument(where, problem, REMEDY) from error
        if found.marker and not holds(found.marker, self.environment):
            return None
        name = normalize(found.name)
        if name == self.declared.name:
            return self._own_extras(found.extras)
        if found.url is not None:
            raise _refused(where, text)
        found.marker = None
        target = self.constraints if constraint else self.wanted
        target[Wanted(name, str(found), where, _exact(found))] = None
        return None

    def add_file(self, path: Path, *, constraint: bool = False) -> None:
        """Take every line of a requirements file, and of those that it names."""
        if (path.resolve(), constraint) in self._files:
            return
        self._files.add((path.resolve(), constraint))
        name = self.name_of(path)
        if not any(path.resolve().is_relative_to(place) for place in self.places):
            raise InvalidArgument(name, "is outside of the repository", "put the file itself there")
        for number, line in _lines(read_text(path)):
            where = f"{name} line {number}"
            if option := _OPTION.match(line):
                self._option(option[1], option[2].strip(), path, where)
            else:
                self.add(re.split(r"\s--\w", line)[0].strip(), where, constraint=constraint)

    def name_of(self, path: Path) -> str:
        """A path as people call it: inside the project, from its root."""
        whole, root = path.resolve(), self.root.resolve()
        return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(path)

    def _option(self, name: str, value: str, path: Path, where: str) -> None:
        if name in ("-r", "--requirement", "-c", "--constraint"):
            if "://" in value or not (path.parent / value).is_file():
                raise InvalidArgument(where, f"{value} is no file here", REMEDY)
            self.add_file(path.parent / value, constraint=name in ("-c", "--constraint"))
        elif name in ("-e", "--editable"):
            if not _OWN.fullmatch(value):
                raise _refused(where, value)
            self.add(value, where)
        elif name != "--hash":  # its value is not shown: it may hold a password
            remedy = "; set REGREEN_INDEX_URL" if name in _SOURCES else ""
            self.notes.append(f"{where}: {name} is not followed{remedy}")

    def _own_extras(self, names: Iterable[str]) -> None:
        for name in map(normalize, names):
            if name not in self._extras:
                self._extras.add(name)
                for line in self.declared.extras.get(name, ()):
                    self.add(line, f"{self.declared.source} extra {name}")


def _exact(requirement: Requirement) -> str:
    specifiers = list(requirement.specifier)
    if len(specifiers) != 1 or specifiers[0].operator not in ("==", "==="):
        return ""
    version = specifiers[0].version
    return "" if version.endswith(".*") else version


def _refused(where: str, text: str) -> InvalidArgument:
    shown = re.sub(r"//[^/@\s]*@", "//", text)[:80]  # without a password
    return InvalidArgument(where, f"{shown!r} is a URL, path or version control", REMEDY)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines as pip joins them, each with the number of its first, without comments."""
    joined, start = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        start = start or number
        if raw.endswith("\\") and not raw.lstrip().startswith("#"):
            joined += raw[:-1].strip() + " "
            continue
        line = _COMMENT.sub("", joined + raw.strip()).strip()
        if line:
            yield start, line
        joined, start = "", 0
    if line := _COMMENT.sub("", joined).strip():
        yield start, line
