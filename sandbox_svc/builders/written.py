"""Tells whether a run wrote over what decides its verdict: the State's tests and packages.

- Looked at from outside once the run has ended: what was written stays to be seen, also where the
  content is as it was, for whoever puts a file back has had it away in between.
- What the run of the untouched State writes over as well is the suite's own doing. Where it could
  not collect all tests it says nothing of their data, and only code and settings count.
- Of new files count those that pytest or Python take up by their name, or in place of another;
  suites leave others.
- Byte code counts as the file that it is of.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import Any

from regreen.rpc.errors import NoSuchFile, RegreenError, ResourceExhausted
from regreen.testpaths import runs_at_start
from sandbox_svc.backends.base import Box, Command, EndReason
from sandbox_svc.builders.base import ENV, LOCK, REPO, FileChange
from sandbox_svc.builders.protect import by_name, protection

PYCACHE = "/work/pycache"
_ALL = "/work"
_SHOWN = 3
_EXISTING = """
while IFS= read -r path; do
  if [ -e "$path" ] || [ -L "$path" ]; then printf '%s\\n' "$path"; fi
done
"""

Pristine = Callable[[], AbstractAsyncContextManager[Box]]
"""Opens a fresh fork of what the run began on."""


async def written(
    box: Box, facts: Mapping[str, Any], *, since: int | None = None
) -> dict[str, bool]:
    """Paths of the kinds that decide a verdict which were written since the box was made, or above
    so many layers; each with whether it counts though it is new.

    Raises:
        ResourceExhausted: it wrote more than anyone can look through.
    """
    kinds = _Kinds(facts)
    found = {path: kinds.of(path) for path in await box.changed_paths(_ALL, since=since)}
    decides = {path: kind is _Kind.TAKEN_UP for path, kind in found.items() if kind is not None}
    if since is None:
        return decides
    moved = frozenset(await box.changed_paths(ENV))  # Python compiles anew what the lock brought
    return {
        path: certain
        for path, certain in decides.items()
        if not path.startswith(PYCACHE) or _source(path[len(PYCACHE) :]) not in moved
    }


class _Kind(Enum):
    STATES = "of the State, if it has it"
    TAKEN_UP = "taken up by its name, new or not"


class _Kinds:
    """What a path is to the verdicts on one State."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._roots = tuple(facts["protected"])
        self._settings = frozenset((*facts["settings"], LOCK))
        self._own, self._foreign = frozenset(facts["modules"]), frozenset(facts["foreign"])

    def of(self, path: str) -> _Kind | None:
        """None if the verdict does not hang on it; nobody reads what pytest compiled of tests."""
        name = path.rpartition("/")[2]
        if name.endswith((".pyc", ".pyo")) and "-pytest" in name.lower():
            return None
        if path.startswith(PYCACHE + "/"):
            source = _source(path[len(PYCACHE) :])
            return _Kind.STATES if self._of(source) is not None else None
        return self._of(path)

    def _of(self, path: str) -> _Kind | None:
        if path.startswith(ENV + "/"):
            return _Kind.TAKEN_UP if path.endswith("/") or runs_at_start(path) else _Kind.STATES
        if not path.startswith(REPO + "/"):
            return None
        path = path[len(REPO) + 1 :]
        if path.endswith("/"):  # a folder that nobody can look into
            inside = any(root.startswith(path) for root in self._roots)
            tests = inside or by_name(path + "x", self._roots) == "test"
            return _Kind.TAKEN_UP if tests else None
        if "__pycache__" in path.split("/"):
            path = _source(f"/{path}")[1:]
            return _Kind.STATES if by_name(path, self._roots) == "test" else None
        change = FileChange(path, b"")
        reason = protection(change, self._roots, {}, self._own, self._foreign)
        if reason in ("validation-configuration", "shadows") or runs_at_start(path):
            return _Kind.TAKEN_UP
        return _Kind.STATES if reason == "test" or path in self._settings else None


def _source(path: str) -> str:
    """The file that byte code is of; any other path as it is."""
    folder, _, name = path.rpartition("/")
    if not name.endswith((".pyc", ".pyo")):
        return path
    return f"{folder.removesuffix('/__pycache__')}/{name.partition('.')[0]}.py"


async def doubts(
    box: Box,
    facts: Mapping[str, Any],
    pristine: Pristine,
    *,
    ours: Iterable[str] = (),
    since: int | None = None,
) -> str:
    """Why a run that has ended in a box is not believed, or empty; `ours` was put there before it.

    Raises:
        InfraError: the fork, or a fresh one, cannot be looked at.
    """
    try:
        found = await written(box, facts, since=since)
    except ResourceExhausted as error:
        return f"nobody can look through what it wrote: {error}"
    known = frozenset((*facts["baseline"].get("written", ()), *ours))
    found = {path: certain for path, certain in found.items() if path not in known}
    if _says_nothing(facts["baseline"]):
        found = {path: sure for path, sure in found.items() if sure or not _is_data(path)}
    certain = {path for path, taken_up in found.items() if taken_up}
    asked = {other: path for path in found for other in (path, *_hidden(path))}
    if asked.keys() - certain:
        async with pristine() as fresh:
            certain |= {asked[path] for path in await _existing(fresh, list(asked))}
    if not certain:
        return ""
    named = sorted(path.removeprefix(REPO + "/") for path in certain)
    shown = ", ".join(named[:_SHOWN]) + (" ..." if len(named) > _SHOWN else "")
    return f"it wrote over what decides it: {shown}"


def _says_nothing(baseline: Mapping[str, Any]) -> bool:
    """Whether the untouched run could not collect some tests, so that others may write more."""
    return not baseline["collected"] or any("::" not in test for test in baseline["failing"])


def _is_data(path: str) -> bool:
    return path.startswith(REPO + "/") and not path.endswith((".py", ".so", ".pyc", ".pyo"))


def _hidden(path: str) -> Iterator[str]:
    """Modules that would not be imported any more if a file is new: a package or a library wins."""
    if not path.endswith((".py", ".so")) or path.startswith(PYCACHE):
        return
    folder, _, name = path.rpartition("/")
    if name.startswith("__init__."):
        yield folder + ".py"
    module = f"{folder}/{name.partition('.')[0]}.py"
    if module != path:
        yield module


async def _existing(box: Box, paths: Sequence[str]) -> list[str]:
    """Those paths that an untouched fork has."""
    plain = [path for path in paths if path.isprintable()]
    lines = "".join(path + "\n" for path in plain).encode("utf-8", "surrogateescape")
    command = Command(
        ("sh", "-c", _EXISTING), cwd="/", stdin=lines, output_bytes=2 * len(lines) + 1
    )
    done = await box.run(command)
    if done.reason is not EndReason.EXIT or done.stdout.truncated:
        return list(paths)
    there = frozenset(done.stdout.head.splitlines())
    odd = [path for path in paths if not path.isprintable() and await _has(box, path)]
    return [p for p in plain if p.encode("utf-8", "surrogateescape") in there] + odd


async def _has(box: Box, path: str) -> bool:
    try:
        await box.read_range(path, max_bytes=0)
    except NoSuchFile:
        return False
    except RegreenError:
        return True
    return True
