"""A digest of what a layer changes, for comparing two runs of one command.

- Names, types, permission bits, content and link targets count; times, owners and inode numbers do
  not, because they differ between equal runs.
- Two layers with one digest show the same files over the same layers.
"""

import hashlib
import os
import stat
from pathlib import Path

from sandbox_svc.backends.merge import is_opaque

_CHUNK_BYTES = 1 << 20


def tree_digest(top: Path) -> str:
    """SHA-256 over the entries below `top`, in order of their paths."""
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
    digest = hashlib.sha256()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()
