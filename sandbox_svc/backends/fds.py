"""Files of a sandbox through descriptors that its own first process opened.

- The descriptors are of regular files; the callers have checked that.
- A refusal says whose it is: a path that is not there, one that may not be opened, a full disk.
"""

import errno
import os

from regreen.rpc.errors import (
    DiskFull,
    FailedPrecondition,
    InvalidArgument,
    NoSuchFile,
    RegreenError,
    ResourceExhausted,
)


def read_upto(fd: int, offset: int, limit: int) -> bytes:
    """At most `limit` bytes from `offset` on."""
    chunks, end = [], offset + limit
    while offset < end:
        chunk = os.pread(fd, min(end - offset, 1 << 20), offset)
        if not chunk:
            break
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def write_all(fd: int, content: bytes) -> None:
    """Write all of `content`."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def exhausted(what: str) -> ResourceExhausted:
    """The error where the service may open no more files; carries a delay."""
    return ResourceExhausted(
        f"the service has no file descriptors left for {what}", retry_after_s=1.0
    )


def not_opened(code: int | None, path: str, problem: str) -> RegreenError:
    """What it means that a path could not be opened inside a sandbox."""
    match code:
        case errno.ENOENT | errno.ENOTDIR:
            return NoSuchFile(f"no such file in the sandbox: {path}", metadata={"path": path})
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return FailedPrecondition(
                f"not permitted inside the sandbox: {path}: {problem}", metadata={"path": path}
            )
        case errno.ENOSPC | errno.EDQUOT:
            return DiskFull(f"no space left where the sandbox writes {path}: {problem}")
        case errno.EMFILE | errno.ENFILE | errno.ETOOMANYREFS:
            return ResourceExhausted(
                f"no descriptor can be had of {path}: {problem}", retry_after_s=1.0
            )
        case _:
            return InvalidArgument(
                "path", f"{problem}: {path}", "name a regular file of the sandbox"
            )
