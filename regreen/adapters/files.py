"""Whole files and trees between this machine and a sandbox.

- Reads and writes are bounded by the configuration; what is larger is refused, never cut.
- An existing file keeps its permission bits when it is written; uploads carry theirs.
- Links of this machine are followed, each directory once; nothing but files and directories goes.
"""

import asyncio
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from regreen.adapters.held import HeldSandbox
from regreen.client.sandbox import succeeded
from regreen.rpc.errors import InvalidArgument, NoSuchFile

_PIECE_BYTES = 8 << 20
_AT_ONCE = 8
_MKDIR_AT_ONCE = 200
MAX_FILES = 20_000
"""Files and directories of one upload."""
MAX_TREE_BYTES = 1 << 30
"""Bytes of one upload."""


async def read_whole(box: HeldSandbox, path: str) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is no regular file, or larger than `file_bytes`.
    """
    parts: list[bytes] = []
    got, target, bound = 0, box.path(path), box.config.file_bytes
    while True:
        try:
            piece = await box.client.read_file(
                box.id, target, offset=got, max_bytes=min(_PIECE_BYTES, bound)
            )
        except NoSuchFile as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        except InvalidArgument as error:
            raise OSError(errno.EINVAL, str(error), path) from error
        if piece.size_bytes > bound:
            raise OSError(errno.EFBIG, f"{piece.size_bytes} bytes, file_bytes is {bound}", path)
        parts.append(piece.content)
        got += len(piece.content)
        if got >= piece.size_bytes or not piece.content:
            return b"".join(parts)


async def write_whole(box: HeldSandbox, path: str, content: bytes, mode: int | None = None) -> None:
    """Write a regular file, making its directories; without `mode` an existing one keeps its own.

    Raises:
        OSError: larger than `file_bytes`, or the path cannot be written.
    """
    target = box.path(path)
    if len(content) > box.config.file_bytes:
        told = f"{len(content)} bytes, file_bytes is {box.config.file_bytes}"
        raise OSError(errno.EFBIG, told, path)
    if mode is None:
        found = await box.run(["stat", "-L", "-c", "%a", "--", target], cwd="/")
        text = found.stdout.head.decode().strip()
        mode = int(text, 8) & 0o777 if succeeded(found) and text else 0o644
    try:
        await box.client.write_file(box.id, target, content, mode=mode)
    except InvalidArgument as error:
        raise OSError(errno.EINVAL, str(error), path) from error


async def upload(box: HeldSandbox, source: str, target: str) -> None:
    """Copy a file or a tree into the sandbox; a file goes into a `target` that is a directory.

    Raises:
        FileNotFoundError: there is no such source.
        OSError: it holds something else than files and directories, or is over a bound.
    """
    root = Path(source)
    if not root.is_dir():
        is_directory = await box.run(["test", "-d", box.path(target)], cwd="/")
        place = f"{target.rstrip('/')}/{root.name}" if succeeded(is_directory) else target
        await write_whole(box, place, _content(root, box.config.file_bytes), _mode(root))
        return
    entries = list(_tree(root))
    base = box.path(target).rstrip("/")
    folders = [f"{base}/{place}" for place, path in entries if path.is_dir()] or [base]
    for at in range(0, len(folders), _MKDIR_AT_ONCE):
        made = await box.run(["mkdir", "-p", "--", *folders[at : at + _MKDIR_AT_ONCE]], cwd="/")
        if not succeeded(made):
            told = made.stderr.head.decode("utf-8", "backslashreplace").strip()
            raise OSError(errno.EINVAL, told, target)
    slots = asyncio.Semaphore(_AT_ONCE)

    async def copy(place: str, path: Path) -> None:
        async with slots:
            content = _content(path, box.config.file_bytes)
            await write_whole(box, f"{base}/{place}", content, _mode(path))

    try:
        async with asyncio.TaskGroup() as group:
            for place, path in entries:
                if not path.is_dir():
                    group.create_task(copy(place, path))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _tree(root: Path) -> Iterator[tuple[str, Path]]:
    """Every entry below `root` with its relative path, bounded; the root itself is "."."""
    seen: set[tuple[int, int]] = set()
    count = size_bytes = 0
    for directory, folders, names in os.walk(root, followlinks=True):
        here = os.stat(directory)
        if (here.st_dev, here.st_ino) in seen:  # a link back
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        relative = Path(directory).relative_to(root)
        yield relative.as_posix(), Path(directory)
        for name in names:
            path = Path(directory, name)
            size_bytes += path.stat().st_size
            yield (relative / name).as_posix(), path
        count += 1 + len(names)
        if count > MAX_FILES or size_bytes > MAX_TREE_BYTES:
            told = f"more than {MAX_FILES} entries or {MAX_TREE_BYTES} bytes"
            raise OSError(errno.EFBIG, told, str(root))


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) & 0o777


def _content(path: Path, bound: int) -> bytes:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "neither a file nor a directory", str(path))
    if info.st_size > bound:
        raise OSError(errno.EFBIG, f"{info.st_size} bytes, file_bytes is {bound}", str(path))
    return path.read_bytes()
