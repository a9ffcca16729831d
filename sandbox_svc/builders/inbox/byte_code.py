"""Byte code for all that runs of a State import: `byte_code.py PREFIX READY DIRECTORY...`.

- Standard library only, Python 3.7 and newer; started with `-S` it runs nothing of the environment
  or the repository.
- With a prefix of its own Python looks for the byte code of its library there too, and not where it
  came with it: what came is copied, and what pytest always needs is compiled where none came. So
  this program is started without one, which spares it to compile what it imports itself.
- READY holds what `compile_wheel.py` has made of the wheels that are installed, if anything.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import importlib
import importlib.util
import marshal
import os
import re
import sys

ALWAYS = (
    *("argparse", "ast", "asyncio", "bdb", "contextvars", "csv", "dataclasses", "decimal"),
    *("difflib", "doctest", "email.message", "gettext", "hmac", "html", "http.client"),
    *("importlib.metadata", "inspect", "json", "logging.handlers", "pdb", "platform", "pprint"),
    *("secrets", "site", "ssl", "tempfile", "typing", "unittest.mock", "urllib.request", "uuid"),
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
                code = b"" if os.path.exists(target) else code_of(own, source)
                if code:
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(target, "wb") as kept:
                        kept.write(code)
                    copied += 1
    return copied


def sources(directory: str) -> int:
    return sum(name.endswith(".py") for _, _, files in os.walk(directory) for name in files)


def code_of(path: str, source: str) -> bytes:
    """Byte code, if it says that it was made of a file as it is, by this interpreter."""
    try:
        with open(path, "rb") as file:
            code = file.read()
        return code if code[:16] == head_of(source) else b""
    except OSError:
        return b""


def head_of(source: str) -> bytes:
    """What byte code of a file begins with (PEP 552): of this interpreter, its time and size."""
    known = os.stat(source)
    stamp = int(known.st_mtime) & 0xFFFFFFFF, known.st_size & 0xFFFFFFFF
    stamps = b"".join(number.to_bytes(4, "little") for number in (0, *stamp))
    return importlib.util.MAGIC_NUMBER + stamps


def copy_ready(folder: str) -> int:
    """Byte code of installed files whose source is what was compiled; how many files."""
    copied = 0
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        with open(os.path.join(folder, name), "rb") as file:
            ready = marshal.load(file)
        for source, (digest, code) in ready.items():
            try:
                with open(source, "rb") as file:
                    same = hashlib.sha256(file.read()).digest() == digest
            except OSError:  # not installed, as where another wheel's file has its place
                continue
            if same:
                target = importlib.util.cache_from_source(source)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "wb") as kept:
                    kept.write(head_of(source) + code)
                copied += 1
    return copied


def import_always(library: str) -> None:
    """Let Python keep what it compiles when it imports these, from its own library alone."""
    path = list(sys.path)
    sys.path[:] = [library, os.path.join(library, "lib-dynload")]
    for name in ALWAYS:
        with contextlib.suppress(ImportError):  # an interpreter without it
            importlib.import_module(name)
    sys.path[:] = path
    for module in list(sys.modules.values()):  # some came before there was a prefix
        source = getattr(module, "__file__", None) or ""
        if source.startswith(library) and source.endswith(".py"):
            compileall.compile_file(source, quiet=1)


def main(prefix: str, ready: str, *directories: str) -> None:
    if hasattr(sys, "pycache_prefix"):  # Python 3.7 has none
        sys.pycache_prefix = prefix
        os.environ["PYTHONPYCACHEPREFIX"] = prefix  # of a second process
        library = os.path.dirname(os.__file__)
        if not copy_own(library):
            import_always(library)
        copy_ready(ready)
    for directory in directories:
        workers = 2 if sources(directory) > MANY else 1
        compileall.compile_dir(directory, quiet=1, rx=UNUSED, workers=workers)


if __name__ == "__main__":
    main(*sys.argv[1:])
