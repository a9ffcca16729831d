"""Looking at a sandbox's files: listing, text search, and the diff against a state.

- Everything runs inside the sandbox or goes through the box's checked file operations; no path of
  a sandbox is ever resolved by this process.
- Every answer is bounded in entries and bytes and says when a bound cut it.
- A diff lists regular files alone, by content and mode; it never depends on timestamps.
- A diff is what the validator may apply; it is computed against a pristine fork of the state.
"""

import contextlib
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from sandbox_svc.backends.base import Box, Command, EndReason, ExecResult, FileStat
from sandbox_svc.sandboxes import Manager

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


@dataclass(frozen=True, slots=True)
class DiffLimits:
    """Bounds of a diff."""

    max_files: int = 2_000
    max_file_bytes: int = 8 << 20
    max_total_bytes: int = 48 << 20
    max_unified_chars: int = 1 << 20
    skipped: Sequence[str] = field(default=_SKIPPED)


def glob_regex(glob: str) -> re.Pattern[str]:
    """A pattern for relative paths: `**` crosses directories, `*` and `?` do not.

    A glob without a slash matches the last part of a path anywhere, as in ignore files.
    """
    if "/" not in glob:
        glob = f"**/{glob}"
    out, index = "", 0
    while index < len(glob):
        if glob.startswith("**/", index):
            out, index = out + "(?:.*/)?", index + 3
        elif glob.startswith("**", index):
            out, index = out + ".*", index + 2
        elif glob[index] == "*":
            out, index = out + "[^/]*", index + 1
        elif glob[index] == "?":
            out, index = out + "[^/]", index + 1
        else:
            out, index = out + re.escape(glob[index]), index + 1
    return re.compile(out, re.DOTALL)


def _limit(value: int, default: int) -> int:
    if not 0 <= value <= _MAX_LIMIT:
        raise InvalidArgument("limit", f"{value}", f"give 1 to {_MAX_LIMIT}, or 0 for {default}")
    return value or default


async def _tool(box: Box, argv: Sequence[str], root: str, output_bytes: int) -> ExecResult:
    """Run a read-only tool in `root`; twice the output, because half of it is the kept head."""
    command = Command(
        tuple(argv), cwd=root, timeout_s=_TIMEOUT_S, output_bytes=2 * output_bytes, env=_TOOL_ENV
    )
    try:
        result = await box.run(command)
    except InvalidArgument as error:
        if error.field == "cwd":
            raise NotFound(f"no such directory in the sandbox: {root}") from None
        raise
    if result.reason is EndReason.TIMEOUT:
        raise ResourceExhausted(f"looking through {root} took more than {_TIMEOUT_S:.0f} s")
    return result


_TOOL_ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


async def list_files(
    box: Box, root: str = "/work/repo", glob: str = "", limit: int = 0
) -> tuple[Sequence[Entry], bool]:
    """Entries below `root` whose relative path matches `glob`, sorted; and whether any is missing.

    Raises:
        NotFound: no such directory.
    """
    limit = _limit(limit, 1000)
    pattern = glob_regex(glob) if glob else None
    form = "%y\\t%s\\t%m\\t%P\\0"
    result = await _tool(
        box, ["/usr/bin/find", ".", "-mindepth", "1", "-printf", form], root, _LIST_OUTPUT_BYTES
    )
    entries = []
    for record in result.stdout.head.split(b"\0")[:-1]:
        kind, size, mode, path = record.split(b"\t", 3)
        text = path.decode("utf-8", "replace")
        if pattern is None or pattern.fullmatch(text):
            entries.append(Entry(text, int(size), kind == b"d", int(mode, 8)))
    entries.sort(key=lambda entry: entry.path)
    return entries[:limit], len(entries) > limit or result.stdout.truncated


async def find_text(
    box: Box, text: str, root: str = "/work/repo", glob: str = "", limit: int = 0
) -> tuple[Sequence[Match], bool]:
    """Lines below `root` that contain `text`, by path and line; and whether any is missing.

    Raises:
        InvalidArgument: the text is empty or has a line break.
        NotFound: no such directory.
    """
    limit = _limit(limit, 200)
    if not text or "\n" in text or "\0" in text:
        raise InvalidArgument("text", "must be one non-empty line")
    pattern = glob_regex(glob) if glob else None
    skipped = [f"--exclude-dir={name}" for name in _SKIPPED]
    argv = ["/usr/bin/grep", "-rnIFZ", *skipped, "-e", text, "--", "."]
    result = await _tool(box, argv, root, _FIND_OUTPUT_BYTES)
    matches = []
    for line in result.stdout.head.split(b"\n")[:-1]:
        path_bytes, separator, rest = line.partition(b"\0")
        number, colon, found = rest.partition(b":")
        if not separator or not colon or not number.isdigit():
            continue
        path = path_bytes.removeprefix(b"./").decode("utf-8", "replace")
        if pattern is None or pattern.fullmatch(path):
            matches.append(Match(path, int(number), found.decode("utf-8", "replace")[:_LINE_CHARS]))
    matches.sort(key=lambda match: (match.path, match.line))
    return matches[:limit], len(matches) > limit or result.stdout.truncated


async def _read(box: Box, path: str, limits: DiffLimits) -> tuple[bytes, FileStat] | None:
    """A regular file's content and mode; None when there is no regular file at `path`."""
    with contextlib.suppress(NotFound, InvalidArgument):
        content, info = await box.read_range(path, max_bytes=limits.max_file_bytes)
        if info.size_bytes > limits.max_file_bytes:
            raise ResourceExhausted(
                f"{path} has {info.size_bytes} bytes; a diff takes at most "
                f"{limits.max_file_bytes} for one file",
                metadata={"path": path},
            )
        return content, info
    return None


async def diff_boxes(
    old: Box, new: Box, paths: Sequence[str], root: str, limits: DiffLimits
) -> Diff:
    """Compare two boxes at `paths` (absolute, below `root`)."""
    changes: list[Change] = []
    pieces: list[str] = []
    total = 0
    for path in paths:
        relative = path.removeprefix(root.rstrip("/") + "/")
        if relative == path or any(part in limits.skipped for part in relative.split("/")):
            continue
        before, after = await _read(old, path, limits), await _read(new, path, limits)
        change = _compare(relative, before, after)
        if change is None:
            continue
        changes.append(change)
        total += len(change.content)
        if len(changes) > limits.max_files or total > limits.max_total_bytes:
            raise ResourceExhausted(
                f"the diff under {root} is over {limits.max_files} files or "
                f"{limits.max_total_bytes} bytes"
            )
        pieces.append(_unified(change, before[0] if before else b""))
    unified = "".join(pieces)
    if len(unified) > limits.max_unified_chars:
        unified = unified[: limits.max_unified_chars] + "\n[diff cut here]\n"
    return Diff(tuple(changes), unified)


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


def _unified(change: Change, before: bytes) -> str:
    old = "/dev/null" if change.kind is Kind.ADD else f"a/{change.path}"
    new = "/dev/null" if change.kind is Kind.DELETE else f"b/{change.path}"
    if change.binary or max(len(before), len(change.content)) > _TEXT_DIFF_BYTES:
        return f"Binary or large files {old} and {new} differ\n"
    old_lines = before.decode("utf-8", "replace").splitlines(keepends=True)
    new_lines = change.content.decode("utf-8", "replace").splitlines(keepends=True)
    lines = []
    for line in difflib.unified_diff(old_lines, new_lines, old, new):
        lines.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
    return "".join(lines) or f"mode of {change.path} is now {change.mode:04o}\n"


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
    """
    if not root.startswith("/") or ".." in root.split("/"):
        raise InvalidArgument("root", f"is not a plain absolute path: {root!r}")
    limits = limits or DiffLimits()
    with manager.using(sandbox_id) as sandbox:
        base = manager.states.get(base_state_id or sandbox.state_id)
        if sandbox.layers[: len(base.layers)] == base.layers:
            paths = await sandbox.box.changed_paths(root, since=len(base.layers))
            async with manager.fresh(base.id) as pristine:
                return await diff_boxes(pristine, sandbox.box, paths, root, limits)
        async with manager.fresh(base.id) as pristine:
            both = {*await _all(pristine, root), *await _all(sandbox.box, root)}
            return await diff_boxes(pristine, sandbox.box, sorted(both), root, limits)


async def _all(box: Box, root: str) -> Sequence[str]:
    entries, cut = await list_files(box, root, limit=_MAX_LIMIT)
    if cut:
        raise FailedPrecondition(
            f"{root} has more than {_MAX_LIMIT} files and the states are not related"
        )
    return [f"{root.rstrip('/')}/{entry.path}" for entry in entries if not entry.directory]
