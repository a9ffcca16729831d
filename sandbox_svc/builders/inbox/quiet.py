"""Around a run: keeps what is printed out of a run's own output, fills caches, ends the process.

- Standard library only, Python 3.7 and newer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from typing import Any, NoReturn


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


def remember_files(modules: list[dict[str, Any]]) -> None:
    """Let `inspect` know the files of modules, which it looks for when it first shows a failure."""
    inspect: Any = sys.modules.get("inspect")
    if inspect is None:
        return
    for found in modules:
        for name, module in found.items():
            place = vars(module).get("__file__") if type(module) is type(sys) else None
            if isinstance(place, str):
                path = inspect.getabsfile(module)
                inspect._filesbymodname[name] = place
                inspect.modulesbyfile[path] = module.__name__
                inspect.modulesbyfile[os.path.realpath(path)] = module.__name__


def leave(status: int, atexit: Any) -> NoReturn:
    """End the process as `sys.exit` does, but leave taking the interpreter down to the kernel.

    With scientific packages that takes longer than many a test suite, and says nothing of it.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001 - Python prints it too, and goes on
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)
