"""Files that commands write.

- A file that is there is replaced only with `--force`, and whole: what is written lies beside it
  until it is complete. A link stays, and what it leads to is replaced.
- A pipe, a terminal or a device is written to where it is.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from regreen.rpc.errors import InvalidArgument

Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def check_target(path: Path, field: str, *, force: bool) -> bool:
    """Refuse a place that cannot be written to; whether it takes a regular file.

    Raises:
        InvalidArgument: names the remedy.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _unwritable(path, field, error) from error
    if stat.S_ISDIR(mode):
        raise InvalidArgument(field, f"{path} is a directory", "name a file in it")
    if stat.S_ISREG(mode) and not force:
        raise InvalidArgument(field, f"{path} is there already", "name another, or give --force")
    return stat.S_ISREG(mode)


@contextlib.contextmanager
def written(path: Path, field: str, *, force: bool) -> Iterator[BinaryIO]:
    """Where the content of a file goes; on any error the place is as it was.

    Raises:
        InvalidArgument: it cannot be written, or is there already.
    """
    regular = check_target(path, field, force=force)
    try:
        if not regular:
            with path.open("wb") as target:
                yield target
            return
        whole = Path(os.path.realpath(path))
        draft = whole.with_name(f".{whole.name}.{os.getpid()}")
        try:
            with draft.open("xb") as target:
                yield target
            draft.replace(whole)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, field, error) from error


def _unwritable(path: Path, field: str, error: OSError) -> InvalidArgument:
    return InvalidArgument(field, f"{path} cannot be written: {error.strerror}")
