"""Where an ext4 without a journal puts directories that come and go.

- Such a file system gives no inode out again within minutes of its deletion, and to make one it
  passes over all that were deleted in the same group of blocks: after 2,000 sandboxes that came and
  went in one group, making four directories took twelve times as long as at first.
- Directories below one that is marked as a top of hierarchies (`chattr +T`) get groups of their
  own, so that there is next to nothing to pass over.
- With a journal there is nothing to gain, and nothing is marked.
"""

import contextlib
import fcntl
import os
import struct
from pathlib import Path

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_TOP = 0x00020000


def spread(directory: Path) -> bool:
    """Mark a directory where that helps; whether it is marked. Nothing depends on it."""
    with contextlib.suppress(OSError):
        if _without_journal(directory):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                (flags,) = struct.unpack("I", fcntl.ioctl(fd, _GET_FLAGS, struct.pack("I", 0)))
                fcntl.ioctl(fd, _SET_FLAGS, struct.pack("I", flags | _TOP))
            finally:
                os.close(fd)
            return True
    return False


def _without_journal(directory: Path) -> bool:
    """Whether this is an ext4 whose device no journal is known of."""
    number = os.stat(directory).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    journals = Path("/proc/fs/jbd2").glob(f"{device}-*")
    return Path("/proc/fs/ext4", device).is_dir() and not any(journals)
