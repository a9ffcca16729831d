"""Files of a sandbox through descriptors that its own first process opened.

- The descriptors are of regular files; the callers have checked that.
- A refusal says whose it is: a path that is not there, one that may not be opened, a full disk.
- A host or a service that has run out of something says so, and what to do, with a delay; it is
  never an answer about what was asked.
"""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

from regreen.rpc.errors import (
    DiskFull,
    FailedPrecondition,
    InvalidArgument,
    NoSuchFile,
    RegreenError,
    ResourceExhausted,
)

FULL = (errno.ENOSPC, errno.EDQUOT)
"""How a full disk says so."""
NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)
"""How the kernel says that there are no descriptors to be had."""
_FREE_DISK = (
    "free bytes or inodes on the file system of the service's home, delete states that nobody "
    "needs (regreen state list, regreen state delete), or give them a budget (state_bytes)"
)


@contextlib.contextmanager
def writing(what: str = "sandboxes and states") -> Iterator[None]:
    """Around what writes or opens files: that the host or the service has run out is told so.

    Raises:
        ResourceExhausted: there are no descriptors.
        DiskFull: there is no space.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_space(f"no space left for {what}: {error}") from error
        if error.errno in NONE_LEFT:
            raise exhausted(what) from error
        raise


def no_space(problem: str) -> DiskFull:
    """The error where the disk of the service is full."""
    return DiskFull(f"{problem}; {_FREE_DISK}")


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
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ResourceExhausted(
        f"the service has no file descriptors left for {what}; delete sandboxes, or start the "
        f"service with a higher limit of open files than {most} (ulimit -n, LimitNOFILE=, on the "
        "host fs.file-max)",
        retry_after_s=1.0,
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
            return no_space(
                f"no space left where the sandbox writes {path}: {problem}; below /tmp and "
                "/dev/shm delete files there or give it more memory_bytes, elsewhere"
            )
        case errno.EMFILE | errno.ENFILE | errno.ETOOMANYREFS:
            return ResourceExhausted(
                f"no descriptor can be had of {path}: {problem}; end commands of the sandbox that "
                "hold many open, or start the service with a higher limit of open files",
                retry_after_s=1.0,
            )
        case _:
            return InvalidArgument(
                "path", f"{problem}: {path}", "name a regular file of the sandbox"
            )
