"""Reads files that somebody else made: bounded, never a pipe, a device or out of their place."""

import os
import stat
from pathlib import Path

from regreen.rpc.errors import InvalidArgument

_LINK = "put the file itself there"


def bounded(path: Path, where: str, most: int, *, follow: bool = True) -> bytes:
    """The bytes of a regular file; a pipe or a device is never waited for.

    Raises:
        InvalidArgument: it cannot be read, is no file, or too large; a link, unless they are
            followed.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        with open(os.open(path, flags), "rb") as source:
            info = os.fstat(source.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise InvalidArgument(where, "is no file", "name a file")
            data = source.read(most + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        if not follow and path.is_symlink():
            raise InvalidArgument(where, "is a link", _LINK) from error
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise InvalidArgument(where, problem, "name a readable file") from error
    if len(data) > most:
        problem, remedy = "is too large", f"keep it under {max(1, most >> 20)} MiB"
        raise InvalidArgument(where, problem, remedy)
    return data


def top_of(root: Path) -> Path:
    """The repository that a directory is in; the directory itself where it is in none."""
    whole = root.resolve()
    return next((place for place in (whole, *whole.parents) if (place / ".git").exists()), whole)


def kept_inside(path: Path, top: Path, where: str) -> None:
    """Refuse a path that leads out of a directory, by its name or by links.

    Raises:
        InvalidArgument: it does, or runs in circles.
    """
    try:
        inside = path.resolve().is_relative_to(top.resolve())
    except (OSError, RuntimeError, ValueError):  # a circle of links
        inside = False
    if not inside:
        problem = (
            "is a link out of the repository" if path.is_symlink() else "leaves the repository"
        )
        raise InvalidArgument(where, problem, _LINK)
