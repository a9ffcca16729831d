"""Looking at a sandbox's files: listing, text search, and the diff against a state.

- Everything runs inside the sandbox or goes through the box's checked file operations; no path of
  a sandbox is ever resolved by this process.
- Every answer is bounded in entries and bytes and says when a bound cut it.
- A diff lists regular files alone, by content and mode; it never depends on timestamps, and no
  link is followed: what a link shows is not the repository's.
- A diff is what the validator may apply; it is computed against a pristine fork of the state.
- What else changed never fails a diff: links, pipes and the like, empty directories, names that the
  validator would refuse and files that cannot be read are left out, counted and named.
- What grows with an agent's input (globs, listings, differences) is computed in worker threads.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile

from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NoSuchFile,
    ResourceExhausted,
    Unavailable,
)
from sandbox_svc.backends.base import (
    Box,
    Command,
    EndReason,
    ExecResult,
    FileStat,
    NotAFile,
    Odd,
)
from sandbox_svc.backends.commands import absolute
from sandbox_svc.builders.protect import MAX_PATH, check_path
from sandbox_svc.globs import Glob
from sandbox_svc.sandboxes import Manager
from sandbox_svc.unified import TooLarge, unified

_LIST_OUTPUT_BYTES = 32 << 20
_FIND_OUTPUT_BYTES = 8 << 20
_LINE_CHARS = 400
_TIMEOUT_S = 30.0
_TEXT_DIFF_BYTES = 512 << 10
_MAX_LIMIT = 10_000
_SKIPPED = ("__pycache__", ".git", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")
"""Directories that tools write and nobody means to change."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry below a listed directory."""

    path: str
    size_bytes: int
    directory: bool
    mode: int


@dataclass(frozen=True, slots=True)
class Match:
    """One line that contains the searched text."""

    path: str
    line: int
    text: str


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

    max_files: int = 2_000
    max_file_bytes: int = 8 << 20
    max_total_bytes: int = 48 << 20
    max_left_out: int = 1_000
    max_unified_chars: int = 1 << 20
    max_unified_s: float = 2.0
    """Time for showing differences; files that come later are only named."""
    skipped: Sequence[str] = field(default=_SKIPPED)


def _limit(value: int, default: int) -> int:
    if not 0 <= value <= _MAX_LIMIT:
        raise InvalidArgument("limit", f"is {value}", f"give 1 to {_MAX_LIMIT}, or 0 for {default}")
    return value or default


async def _tool(box: Box, argv: Sequence[str], root: str, output_bytes: int) -> ExecResult:
    """Run a read-only tool in `root`; twice the output, because half of it is the kept head."""
    root = absolute(root, "root")
    command = Command(
        tuple(argv), cwd=root, timeout_s=_TIMEOUT_S, output_bytes=2 * output_bytes, env=_TOOL_ENV
    )
    try:
        result = await box.run(command)
    except InvalidArgument as error:
        if error.field == "command.cwd":
            raise NoSuchFile(f"no such directory in the sandbox: {root}") from None
        raise
    if result.reason is EndReason.TIMEOUT:
        raise ResourceExhausted(f"looking through {root} took more than {_TIMEOUT_S:.0f} s")
    if result.reason is EndReason.SIGNAL:
        raise Unavailable(
            "the sandbox was frozen or ended meanwhile, or the tool killed; try again"
        )
    if result.reason in _TOO_MUCH and (result.exit_code < 0 or result.exit_code == 126):
        raise ResourceExhausted(f"looking through {root} went over a limit ({result.reason.value})")
    if result.reason is EndReason.INFRA:
        raise InfraError(f"the sandbox has lost its processes while {root} was looked through")
    if result.reason is EndReason.EXIT and result.exit_code in (126, 127):
        raise FailedPrecondition(
            f"the sandbox has no {argv[0]} (its image brings none); list files with a command"
        )
    return result


_TOO_MUCH = (EndReason.OOM, EndReason.PIDS, EndReason.DISK)
_TOOL_ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


async def list_files(
    box: Box, root: str = "/work/repo", glob: str = "", limit: int = 0
) -> tuple[Sequence[Entry], bool]:
    """Entries below `root` whose relative path matches `glob`, sorted; and whether any is missing.

    Raises:
        InvalidArgument: a malformed glob or limit.
        NoSuchFile: no such directory.
        ResourceExhausted: it took too long.
    """
    limit = _limit(limit, 1000)
    pattern = Glob(glob) if glob else None
    entries, cut = await _listing(box, root, pattern, "replace")
    return entries[:limit], cut or len(entries) > limit


async def _listing(
    box: Box, root: str, pattern: Glob | None, errors: str
) -> tuple[Sequence[Entry], bool]:
    form = "%y\\t%s\\t%m\\t%P\\0"
    result = await _tool(
        box, ["/usr/bin/find", ".", "-mindepth", "1", "-printf", form], root, _LIST_OUTPUT_BYTES
    )
    entries = await asyncio.to_thread(_entries, result.stdout.head, pattern, errors)
    return entries, result.stdout.truncated or result.reason is EndReason.OUTPUT


def _entries(listed: bytes, pattern: Glob | None, errors: str) -> list[Entry]:
    until_s, entries = time.monotonic() + _TIMEOUT_S, []
    for record in listed.split(b"\0")[:-1]:
        kind, size, mode, path = record.split(b"\t", 3)
        text = path.decode("utf-8", errors)
        if pattern is None or pattern.matches(text):
            entries.append(Entry(text, int(size), kind == b"d", int(mode, 8)))
        _check_time(until_s)
    entries.sort(key=lambda entry: entry.path)
    return entries


def _check_time(until_s: float) -> None:
    if time.monotonic() > until_s:
        raise ResourceExhausted(f"matching took more than {_TIMEOUT_S:.0f} s; ask for less")


async def find_text(
    box: Box, text: str, root: str = "/work/repo", glob: str = "", limit: int = 0
) -> tuple[Sequence[Match], bool]:
    """Lines below `root` that contain `text`, by path and line; and whether any is missing.

    Raises:
        InvalidArgument: the text is empty or has a line break, or a malformed glob.
        NoSuchFile: no such directory.
        ResourceExhausted: it took too long.
    """
    limit = _limit(limit, 200)
    if not text or "\n" in text or "\0" in text:
        raise InvalidArgument("text", "is not one line", "give a text without line breaks or NUL")
    pattern = Glob(glob) if glob else None
    skipped = [f"--exclude-dir={name}" for name in _SKIPPED]
    argv = ["/usr/bin/grep", "-rnIFZ", *skipped, "-e", text, "--", "."]
    result = await _tool(box, argv, root, _FIND_OUTPUT_BYTES)
    matches = await asyncio.to_thread(_matches, result.stdout.head, pattern)
    cut = result.stdout.truncated or result.reason is EndReason.OUTPUT
    return matches[:limit], cut or len(matches) > limit


def _matches(printed: bytes, pattern: Glob | None) -> list[Match]:
    """Lines as grep prints them: name, NUL, number, colon, text, line break. A name may hold all of
    these but NUL, and a text all but NUL and line breaks."""
    until_s, matches, at = time.monotonic() + _TIMEOUT_S, [], 0
    while (name_end := printed.find(b"\0", at)) >= 0:
        line_end = printed.find(b"\n", name_end)
        if line_end < 0:
            break
        path_bytes = printed[at:name_end]
        number, colon, found = printed[name_end + 1 : line_end].partition(b":")
        at = line_end + 1
        if not colon or not number.isdigit():
            continue
        path = path_bytes.removeprefix(b"./").decode("utf-8", "replace")
        if pattern is None or pattern.matches(path):
            matches.append(Match(path, int(number), found.decode("utf-8", "replace")[:_LINE_CHARS]))
        _check_time(until_s)
    matches.sort(key=lambda match: (match.path, match.line))
    return matches


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


async def diff_boxes(
    old: Box, new: Box, paths: Sequence[str], root: str, limits: DiffLimits
) -> Diff:
    """Compare two boxes at `paths` (absolute, below `root`)."""
    changes: list[Change] = []
    originals: list[bytes] = []
    left_out: dict[str, str] = {}
    empty: list[str] = []
    above: set[str] = set()
    total = 0
    for path in paths:
        relative = path.removeprefix(root.rstrip("/") + "/")
        if relative == path or any(part in limits.skipped for part in relative.split("/")):
            continue
        if relative.endswith("/."):
            empty.append(path.removesuffix("/."))
            continue
        if not _is_sendable(relative):
            left_out[relative] = _UNSENDABLE
            continue
        before, after = await _look(old, path, limits), await _look(new, path, limits)
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
    old_lines = before.decode("utf-8", "replace").splitlines(keepends=True)
    new_lines = change.content.decode("utf-8", "replace").splitlines(keepends=True)
    try:
        text = unified(old_lines, new_lines, old, new, until_s=until_s)
    except TooLarge:
        return differ
    return text or f"mode of {change.path} is now {change.mode:04o}\n"


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
        base = manager.states.get(base_state_id or sandbox.state_id)
        box = sandbox.box  # a restore gives it another; half a diff of each would be of neither
        async with manager.fresh(base.id) as pristine:
            pairs = zip(box.layers, pristine.layers, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if shared or not pristine.layers:
                touched = {*await box.changed_paths(root, since=shared)}
                if len(pristine.layers) > shared:
                    touched.update(await pristine.changed_paths(root, since=shared))
            else:
                touched = {*await _all(pristine, root), *await _all(box, root)}
            return await diff_boxes(pristine, box, sorted(touched), root, limits)


async def _all(box: Box, root: str) -> Sequence[str]:
    entries, cut = await _listing(box, root, None, "surrogateescape")
    if cut or len(entries) > _MAX_LIMIT:
        raise FailedPrecondition(
            f"{root} has more than {_MAX_LIMIT} files and the states are not related"
        )
    full = {entry.path.rpartition("/")[0] for entry in entries}
    return [
        f"{root.rstrip('/')}/{entry.path}" + ("/." if entry.directory else "")
        for entry in entries
        if not entry.directory or entry.path not in full
    ]
