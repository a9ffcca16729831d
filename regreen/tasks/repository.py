"""Repositories of others through the `git` program, which is kept from running anything of theirs.

- No hooks, submodules or filters: what the user's own settings would run on files is off where
  files are written; those that reach a host (proxies, credentials) count where one is asked.
- git speaks only to files, https, http, ssh and git addresses, and asks for nothing.
- A commit is measured before its files are written; links that lead out of it are removed.
- An address is shown without what may be a password in it.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regreen.rpc.errors import InvalidArgument, MissingDependency

TIMEOUT_S = 900.0
MAX_FILES = 200_000
MAX_BYTES = 2 << 30
MAX_DEPTH = 100
"""Bounds of a commit's files, for a whole repository."""
_COMMIT = re.compile(r"[0-9A-Za-z][0-9A-Za-z._/^~-]{0,199}")
_URL = re.compile(r"(git\+)?(https?|ssh|git|file)://.|[\w.][\w.-]*@[\w.-]+:.")
_SAFE = ("core.hooksPath=/dev/null", "core.fsmonitor=false", "core.attributesFile=/dev/null",
         "submodule.recurse=false", "gc.auto=0", "core.autocrlf=false")  # fmt: skip
_NO_SETTINGS = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
}


def is_url(text: str) -> bool:
    """Whether a path is the address of a repository."""
    return bool(_URL.match(text))


def shown(text: str) -> str:
    """A text with addresses in it, without passwords, and without control characters."""
    bare = re.sub(r"(://)[^/\s'\"]*@", r"\1", text)
    bare = re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", bare)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", bare)


def name_of(url: str) -> str:
    """The name of a repository: what a project that does not say its own is called."""
    last = re.split(r"[/:]", shown(url).rstrip("/"))[-1].removesuffix(".git")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-")[:100] or "project"


def clone(url: str, target: Path) -> Path:
    """A repository without any file of it.

    Raises:
        InvalidArgument: it cannot be read.
    """
    words = ["clone", "--quiet", "--no-checkout", "--no-hardlinks", "--", url, str(target)]
    done = git(words, target.parent, settings=True)
    if done.code:
        remedy = "check the address, and that git can read it without asking"
        raise InvalidArgument("path", f"{shown(url)} cannot be cloned: {done.last}", remedy)
    return target


def files_of(repository: Path, commit: str, target: Path, field: str) -> Path:
    """The files of a commit, in a directory that is known as the top of its repository.

    Raises:
        InvalidArgument: there is no such commit, or it is too large.
    """
    if not _COMMIT.fullmatch(commit):
        raise InvalidArgument(field, f"{commit!r} is no commit", "give a name or a digest")
    _measure(repository, commit, field)
    words = ["worktree", "add", "--quiet", "--detach", "--force", str(target), commit]
    done = git(words, repository)
    if done.code:
        problem = f"{commit!r} cannot be checked out: {done.last}"
        raise InvalidArgument(field, problem, "name a commit of the repository")
    (target / ".git").unlink()
    (target / ".git").mkdir()
    _remove_outward_links(target)
    return target


def _measure(repository: Path, commit: str, field: str) -> None:
    """Refuse a commit whose files would fill the disk; a small repository can name very many."""
    command, env = _command(["ls-tree", "-r", "-l", "-z", "--full-tree", commit], repository, False)
    count = size = 0
    with subprocess.Popen(
        command, cwd=repository, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        rest = b""
        too_much = ""
        while not too_much and (chunk := process.stdout.read(1 << 16)):
            *entries, rest = (rest + chunk).split(b"\0")
            for entry in entries:
                head, _, path = entry.partition(b"\t")
                said = head.split()[-1]
                count += 1
                size += int(said) if said.isdigit() else 0
                if path.count(b"/") > MAX_DEPTH:
                    too_much = f"has folders more than {MAX_DEPTH} deep"
            if count > MAX_FILES:
                too_much = f"has more than {MAX_FILES} files"
            if size > MAX_BYTES:
                too_much = f"has files of more than {MAX_BYTES >> 20} MiB"
        process.kill()
    if too_much:
        remedy = "clone it yourself and give the directory of the project"
        raise InvalidArgument(field, f"{commit!r} {too_much}", remedy)


def _remove_outward_links(top: Path) -> None:
    whole = top.resolve()
    left = [top]
    while left:
        for entry in os.scandir(left.pop()):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                left.append(path)
            elif entry.is_symlink():
                try:
                    inside = path.resolve().is_relative_to(whole)
                except (OSError, RuntimeError):  # a circle
                    inside = False
                if not inside:
                    path.unlink()


@dataclass(frozen=True, slots=True)
class Done:
    """What git said."""

    code: int
    last: str
    """The last line of its errors."""


def git(words: Sequence[str], folder: Path, *, settings: bool = False) -> Done:
    """Run git without anything that a repository could make it do.

    `settings`: those of the user count, which a host may need to be reached.

    Raises:
        MissingDependency: there is no git program.
        InvalidArgument: it did not end in time.
    """
    command, env = _command(words, folder, settings)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            problem, remedy = f"git {words[0]} did not end in {TIMEOUT_S:g} s", "give the directory"
            raise InvalidArgument("path", problem, f"clone it yourself and {remedy}") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        lines = errors.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
    return Done(code, shown((lines or [f"git ended with {code}"])[-1])[:300])


def _command(
    words: Sequence[str], folder: Path, settings: bool
) -> tuple[list[str], dict[str, str]]:
    program = shutil.which("git")
    if program is None:
        raise MissingDependency(
            "git: the program is not installed; it reads repositories and patches"
        )
    kept = ("GIT_SSH", "GIT_SSH_COMMAND")
    env = {n: value for n, value in os.environ.items() if not n.startswith("GIT_") or n in kept}
    env |= {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_ALLOW_PROTOCOL": "file:https:http:ssh:git",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "LC_ALL": "C",
    }
    env.pop("SSH_ASKPASS", None)
    if not any(name in env for name in kept):
        env["GIT_SSH_COMMAND"] = "ssh -oBatchMode=yes"
    if not settings:
        env |= _NO_SETTINGS
    safe = [word for setting in _SAFE for word in ("-c", setting)]
    return [program, *safe, *words], env
