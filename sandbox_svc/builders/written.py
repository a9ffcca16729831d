"""Tells whether a run wrote over what decides its verdict: the State's tests and packages.

- Looked at from outside once the run has ended: what was written stays to be seen, also where the
  content is as it was, for whoever puts a file back has had it away in between.
- What the run of the untouched State writes over as well is the suite's own doing. Where it could
  not collect all tests it says nothing of their data, and only code and settings count.
- Data that tests read may be opened for writing, which the kernel does not tell from writing, and
  made anew: it counts if it holds something else in the end. Code and settings count in any case.
- Of new files count those that pytest or Python take up by their name, or in place of another, in
  the folders where they look; suites leave others, and copies of themselves.
- Byte code counts as the file that it is of, but for files that pytest compiles itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from regreen.rpc.errors import DiskFull, InfraError, NoSuchFile, RegreenError, ResourceExhausted
from sandbox_svc.backends.base import Box, Command, EndReason, NotAFile, Odd
from sandbox_svc.builders.base import ENV, REPO
from sandbox_svc.builders.kinds import PYCACHE, Kind, Kinds
from sandbox_svc.builders.modules import hidden, may_be_link, source_of

_ALL = "/work"
_COMPARED = 1000
_COMPARED_BYTES = 256 << 20
_PIECE = 4 << 20
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
    kinds = Kinds(facts)
    found = {path: kinds.of(path) for path in await box.changed_paths(_ALL, since=since)}
    decides = {path: kind is Kind.TAKEN_UP for path, kind in found.items() if kind is not None}
    for path in [path for path, kind in found.items() if kind is Kind.LINK]:
        decides[path] = await _is_link(box, path)
    if since is None:
        return decides
    moved = frozenset(await box.changed_paths(ENV))  # Python compiles anew what the lock brought
    return {
        path: certain
        for path, certain in decides.items()
        if not path.startswith(PYCACHE) or source_of(path[len(PYCACHE) :]) not in moved
    }


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
        if isinstance(error, DiskFull) or error.retry_after_s is not None:  # the service's trouble
            raise
        return f"nobody can look through what it wrote: {error}"
    known, kinds = frozenset((*facts["baseline"].get("written", ()), *ours)), Kinds(facts)
    found = {path: certain for path, certain in found.items() if path not in known}
    if _says_nothing(facts["baseline"]):
        found = {path: sure for path, sure in found.items() if sure or not kinds.is_data(path)}
    certain = {path for path, taken_up in found.items() if taken_up}
    asked = {other: path for path in found for other in (path, *hidden(path))}
    if asked.keys() - certain:
        async with pristine() as fresh:
            there = frozenset(await _existing(fresh, list(asked)))
            certain |= {path for path in there if asked[path] == path}
            data = sorted(path for path in certain & there if kinds.is_data(path))
            certain -= await _as_before(box, fresh, data)
            for path in {asked[other] for other in there if asked[other] != other} - certain:
                if not may_be_link(path) or await _is_link(box, path):
                    certain.add(path)
    if not certain:
        return ""
    named = sorted(path.removeprefix(REPO + "/") for path in certain)
    shown = ", ".join(named[:_SHOWN]) + (" ..." if len(named) > _SHOWN else "")
    return f"it wrote over what decides it: {shown}"


def _says_nothing(baseline: Mapping[str, Any]) -> bool:
    """Whether the untouched run could not collect some tests, so that others may write more."""
    return not baseline["collected"] or any("::" not in test for test in baseline["failing"])


async def _as_before(box: Box, fresh: Box, paths: Sequence[str]) -> set[str]:
    """Files that hold what they hold in an untouched fork, as far as anyone compares them."""
    same: set[str] = set()
    left = _COMPARED_BYTES
    for path in paths[:_COMPARED]:
        size = await _equal(box, fresh, path, left)
        if size is not None:
            same.add(path)
            left -= size
    return same


async def _equal(box: Box, fresh: Box, path: str, most: int) -> int | None:
    """The size of a file that both have alike; None if they do not, or it is larger than `most`."""
    offset = 0
    while True:
        try:
            one, info = await box.read_range(path, offset=offset, max_bytes=_PIECE, follow=False)
            two, known = await fresh.read_range(path, offset=offset, max_bytes=_PIECE, follow=False)
        except InfraError:
            raise
        except RegreenError:
            return None
        if info.size_bytes != known.size_bytes or info.size_bytes > most or one != two:
            return None
        offset += len(one)
        if offset >= info.size_bytes or not one:
            return info.size_bytes


async def _is_link(box: Box, path: str) -> bool:
    """Whether there is a link at a path, as far as can be told."""
    try:
        await box.read_range(path, max_bytes=0, follow=False)
    except NotAFile as error:
        return error.kind is Odd.LINK
    except NoSuchFile:
        return False
    except InfraError:
        raise
    except RegreenError:
        return True
    return False


async def _existing(box: Box, paths: Sequence[str]) -> list[str]:
    """Those paths that an untouched fork has."""
    plain = [path for path in paths if path.isprintable()]
    lines = "".join(path + "\n" for path in plain).encode("utf-8", "surrogateescape")
    command = Command(
        ("sh", "-c", _EXISTING), cwd="/", stdin=lines, output_bytes=2 * len(lines) + 1
    )
    done = await box.run(command)
    if done.reason is EndReason.INFRA:
        raise InfraError("an untouched fork was lost while a run was compared with it; try again")
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
    except InfraError:
        raise
    except RegreenError:
        return True
    return True
