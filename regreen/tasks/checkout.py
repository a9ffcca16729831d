"""A team's own failing build: where its files are, and what repairs it.

- It is a directory, or a repository that the `git` program clones; a `task.toml` may say more.
- Nothing of the repository is run: no hooks, no submodules, no filters of large files; git speaks
  only to files, https, http, ssh and git addresses, and asks for no password.
- The fix is a patch, or a commit of the repository; the project's own files are never changed.
"""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.tasks.local import project_files

CONFIG = "task.toml"
TIMEOUT_S = 900.0
_URL = re.compile(r"(git\+)?(https?|ssh|git|file)://.|[\w.-]+@[\w.-]+:.")
_COMMIT = re.compile(r"[0-9A-Za-z][0-9A-Za-z._/^~-]{0,199}")
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


def is_url(text: str) -> bool:
    """Whether a path is the address of a repository."""
    return bool(_URL.match(text))


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
        clone = _clone(str(root), work / "repository")
        fixed = _tree(clone, wish.fix_commit, work / "fixed", "fix.commit")
        return Checkout(project, inside(fixed, wish.path), wish)
    return Checkout(project, None, wish)


def _of_repository(url: str, asked: Wish, work: Path) -> Checkout:
    clone = _clone(url, work / "repository")
    commit = asked.commit or (f"{asked.fix_commit}^" if asked.fix_commit else "HEAD")
    name = _name(url)
    broken = _tree(clone, commit, work / "broken" / name, "commit")
    wish = wished(broken, asked)
    if wish.fix_commit and not asked.commit and not asked.fix_commit:
        commit = wish.commit or f"{wish.fix_commit}^"
        broken = _tree(clone, commit, work / "broken-too" / name, "task.commit")
    project = inside(broken, wish.path)
    if wish.fix_patch is not None:
        return Checkout(project, _patched(project, wish.fix_patch, work / "fixed"), wish)
    if not wish.fix_commit:
        return Checkout(project, None, wish)
    fixed = _tree(clone, wish.fix_commit, work / "fixed", "fix.commit")
    return Checkout(project, inside(fixed, wish.path), wish)


def _name(url: str) -> str:
    """The name of a repository: what a project that does not say its own is called."""
    last = re.split(r"[/:]", url.rstrip("/"))[-1].removesuffix(".git")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-") or "project"


def wished(root: Path, asked: Wish) -> Wish:
    """What was asked for, completed by the `task.toml` of a directory.

    Raises:
        InvalidArgument: names the line or the field.
    """
    path = root / CONFIG
    if not path.is_file():
        return asked
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or timeout_s <= 0:
            field = f"{CONFIG} field task.timeout_s"
            raise InvalidArgument(field, f"is {timeout_s!r}", "give seconds")
        said["timeout_s"] = float(timeout_s)
    if "patch" in fix and "commit" in fix:
        raise InvalidArgument(f"{CONFIG} field fix", "has a patch and a commit", "give one")
    if "patch" in fix:
        said["fix_patch"] = root / _text(fix["patch"], f"{CONFIG} field fix.patch")
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
    if not isinstance(value, str) or not value:
        raise InvalidArgument(field, f"is {value!r}", "give a text")
    return value


def inside(root: Path, place: str) -> Path:
    """A directory inside another.

    Raises:
        InvalidArgument: it leaves the directory, or is none.
    """
    target = (root / place).resolve()
    if not target.is_relative_to(root.resolve()) or not target.is_dir():
        raise InvalidArgument(f"{CONFIG} field task.path", f"{place!r} is no directory inside it")
    return target


def _patched(project: Path, patch: Path, target: Path) -> Path:
    """A copy of the project with a patch applied."""
    if not patch.is_file():
        raise InvalidArgument("fix.patch", f"{patch} is no file", "name a unified diff")
    copied(project, target)
    done = git(["apply", "--whitespace=nowarn", str(patch.resolve())], target)
    if done.returncode:
        remedy = "make a unified diff against the project's directory (git diff --relative)"
        raise InvalidArgument("fix.patch", f"{patch.name}: {_last(done)}", remedy)
    return target


def copied(project: Path, target: Path) -> None:
    """Copy what counts of a project."""
    target.mkdir(parents=True)
    for path in project_files(project):
        place = target / path.relative_to(project)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)


def _clone(url: str, target: Path) -> Path:
    done = git(["clone", "--quiet", "--no-checkout", "--", url, str(target)], target.parent)
    if done.returncode:
        remedy = "check the address, and that git can read it without asking"
        raise InvalidArgument("path", f"{url} cannot be cloned: {_last(done)}", remedy)
    return target


def _tree(clone: Path, commit: str, target: Path, field: str) -> Path:
    """The files of a commit."""
    if not _COMMIT.fullmatch(commit):
        raise InvalidArgument(field, f"{commit!r} is no commit", "give a name or a digest")
    words = ["worktree", "add", "--quiet", "--detach", "--force", str(target), commit]
    done = git(words, clone)
    if done.returncode:
        problem = f"{commit!r} cannot be checked out: {_last(done)}"
        raise InvalidArgument(field, problem, "name a commit of the repository")
    (target / ".git").unlink()
    return target


def git(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run git without anything that a repository could make it do.

    Raises:
        MissingDependency: there is no git program.
        InvalidArgument: it did not end in time.
    """
    program = shutil.which("git")
    if program is None:
        raise MissingDependency(
            "git: the program is not installed; it reads repositories and patches"
        )
    kept = ("GIT_SSH", "GIT_SSH_COMMAND")
    env = {n: value for n, value in os.environ.items() if not n.startswith("GIT_") or n in kept}
    env |= {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "file:https:http:ssh:git",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "LC_ALL": "C",
    }
    command = [program, "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *words]
    try:
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        problem = f"git {words[0]} did not end in {TIMEOUT_S:g} s"
        raise InvalidArgument(
            "path", problem, "clone it yourself and give the directory"
        ) from error


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"git ended with {done.returncode}"])[-1][:300]
