"""Tells whether a run wrote over what decides its verdict: the State's tests and packages.

- Looked at from outside once the run has ended: what was written stays to be seen, also where the
  content is as it was, for whoever puts a file back has had it away in between.
- What the run of the untouched State writes over as well is the suite's own doing.
- Of new files count those that pytest or Python take up by their name; suites leave others.
- Byte code counts as the file that it is of.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from regreen.rpc.errors import NoSuchFile, RegreenError, ResourceExhausted
from regreen.testpaths import CONFTEST, PYTEST_INI, runs_at_start
from sandbox_svc.backends.base import Box, Command, EndReason
from sandbox_svc.builders.base import ENV, LOCK, REPO
from sandbox_svc.builders.protect import by_name

PYCACHE = "/work/pycache"
_ALL = "/work"
_SHOWN = 3
_SUITES_OWN = ("repository-internals", "generated")
_EXISTING = """
while IFS= read -r path; do
  if [ -e "$path" ] || [ -L "$path" ]; then printf '%s\\n' "$path"; fi
done
"""

Pristine = Callable[[], AbstractAsyncContextManager[Box]]
"""Opens a fresh fork of what the run began on."""


async def written(box: Box, facts: Mapping[str, Any], *, since: int | None = None) -> list[str]:
    """Paths of the kinds that decide a verdict which were written since the box was made, or above
    so many layers; some may be new.

    Raises:
        ResourceExhausted: it wrote more than anyone can look through.
    """
    roots, settings = tuple(facts["protected"]), frozenset((*facts["settings"], LOCK))
    found = await box.changed_paths(_ALL, since=since)
    found = [path for path in found if _decides(path, roots, settings)]
    if since is None:
        return found
    moved = frozenset(await box.changed_paths(ENV))  # Python compiles anew what the lock brought
    return [
        p for p in found if not p.startswith(PYCACHE) or _source(p[len(PYCACHE) :]) not in moved
    ]


def _decides(path: str, roots: Sequence[str], settings: frozenset[str]) -> bool:
    """Whether a path is of a kind that decides a verdict."""
    if path.startswith(PYCACHE + "/"):
        path, settings = _source(path[len(PYCACHE) :]), frozenset()
    return path.startswith(ENV + "/") or _of_tests(path, roots, settings)


def _of_tests(path: str, roots: Sequence[str], settings: frozenset[str]) -> bool:
    """Whether a path of the repository is of a kind that decides a verdict."""
    if not path.startswith(REPO + "/"):
        return False
    path = path[len(REPO) + 1 :]
    if path.endswith("/"):  # a folder that nobody can look into
        inside = any(root.startswith(path) for root in roots)
        return inside or bool(by_name(path + "x", roots))
    if "/__pycache__/" in path:
        path = _source(path)
    return path in settings or by_name(path, roots) not in ("", *_SUITES_OWN)


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
    found = [path for path in found if path not in known]
    certain = [path for path in found if _taken_up(path)]
    if len(certain) < len(found):
        async with pristine() as fresh:
            certain = sorted({*certain, *await _existing(fresh, found)})
    if not certain:
        return ""
    named = [path.removeprefix(REPO + "/") for path in certain]
    shown = ", ".join(named[:_SHOWN]) + (" ..." if len(named) > _SHOWN else "")
    return f"it wrote over what decides it: {shown}"


def _taken_up(path: str) -> bool:
    """Whether a file counts though the State may not have it."""
    name = path.rpartition("/")[2]
    return not name or name == CONFTEST or name in PYTEST_INI or runs_at_start(path)


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
