"""Byte code for all that runs of a State import: `byte_code.py DIRECTORY...`.

- Standard library only, Python 3.7 and newer; runs nothing of the environment or the repository.
- With a prefix of its own Python looks for the byte code of its library there too, and not where it
  came with it: what came is copied, and what pytest always needs is compiled where none came.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import sys

ALWAYS = (
    *("argparse", "ast", "asyncio", "bdb", "contextvars", "csv", "dataclasses", "decimal"),
    *("difflib", "doctest", "email.message", "gettext", "hmac", "html", "http.client"),
    *("importlib.metadata", "inspect", "json", "logging.handlers", "pdb", "platform", "pprint"),
    *("secrets", "ssl", "tempfile", "typing", "unittest.mock", "urllib.request", "uuid"),
    *("xml.etree.ElementTree", "zipfile"),
)
SELDOM = frozenset(
    (
        *("__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"),
        *("test", "tests", "tkinter", "turtledemo", "curses", "dbm", "distutils", "msilib"),
        *("venv", "wsgiref", "xmlrpc", "_pydatetime.py", "_pydecimal.py", "_pyio.py"),
        *("imaplib.py", "mailbox.py", "nntplib.py", "pickletools.py", "pydoc.py", "turtle.py"),
    )
)
"""Parts of the library that few tests import: every State would hold them."""
MANY = 2000
"""Files from which on a second process is worth the 0.3 s that it takes itself."""
UNUSED = re.compile("site-packages/.*/tests?/")


def copy_own(library: str) -> int:
    """Byte code that the interpreter came with, if it is that of its sources; how many files."""
    copied = 0
    for folder, folders, files in os.walk(library):
        folders[:] = [n for n in folders if n not in SELDOM and not n.startswith("config-")]
        for name in files:
            source = os.path.join(folder, name)
            if name.endswith(".py") and name not in SELDOM:
                target = importlib.util.cache_from_source(source)
                own = os.path.join(folder, "__pycache__", os.path.basename(target))
                if not os.path.exists(target) and is_of(own, source):
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    shutil.copyfile(own, target)
                    copied += 1
    return copied


def sources(directory: str) -> int:
    return sum(name.endswith(".py") for _, _, files in os.walk(directory) for name in files)


def is_of(code: str, source: str) -> bool:
    """Whether byte code says that it was made of a file as it is, by this interpreter."""
    try:
        with open(code, "rb") as file:
            head = file.read(16)
        known = os.stat(source)
    except OSError:
        return False
    stamp = int(known.st_mtime) & 0xFFFFFFFF, known.st_size & 0xFFFFFFFF
    stamps = b"".join(number.to_bytes(4, "little") for number in (0, *stamp))
    return head == importlib.util.MAGIC_NUMBER + stamps


def import_always(library: str) -> None:
    """Let Python keep what it compiles when it imports these, from its own library alone."""
    path = list(sys.path)
    sys.path[:] = [library, os.path.join(library, "lib-dynload")]
    for name in ALWAYS:
        with contextlib.suppress(ImportError):  # an interpreter without it
            importlib.import_module(name)
    sys.path[:] = path


if __name__ == "__main__":
    if getattr(sys, "pycache_prefix", None):  # Python 3.7 has none
        library = os.path.dirname(os.__file__)
        if not copy_own(library):
            import_always(library)
    for directory in sys.argv[1:]:
        workers = 2 if sources(directory) > MANY else 1
        compileall.compile_dir(directory, quiet=1, rx=UNUSED, workers=workers)
