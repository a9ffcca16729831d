"""Keeps what is printed while modules are loaded ahead out of a run's own output.

- Standard library only, Python 3.7 and newer.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


@contextlib.contextmanager
def quiet() -> Any:
    """Standard output and error go to a file meanwhile; gives its descriptor."""
    path = "/tmp/.regreen-ahead"
    log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    kept = {number: os.dup(number) for number in (1, 2)}
    for number in kept:
        os.dup2(log, number)
    try:
        yield log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(log)
