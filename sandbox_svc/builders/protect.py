"""Decides which changes of an agent's diff never reach a validation.

- Tests, test configuration, plugins and interpreter hooks are always those of the State.
- A refused path is an error; a protected one is left out and reported with a reason.
- Settings files are shared with builds: they are kept unless pytest's own part changed.
"""

import hashlib
import json
import posixpath
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regreen.rpc.errors import InvalidArgument
from regreen.testpaths import (
    CONFTEST,
    PYTEST_INI,
    SHARED_INI,
    folded,
    is_metadata,
    pytest_part,
    runs_at_start,
)
from sandbox_svc.builders.base import LOCK, REPO, FileChange, TestSpec
from sandbox_svc.builders.modules import (
    LIBRARY,
    SOURCE_FOLDERS,
    as_source,
    folders_of,
    module_of,
)

MAX_CHANGES = 2000
MAX_CHANGE_BYTES = 8 << 20
MAX_PATH = 400
MAX_SETTINGS_BYTES = 256 << 10
"""Longer settings are compared by their bytes alone: their parsers take time that grows faster."""
_ALL_SETTINGS_BYTES = 1 << 20
_WORDS_CHARS = 64 << 10
_MOST_DOTS = 500
"""In one line of TOML, for the same reason."""
EXACTLY = "="
"""Before a root that is itself alone: not what is below, nor folders of its name."""
_TEST_FOLDERS = frozenset({"test", "tests"})
_CONFIGURATION = "validation-configuration"
_CONFIG_OPTIONS = ("-c", "--config-file", "--inifile")
_VALUED = frozenset(
    {
        *("-k", "-m", "-o", "-p", "-r", "-W", "--tb", "--color", "--durations", "--maxfail"),
        *("--import-mode", "--log-level", "--override-ini", "--pythonwarnings", "--capture"),
    }
)
"""Options whose value, as a word of its own, is no path."""
_IMPORTABLE = (".py", *LIBRARY)
_RUNNER = frozenset(
    {
        *("pytest", "_pytest", "pluggy", "py", "iniconfig", "attr", "attrs", "packaging"),
        *("exceptiongroup", "tomli", "toml", "coverage", "six", "importlib_metadata", "zipp"),
        *("pyparsing", "more_itertools", "atomicwrites", "hypothesis", "pygments"),
    }
)


@dataclass(frozen=True, slots=True)
class Reverted:
    """A change that was left out, and why."""

    path: str
    reason: str


def check_path(path: str, field: str = "changes.path") -> None:
    """Refuse a path that is malformed or leaves the repository.

    Raises:
        InvalidArgument: it is.
    """
    parts = path.split("/")
    problem = ""
    if not path or len(path) > MAX_PATH:
        problem = "is empty or too long"
    elif path.startswith("/") or "\\" in path:
        problem = "is not relative with forward slashes"
    elif any(part in ("", ".", "..") for part in parts):
        problem = "has an empty, '.' or '..' part"
    elif any(ord(c) < 32 or ord(c) == 127 for c in path):
        problem = "has a control character"
    if problem:
        raise InvalidArgument(field, f"{path[:120]!r} {problem}", "name a file in the repo")


def check_changes(changes: Iterable[FileChange]) -> tuple[FileChange, ...]:
    """The changes sorted by path.

    Raises:
        InvalidArgument: too many, too large, one path twice, or none in the repository.
    """
    given = tuple(changes)
    if len(given) > MAX_CHANGES:
        raise InvalidArgument("changes", f"has {len(given)} files", f"at most {MAX_CHANGES}")
    seen: set[str] = set()
    for number, change in enumerate(given):
        field = f"changes[{number}]"
        check_path(change.path, f"{field}.path")
        if change.content is not None and len(change.content) > MAX_CHANGE_BYTES:
            raise InvalidArgument(f"{field}.content", f"{change.path} is too large", "shrink it")
        if change.path in seen:
            raise InvalidArgument(f"{field}.path", f"names {change.path} again", "merge them")
        seen.add(change.path)
    return tuple(sorted(given, key=lambda change: change.path))


def protected_roots(test: TestSpec) -> tuple[str, ...]:
    """Paths that hold tests or their settings: those of the arguments and those the spec names."""
    words = words_of(test.arguments, test.environment)
    named = [path.partition("::")[0] for path in paths_of(words)]
    for argument in words:
        option, equals, value = argument.partition("=")
        if equals and option in _CONFIG_OPTIONS:
            named.append(value)
        elif argument.startswith("-c") and not argument.startswith("--"):
            named.append(argument[2:])
    roots = {plain_path(path) for path in (*named, *test.protected_paths)}
    return tuple(sorted(root for root in roots if root not in ("", ".")))


def words_of(arguments: Iterable[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """What pytest takes for its arguments: those of a spec and those of its environment.

    Raises:
        InvalidArgument: a word names a file of arguments, or cannot be read.
    """
    text, field = environment.get("PYTEST_ADDOPTS", ""), "spec.test.environment[PYTEST_ADDOPTS]"
    if len(text) > _WORDS_CHARS:
        raise InvalidArgument(field, f"has {len(text)} characters", f"at most {_WORDS_CHARS}")
    try:
        added = shlex.split(text)
    except ValueError as error:
        raise InvalidArgument(field, f"cannot be read: {error}", "close its quotes") from None
    words = (*arguments, *added)
    if files := [word for word in words if word.startswith("@")]:
        problem = f"names a file of arguments, which a diff could change: {files[0][:80]!r}"
        raise InvalidArgument("spec.test.arguments", problem, "give what is in it")
    return words


def paths_of(words: Sequence[str]) -> tuple[str, ...]:
    """Those of pytest's arguments that are paths or ids of tests, and files that options name."""
    before = ("", *words)
    return tuple(
        word
        for option, word in zip(before, words, strict=False)
        if word and not word.startswith("-") and option not in _VALUED
    )


def plain_path(path: str) -> str:
    """A path of the repository that somebody names, relative to it."""
    inside = f"{path}/".removeprefix(f"{REPO}/").strip("/")
    return posixpath.normpath(inside) if inside else ""


def by_name(path: str, roots: Iterable[str]) -> str:
    """Why a path is the State's whatever is in the file; empty if it is not.

    Python takes a package or a library before a file of the same name.
    """
    parts = path.split("/")
    name = as_source(parts[-1])
    if ".git" in parts:
        return "repository-internals"
    if "__pycache__" in parts or name.endswith((".pyc", ".pyo")):
        return "plugin" if runs_at_start(path) else "generated"
    if name in PYTEST_INI or CONFTEST in (name, *(f"{part}.py" for part in parts[:-1])):
        return _CONFIGURATION
    if runs_at_start(path) or is_metadata(path):
        return "plugin"
    around = [folder for folder in folders_of(path) if folder]
    inside = (path, as_source(path), *around, *(f"{folder}.py" for folder in around))
    inside += (EXACTLY + path, EXACTLY + as_source(path))
    if not frozenset(roots).isdisjoint(inside):
        return "test"
    around = [folded(part) for part in parts[:-1]]
    return "test" if not _TEST_FOLDERS.isdisjoint(around) or _is_test_file(name) else ""


def protection(
    change: FileChange,
    roots: Iterable[str],
    settings: Mapping[str, str],
    modules: Iterable[str] = (),
    foreign: Iterable[str] = (),
    packages: Iterable[str] = (),
    places: Iterable[str] = (),
) -> str:
    """Why a change is left out, or empty if it is applied.

    `modules` are the top-level modules that the State's repository has of its own, by their paths,
    `foreign` those of its interpreters and installed packages. `packages` are folders that the diff
    makes packages, `places` where its tests look for modules.
    """
    roots, places = frozenset(roots), places_of(places)
    name = change.path.rpartition("/")[2]
    if reason := by_name(change.path, roots):
        return reason
    if name in SHARED_INI:
        kept = pytest_settings(name, change.content or b"")
        same = kept == settings.get(change.path, "")
        return "" if same and not _moves_root(change, settings, roots) else _CONFIGURATION
    if change.path in places and change.content is not None:
        return "shadows"  # Python takes an archive for a folder of modules
    made = frozenset((*packages, *packages_of([change])))
    own, foreign = frozenset(modules), frozenset(foreign)
    new = any(_shadows(change.path, place, own, foreign, made) for place in places)
    return "shadows" if new else ""


def _moves_root(change: FileChange, settings: Mapping[str, str], roots: Iterable[str]) -> bool:
    """Whether pytest might take the folder of a new `pyproject.toml` above tests for its root."""
    folder, slash, name = change.path.rpartition("/")
    new = name == "pyproject.toml" and change.path not in settings and change.content is not None
    return bool(new and slash) and any(root.startswith(folder + "/") for root in roots)


def _is_test_file(name: str) -> bool:
    return name.endswith(".py") and (name.startswith("test_") or name.endswith("_test.py"))


def packages_of(changes: Iterable[FileChange]) -> frozenset[str]:
    """Folders that these changes make packages."""
    written = (c.path.rpartition("/") for c in changes if c.content is not None)
    return frozenset(
        folder
        for folder, _, name in written
        if name.startswith("__init__.") and name.endswith(_IMPORTABLE)
    )


def places_of(path: Iterable[str]) -> frozenset[str]:
    """Folders of the repository, itself empty, that modules are looked for in."""
    inside = (place[len(REPO) + 1 :] for place in path if place.startswith(REPO + "/"))
    return frozenset(("", *SOURCE_FOLDERS, *inside))


def is_own(place: str, module: str, own: frozenset[str]) -> bool:
    """Whether the State's repository has a module in such a folder."""
    return (f"{place}/{module}" if place else module) in own


def _shadows(
    path: str, place: str, own: frozenset[str], foreign: frozenset[str], packages: frozenset[str]
) -> bool:
    """Whether a new module in a place would be imported instead of an installed one.

    A folder that is no package never wins over an installed one. Inside one that both have, each
    may bring its own modules: of those an installed one is named in `foreign` by its whole name.
    """
    if not path.endswith(_IMPORTABLE) or not path.startswith(f"{place}/" if place else ""):
        return False
    parts = path.split("/")
    start = place.count("/") + 1 if place else 0
    module = parts[start].partition(".")[0]
    whole_name = module_of("/".join(parts[start:]))
    if "." in whole_name and whole_name in foreign:
        return True
    if is_own(place, module, own):
        return False
    if module in _RUNNER or (module in foreign and module in sys.stdlib_module_names):
        return True
    whole = len(parts) == start + 1 or "/".join(parts[: start + 1]) in packages
    return module in foreign and whole


def pytest_settings(name: str, content: bytes) -> str:
    """pytest's part of a settings file in a form that can be compared; empty if it has none."""
    try:
        text = content.decode("utf-8")
        if len(content) > MAX_SETTINGS_BYTES:
            raise ValueError("too long")
        if name.endswith(".toml"):
            if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
                raise ValueError("a key with too many parts")
            table = tomllib.loads(text)
            found = (table.get("tool", {}) if name == "pyproject.toml" else table).get("pytest")
            return "" if found is None else json.dumps(found, sort_keys=True, default=str)
        sections = pytest_part(text)
        return json.dumps(sections) if sections else ""
    except (ValueError, AttributeError, RecursionError):
        return "unreadable " + hashlib.sha256(content).hexdigest()


def split_changes(
    changes: Iterable[FileChange],
    roots: Iterable[str],
    settings: Mapping[str, str],
    modules: Iterable[str] = (),
    foreign: Iterable[str] = (),
    places: Iterable[str] = (),
) -> tuple[tuple[FileChange, ...], tuple[Reverted, ...], FileChange | None]:
    """Changes to apply, changes left out, and the change of the lock file."""
    roots, modules, foreign = frozenset(roots), frozenset(modules), frozenset(foreign)
    changes, places = tuple(changes), tuple(places)
    settled = [c.content or b"" for c in changes if c.path.rpartition("/")[2] in SHARED_INI]
    if (size := sum(map(len, settled))) > _ALL_SETTINGS_BYTES:
        problem, most = f"have {size} bytes of settings files", f"at most {_ALL_SETTINGS_BYTES}"
        raise InvalidArgument("changes", problem, most)
    packages = packages_of(changes)
    kept: list[FileChange] = []
    reverted: list[Reverted] = []
    lock: FileChange | None = None
    for change in changes:
        if change.path == LOCK:
            lock = change
        elif reason := protection(change, roots, settings, modules, foreign, packages, places):
            reverted.append(Reverted(change.path, reason))
        else:
            kept.append(change)
    return tuple(kept), tuple(reverted), lock


def split_by(
    facts: Mapping[str, Any], changes: Iterable[FileChange]
) -> tuple[tuple[FileChange, ...], tuple[Reverted, ...], FileChange | None]:
    """The same by what a State's facts say; its tests find no helper of theirs elsewhere either."""
    roots, settings, modules = facts["protected"], facts["settings"], facts["modules"]
    taken = (*facts["foreign"], *facts["stems"])
    return split_changes(changes, roots, settings, modules, taken, facts["places"])
