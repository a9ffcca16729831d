"""Looking at a sandbox's files: listing and text search.

- Everything runs inside the sandbox; no path of a sandbox is ever resolved by this process.
- Every answer is bounded in entries and bytes and says when a bound cut it.
- What grows with an agent's input (globs, listings) is computed in worker threads.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NoSuchFile,
    ResourceExhausted,
    SandboxLost,
    Unavailable,
)
from sandbox_svc.backends.base import (
    Box,
    Command,
    EndReason,
    ExecResult,
)
from sandbox_svc.backends.commands import absolute
from sandbox_svc.globs import Glob

_LIST_OUTPUT_BYTES = 32 << 20
_FIND_TEXT_BYTES = 4096
_FIND_OUTPUT_BYTES = 8 << 20
_LINE_CHARS = 400
_TIMEOUT_S = 30.0
MAX_LIMIT = 10_000
SKIPPED = ("__pycache__", ".git", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")
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


def _limit(value: int, default: int) -> int:
    if not 0 <= value <= MAX_LIMIT:
        raise InvalidArgument("limit", f"is {value}", f"give 1 to {MAX_LIMIT}, or 0 for {default}")
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
        raise SandboxLost(f"the sandbox has lost its processes while {root} was looked through")
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
    entries, cut = await listing(box, root, pattern, "replace")
    return entries[:limit], cut or len(entries) > limit


async def listing(
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
    if len(text.encode()) > _FIND_TEXT_BYTES:
        raise InvalidArgument(
            "text", f"has more than {_FIND_TEXT_BYTES} bytes", "look for a part of it"
        )
    pattern = Glob(glob) if glob else None
    skipped = [f"--exclude-dir={name}" for name in SKIPPED]
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
