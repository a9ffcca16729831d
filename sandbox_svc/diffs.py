"""The diff of a sandbox against a state.

- No path of a sandbox is ever resolved by this process: all goes through the box's checked file
  operations.
- A diff lists regular files alone, by content and mode; it never depends on timestamps, and no
  link is followed: what a link shows is not the repository's.
- A diff counts the paths first, and is refused where they are too many; one of many takes one of
  few places, and no diff takes longer than `DIFF_S`.
- A diff is what the validator may apply; it is computed against a pristine fork of the state.
- What else changed never fails a diff: links, pipes and the like, empty directories, names that the
  validator would refuse and files that cannot be read are left out, counted and named.
- What grows with an agent's input (paths, differences) is computed in worker threads.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile

from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NoSuchFile,
    ResourceExhausted,
)
from sandbox_svc.backends.base import Box, FileStat, NotAFile, Odd
from sandbox_svc.backends.commands import absolute
from sandbox_svc.builders.protect import MAX_PATH, check_path
from sandbox_svc.files import MAX_LIMIT, SKIPPED, listing
from sandbox_svc.sandboxes import Manager
from sandbox_svc.unified import TooLarge, lines_of, unified

DIFF_S = 30.0
"""Time for looking at what may differ."""
_TEXT_DIFF_BYTES = 512 << 10


class Kind(StrEnum):
    """What happened to a file."""

    ADD = "add"
    MODIFY = "modify"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Change:
    """One changed regular file, relative to the diff's root."""

    path: str
    kind: Kind
    content: bytes = b""
    mode: int = 0o644
    binary: bool = False


@dataclass(frozen=True, slots=True)
class Diff:
    """All changes below a root, and the same for people."""

    changes: Sequence[Change] = ()
    unified: str = ""
    """Says at its end what `changes` leaves out."""
    left_out: Sequence[tuple[str, str]] = ()
    """Path and reason of what else changed; the first `DiffLimits.max_left_out`."""
    left_out_total: int = 0


@dataclass(frozen=True, slots=True)
class DiffLimits:
    """Bounds of a diff."""

    max_paths: int = 20_000
    """Paths that are looked at."""
    large_paths: int = 2_000
    """More than that are a large diff."""
    max_files: int = 2_000
    max_file_bytes: int = 8 << 20
    max_total_bytes: int = 48 << 20
    max_left_out: int = 1_000
    max_unified_chars: int = 1 << 20
    max_unified_s: float = 2.0
    """Time for showing differences; files that come later are only named."""
    skipped: Sequence[str] = field(default=SKIPPED)


_UNREADABLE = "a file that its owner may not read"
_EMPTY = "an empty directory"
_UNSENDABLE = (
    "a name that is too long, not UTF-8 or has control characters or backslashes, or a directory "
    "that its owner may not look into"
)
_Seen = tuple[bytes, FileStat] | NotAFile | str | None
"""Content and mode of a file, or what is there else: something odd or unreadable, or nothing."""


async def _look(box: Box, path: str, limits: DiffLimits) -> _Seen:
    """What is at a path itself."""
    try:
        content, info = await box.read_range(path, max_bytes=limits.max_file_bytes, follow=False)
    except NotAFile as found:
        return found
    except (NoSuchFile, InvalidArgument):
        return None
    except FailedPrecondition as error:
        if "path" not in error.metadata:
            raise
        return _UNREADABLE
    if info.size_bytes > limits.max_file_bytes:
        raise ResourceExhausted(
            f"{path} has {info.size_bytes} bytes; a diff takes at most "
            f"{limits.max_file_bytes} for one file",
            metadata={"path": path},
        )
    return content, info


def _reason(before: _Seen, after: _Seen) -> str:
    """Why a path is left out that is no regular file, or was none; empty where nothing is."""
    if isinstance(before, str) or isinstance(after, str):
        return _UNREADABLE
    old, new = (
        (seen.kind, seen.target) if isinstance(seen, NotAFile) else None for seen in (before, after)
    )
    if old == new:
        return ""
    if new is not None and new[0] is not Odd.DIRECTORY:
        return new[0].value
    return f"{old[0].value} that is gone" if old and old[0] is not Odd.DIRECTORY else ""


def _relevant(paths: Iterable[str], root: str, limits: DiffLimits) -> Sequence[str]:
    """The paths below a root that are compared, sorted.

    Raises:
        ResourceExhausted: they are too many.
    """
    top = root.rstrip("/") + "/"
    found = [
        path
        for path in paths
        if path.startswith(top) and not set(path[len(top) :].split("/")) & set(limits.skipped)
    ]
    if len(found) > limits.max_paths:
        raise ResourceExhausted(
            f"{len(found)} paths under {root} may have changed; a diff looks at most "
            f"{limits.max_paths}"
        )
    return sorted(found)


class _Old:
    """The older side of a diff, which is asked for nothing below what it has no directory at."""

    def __init__(self, box: Box, limits: DiffLimits) -> None:
        self._box, self._limits = box, limits
        self._lacks: dict[str, bool] = {}

    async def look(self, path: str) -> _Seen:
        """What is at a path itself."""
        above = path.rpartition("/")[0]
        if above not in self._lacks:
            seen = await _look(self._box, above, self._limits) if above else ""
            is_directory = isinstance(seen, NotAFile) and seen.kind is Odd.DIRECTORY
            self._lacks[above] = not is_directory and not isinstance(seen, str)
        return None if self._lacks[above] else await _look(self._box, path, self._limits)


async def diff_boxes(
    old: Box, new: Box, paths: Sequence[str], root: str, limits: DiffLimits
) -> Diff:
    """Compare two boxes at paths that are `_relevant`."""
    before_it = _Old(old, limits)
    changes: list[Change] = []
    originals: list[bytes] = []
    left_out: dict[str, str] = {}
    empty: list[str] = []
    above: set[str] = set()
    total = 0
    for path in paths:
        relative = path.removeprefix(root.rstrip("/") + "/")
        if relative.endswith("/."):
            empty.append(path.removesuffix("/."))
            continue
        if not _is_sendable(relative):
            left_out[relative] = _UNSENDABLE
            continue
        before, after = await before_it.look(path), await _look(new, path, limits)
        if after is not None:
            above.add(path.rpartition("/")[0])
        if reason := _reason(before, after):
            left_out[relative] = reason
        if isinstance(before, str) or isinstance(after, str):
            continue
        was, found = (seen if isinstance(seen, tuple) else None for seen in (before, after))
        change = _compare(relative, was, found)
        if change is None:
            continue
        changes.append(change)
        originals.append(was[0] if was else b"")
        total += len(change.content)
        if len(changes) > limits.max_files or total > limits.max_total_bytes:
            raise ResourceExhausted(
                f"the diff under {root} is over {limits.max_files} files or "
                f"{limits.max_total_bytes} bytes"
            )
    for path in empty:
        if path not in above and await _is_new_directory(old, new, path, limits):
            left_out[path.removeprefix(root.rstrip("/") + "/")] = _EMPTY
    text = await asyncio.to_thread(_show, changes, originals, limits)
    named = tuple(sorted(left_out.items()))
    text += _told(named)
    return Diff(tuple(changes), text, named[: limits.max_left_out], len(named))


async def _is_new_directory(old: Box, new: Box, path: str, limits: DiffLimits) -> bool:
    seen = [await _look(box, path, limits) for box in (old, new)]
    before, after = (isinstance(one, NotAFile) and one.kind is Odd.DIRECTORY for one in seen)
    return after and not before


_TOLD_PATHS = 20


def _told(left_out: Sequence[tuple[str, str]]) -> str:
    """The end of a unified diff that leaves something out."""
    if not left_out:
        return ""
    lines = [f"[{len(left_out)} changed paths are left out, for a diff has regular files alone:]\n"]
    lines += [f"[{shown(path)}: {reason}]\n" for path, reason in left_out[:_TOLD_PATHS]]
    return "".join(lines) + ("[...]\n" if len(left_out) > _TOLD_PATHS else "")


def shown(path: str) -> str:
    """A path of a sandbox in one line of text."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[:MAX_PATH]


def _is_sendable(relative: str) -> bool:
    """Whether a change of this path may be part of a diff."""
    try:
        check_path(relative)
        relative.encode()
    except (InvalidArgument, UnicodeEncodeError):
        return False
    return True


def _show(changes: Sequence[Change], originals: Sequence[bytes], limits: DiffLimits) -> str:
    until_s, room, pieces = time.monotonic() + limits.max_unified_s, limits.max_unified_chars, []
    for change, before in zip(changes, originals, strict=True):
        piece = _unified(change, before, until_s)
        pieces.append(piece[:room])
        room -= len(piece)
        if room < 0:
            pieces.append("\n[diff cut here]\n")
            break
    return "".join(pieces)


def _compare(
    path: str, before: tuple[bytes, FileStat] | None, after: tuple[bytes, FileStat] | None
) -> Change | None:
    if before is None and after is None:
        return None
    if after is None:
        return Change(path, Kind.DELETE)
    content, mode = after[0], after[1].mode
    binary = b"\0" in content[:8192]
    if before is None:
        return Change(path, Kind.ADD, content, mode, binary)
    if before[0] == content and before[1].mode == mode:
        return None
    return Change(path, Kind.MODIFY, content, mode, binary or b"\0" in before[0][:8192])


def _unified(change: Change, before: bytes, until_s: float) -> str:
    old = "/dev/null" if change.kind is Kind.ADD else f"a/{change.path}"
    new = "/dev/null" if change.kind is Kind.DELETE else f"b/{change.path}"
    differ = f"Binary or large files {old} and {new} differ\n"
    if change.binary or max(len(before), len(change.content)) > _TEXT_DIFF_BYTES:
        return differ
    try:
        text = unified(lines_of(before), lines_of(change.content), old, new, until_s=until_s)
    except (TooLarge, UnicodeDecodeError):
        return differ
    if text or change.kind is Kind.MODIFY:
        return text or f"mode of {change.path} is now {change.mode:04o}\n"
    return f"Empty file {change.path} was {'added' if change.kind is Kind.ADD else 'deleted'}\n"


async def diff(
    manager: Manager,
    sandbox_id: str,
    *,
    root: str = "/work/repo",
    base_state_id: str = "",
    limits: DiffLimits | None = None,
) -> Diff:
    """What changed below `root` between a state (default: the sandbox's) and the sandbox.

    Raises:
        ResourceExhausted: the diff is over a bound.

    Only paths are compared that a layer touches which the two do not share.
    """
    if not root.startswith("/") or ".." in root.split("/"):
        raise InvalidArgument(
            "root", f"is not a plain absolute path: {root[:200]!r}", "give one such as /work/repo"
        )
    absolute(root, "root")
    limits = limits or DiffLimits()
    with manager.using(sandbox_id) as sandbox:
        states = manager.states
        base = states.get(base_state_id) if base_state_id else states.known(sandbox.state_id)
        box = sandbox.box  # a restore gives it another; half a diff of each would be of neither
        near = await _changed(box, base.layers, root)
        paths = await asyncio.to_thread(_relevant, near or (), root, limits)
        async with contextlib.AsyncExitStack() as place:
            if near is None or len(paths) > limits.large_paths:  # before it takes another place
                await place.enter_async_context(manager.large_diffs.taken())
            pristine = await place.enter_async_context(manager.fresh(base.id))
            if tuple(pristine.layers) != base.layers:  # they were flattened meanwhile
                near = await _changed(box, pristine.layers, root)
            if near is None:
                touched = {*await _all(pristine, root), *await _all(box, root)}
            else:
                touched = {*near}
                shared = _shared(box.layers, pristine.layers)
                if len(pristine.layers) > shared:
                    touched.update(await pristine.changed_paths(root, since=shared))
            paths = await asyncio.to_thread(_relevant, touched, root, limits)
            return await _in_time(diff_boxes(pristine, box, paths, root, limits), root)


def _shared(layers: Sequence[str], others: Sequence[str]) -> int:
    """How many layers two have in common, from the lowest on."""
    pairs = zip(layers, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


async def _changed(box: Box, layers: Sequence[str], root: str) -> Sequence[str] | None:
    """Paths that a box touched above what it shares with layers; None where that is nothing."""
    shared = _shared(box.layers, layers)
    return await box.changed_paths(root, since=shared) if shared or not layers else None


async def _in_time(work: Awaitable[Diff], root: str) -> Diff:
    until = asyncio.timeout(DIFF_S)
    try:
        async with until:
            return await work
    except TimeoutError:
        if not until.expired():
            raise
        raise ResourceExhausted(f"the diff under {root} took more than {DIFF_S:g} s") from None


async def _all(box: Box, root: str) -> Sequence[str]:
    entries, cut = await listing(box, root, None, "surrogateescape")
    if cut or len(entries) > MAX_LIMIT:
        raise FailedPrecondition(
            f"{root} has more than {MAX_LIMIT} files and the states are not related"
        )
    full = {entry.path.rpartition("/")[0] for entry in entries}
    return [
        f"{root.rstrip('/')}/{entry.path}" + ("/." if entry.directory else "")
        for entry in entries
        if not entry.directory or entry.path not in full
    ]
