"""A team's own failing build: where its files are, and what repairs it.

- It is a directory, or a repository that the `git` program clones; a `task.toml` may say more.
- Nothing of the repository is run (`regreen.tasks.repository`).
- What a `task.toml` names is inside the repository.
- The fix is a patch, or a commit of the repository; the project's own files are never changed.
"""

import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.local import project_files
from regreen.tasks.reading import bounded, kept_inside, top_of
from regreen.tasks.repository import clone, files_of, git, is_url, name_of

CONFIG = "task.toml"
MAX_TIMEOUT_S = 86_400.0
_MAX_BYTES = 16 << 20
"""Of a `task.toml`, and of a patch."""
_FIELDS = {
    "task": ("id", "path", "python", "tests", "lock", "split", "timeout_s", "licence", "commit"),
    "fix": ("patch", "commit", "mode"),
}


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for, of the command line and of `task.toml`."""

    id: str = ""
    path: str = "."
    """The project inside the repository or directory."""
    python: str = ""
    tests: tuple[str, ...] = ()
    lock: str = ""
    split: str = "train"
    timeout_s: float = 300.0
    licence: str = ""
    commit: str = ""
    """The broken commit of a repository; empty: the parent of the fix, else the newest."""
    fix_patch: Path | None = None
    fix_commit: str = ""
    mode: str = "any_fix"


@dataclass(frozen=True, slots=True)
class Checkout:
    """The broken project on disk, and the repaired one where it is known."""

    broken: Path
    fixed: Path | None
    wish: Wish


def check_out(source: str, asked: Wish, work: Path) -> Checkout:
    """The broken and the repaired project, below `work` where they are no directory of the caller.

    Raises:
        InvalidArgument: a field of `task.toml`, a patch or a commit is wrong.
        MissingDependency: there is no git program.
    """
    if is_url(source):
        return _of_repository(source.removeprefix("git+"), asked, work)
    root = Path(source).resolve()
    if not root.is_dir():
        remedy = "give a project's directory, or the address of a git repository"
        raise InvalidArgument("path", f"{source} is no directory", remedy)
    wish = wished(root, asked)
    project = inside(root, wish.path)
    if wish.fix_patch is not None:
        return Checkout(project, _patched(project, wish.fix_patch, work / "fixed"), wish)
    if wish.fix_commit:
        cloned = clone(str(root), work / "repository")
        fixed = files_of(cloned, wish.fix_commit, work / "fixed", "fix.commit")
        return Checkout(project, inside(fixed, wish.path), wish)
    return Checkout(project, None, wish)


def _of_repository(url: str, asked: Wish, work: Path) -> Checkout:
    cloned = clone(url, work / "repository")
    commit = asked.commit or (f"{asked.fix_commit}^" if asked.fix_commit else "HEAD")
    name = name_of(url)
    broken = files_of(cloned, commit, work / "broken" / name, "commit")
    wish = wished(broken, asked)
    if wish.fix_commit and not asked.commit and not asked.fix_commit:
        commit = wish.commit or f"{wish.fix_commit}^"
        broken = files_of(cloned, commit, work / "broken-too" / name, "task.commit")
    project = inside(broken, wish.path)
    if wish.fix_patch is not None:
        return Checkout(project, _patched(project, wish.fix_patch, work / "fixed"), wish)
    if not wish.fix_commit:
        return Checkout(project, None, wish)
    fixed = files_of(cloned, wish.fix_commit, work / "fixed", "fix.commit")
    return Checkout(project, inside(fixed, wish.path), wish)


def wished(root: Path, asked: Wish) -> Wish:
    """What was asked for, completed by the `task.toml` of a directory.

    Raises:
        InvalidArgument: names the line or the field.
    """
    path = root / CONFIG
    if not path.exists() and not path.is_symlink():
        return asked
    kept_inside(path, top_of(root), CONFIG)
    try:
        document = tomllib.loads(bounded(path, CONFIG, _MAX_BYTES).decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidArgument(CONFIG, f"cannot be read: {error}", "correct that line") from error
    for section, values in document.items():
        if section not in _FIELDS or not isinstance(values, dict):
            known = ", ".join(f"[{name}]" for name in _FIELDS)
            raise InvalidArgument(f"{CONFIG} field {section}", "is not known", f"write {known}")
        for name in values:
            if name not in _FIELDS[section]:
                known = ", ".join(_FIELDS[section])
                field = f"{CONFIG} field {section}.{name}"
                raise InvalidArgument(field, "is not known", f"give some of {known}")
    return _completed(root, asked, document)


def _completed(root: Path, asked: Wish, document: Mapping[str, Any]) -> Wish:
    task, fix = document.get("task", {}), document.get("fix", {})
    said: dict[str, Any] = {}
    for name in ("id", "path", "python", "lock", "split", "licence", "commit"):
        if name in task:
            said[name] = _text(task[name], f"{CONFIG} field task.{name}")
    if "tests" in task:
        tests = task["tests"]
        if not isinstance(tests, list) or not all(isinstance(word, str) for word in tests):
            field = f"{CONFIG} field task.tests"
            raise InvalidArgument(field, "is no list of texts", 'write tests = ["tests"]')
        said["tests"] = tuple(tests)
    if "timeout_s" in task:
        timeout_s = task["timeout_s"]
        number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
        if not number or not 0 < timeout_s <= MAX_TIMEOUT_S:
            field = f"{CONFIG} field task.timeout_s"
            remedy = f"give 1 to {MAX_TIMEOUT_S:g} seconds"
            raise InvalidArgument(field, f"is {timeout_s!r}", remedy)
        said["timeout_s"] = float(timeout_s)
    if "patch" in fix and "commit" in fix:
        raise InvalidArgument(f"{CONFIG} field fix", "has a patch and a commit", "give one")
    if "patch" in fix:
        said["fix_patch"] = root / _text(fix["patch"], f"{CONFIG} field fix.patch")
        kept_inside(said["fix_patch"], top_of(root), f"{CONFIG} field fix.patch")
    if "commit" in fix:
        said["fix_commit"] = _text(fix["commit"], f"{CONFIG} field fix.commit")
    if "mode" in fix:
        said["mode"] = _text(fix["mode"], f"{CONFIG} field fix.mode")
    plain = Wish()
    if asked.fix_patch is not None or asked.fix_commit:
        said = {name: value for name, value in said.items() if not name.startswith("fix_")}
    kept = {
        name: value for name, value in said.items() if getattr(asked, name) == getattr(plain, name)
    }
    return replace(asked, **kept)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise InvalidArgument(field, f"is {value!r}", "give a text on one line")
    return value


def inside(root: Path, place: str) -> Path:
    """A directory inside another.

    Raises:
        InvalidArgument: it leaves the directory, or is none.
    """
    try:
        target = (root / place).resolve()
        good = target.is_relative_to(root.resolve()) and target.is_dir()
    except (OSError, RuntimeError, ValueError):  # a circle of links, or no name
        good = False
    if not good:
        raise InvalidArgument(f"{CONFIG} field task.path", f"{place!r} is no directory inside it")
    return target


def _patched(project: Path, patch: Path, target: Path) -> Path:
    """A copy of the project with a patch applied."""
    if not patch.is_file():
        raise InvalidArgument("fix.patch", f"{patch} is no file", "name a unified diff")
    data = bounded(patch, "fix.patch", _MAX_BYTES)
    copied(project, target)
    copy = target.with_name(f"{target.name}.patch")
    copy.write_bytes(data)
    done = git(["apply", "--whitespace=nowarn", str(copy)], target)
    if done.code:
        remedy = "make a unified diff against the project's directory (git diff --relative)"
        raise InvalidArgument("fix.patch", f"{patch.name}: {done.last}", remedy)
    return target


def copied(project: Path, target: Path) -> None:
    """Copy what counts of a project."""
    target.mkdir(parents=True)
    for path in project_files(project):
        place = target / path.relative_to(project)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
