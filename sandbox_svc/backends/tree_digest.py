"""A digest of what a layer changes, for comparing two runs of one command.

- Names, types, permission bits, content and link targets count; times, owners and inode numbers do
  not, because they differ between equal runs.
- Two layers with one digest show the same files over the same layers.
- Of a sparse file only what is stored is read; a hole and stored zeros are the same content.
"""

import errno
import hashlib
import os
import stat
from pathlib import Path

from sandbox_svc.backends.merge import is_opaque

_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)


def tree_digest(top: Path) -> str:
    """SHA-256 over the entries below `top`, in order of their paths.

    Raises:
        OSError: an entry cannot be read; its mode or the length of its path forbids it.
    """
    digest = hashlib.sha256(b"regreen-tree\n")
    stack = [""]
    while stack:
        relative = stack.pop()
        path = f"{top}/{relative}" if relative else str(top)
        info = os.lstat(path)
        parts = [os.fsencode(relative), b"%o" % info.st_mode, *_facts(path, info)]
        for part in parts:
            digest.update(b"%d:" % len(part) + part)
        if stat.S_ISDIR(info.st_mode):
            names = sorted(os.listdir(path), reverse=True)
            stack += [f"{relative}/{name}" if relative else name for name in names]
    return digest.hexdigest()


def _facts(path: str, info: os.stat_result) -> list[bytes]:
    """What tells two entries of one type apart."""
    if stat.S_ISDIR(info.st_mode):
        return [b"opaque" if is_opaque(path) else b""]
    if stat.S_ISLNK(info.st_mode):
        return [os.fsencode(os.readlink(path))]
    if stat.S_ISREG(info.st_mode):
        return [_content(path)]
    return [b"%d" % info.st_rdev]


def _content(path: str) -> bytes:
    """SHA-256 over the size and the blocks that are not all zeros, each with its place."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        digest = hashlib.sha256(b"%d" % size)
        place = _next_block(fd, 0, size)
        while place < size:
            block = os.pread(fd, _BLOCK_BYTES, place)
            if block != _ZEROS[: len(block)]:
                digest.update(b"@%d:" % place + block)
            place = _next_block(fd, place + _BLOCK_BYTES, size)
        return digest.digest()
    finally:
        os.close(fd)


def _next_block(fd: int, start: int, size: int) -> int:
    """Where the first block from `start` on with stored bytes begins; `size` if there is none."""
    if start >= size:
        return size
    try:
        return os.lseek(fd, start, os.SEEK_DATA) // _BLOCK_BYTES * _BLOCK_BYTES
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size
