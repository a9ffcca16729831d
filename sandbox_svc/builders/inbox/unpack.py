"""Unpacks a source archive inside a sandbox: `unpack.py ARCHIVE TARGET [--only PATH]...`.

- Standard library only, Python 3.7 and newer; the archive is hostile, the sandbox is the wall.
- A single top-level directory is stripped; with `--only`, those paths are replaced as a whole.
- Links, devices and names that leave the target are refused with exit status 2.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
from typing import IO, NoReturn

MAX_BYTES = 2 << 30
MAX_FILES = 200_000


def fail(message: str) -> NoReturn:
    sys.stderr.write("unpack: " + message + "\n")
    sys.exit(2)


def safe_path(root: str, name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        fail(f"a name leaves the target: {name!r}")
    return os.path.join(root, *parts) if parts else root


def write(stream: IO[bytes] | None, path: str, mode: int, mtime: float) -> None:
    if stream is None:
        fail(f"{path!r} has no content")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    os.chmod(path, 0o755 if mode & 0o100 else 0o644)
    os.utime(path, (mtime, mtime))


def unpack_tar(archive: str, root: str) -> None:
    with tarfile.open(archive) as tar:
        total = count = 0
        links = []
        for member in tar:
            total, count = total + member.size, count + 1
            if total > MAX_BYTES or count > MAX_FILES:
                fail("the archive is too large")
            path = safe_path(root, member.name)
            if member.isdir():
                os.makedirs(path, exist_ok=True)
            elif member.isfile():
                write(tar.extractfile(member), path, member.mode, member.mtime)
            elif member.issym() or member.islnk():
                base = os.path.dirname(member.name) if member.issym() else ""
                shown = os.path.normpath(os.path.join(base, member.linkname))
                links.append((safe_path(root, shown), path))
            else:
                fail(f"{member.name!r} is no regular file")
    copy_links(links)


def copy_links(links: list[tuple[str, str]]) -> None:
    """Each becomes a copy of the file that it names, wherever in the archive that stands."""
    while links:
        missing = []
        for target, path in links:
            if not os.path.isfile(target):
                missing.append((target, path))
            elif target != path:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                shutil.copy2(target, path)
        if len(missing) == len(links):
            return
        links = missing


def unpack_zip(archive: str, root: str) -> None:
    with zipfile.ZipFile(archive) as bundle:
        if sum(i.file_size for i in bundle.infolist()) > MAX_BYTES:
            fail("the archive is too large")
        for info in bundle.infolist():
            path = safe_path(root, info.filename)
            mode = info.external_attr >> 16
            if info.filename.endswith("/"):
                os.makedirs(path, exist_ok=True)
            elif mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
                fail(f"{info.filename!r} is no regular file")
            else:
                with bundle.open(info) as stream:
                    write(stream, path, mode or 0o644, 1_600_000_000)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("archive")
    parser.add_argument("target")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--keep-top", action="store_true")
    options = parser.parse_args()
    os.makedirs(os.path.dirname(options.target), exist_ok=True)
    staging = tempfile.mkdtemp(prefix=".unpack-", dir=os.path.dirname(options.target))
    if zipfile.is_zipfile(options.archive):
        unpack_zip(options.archive, staging)
    else:
        unpack_tar(options.archive, staging)
    entries = os.listdir(staging)
    top = staging
    if (
        not options.keep_top
        and len(entries) == 1
        and os.path.isdir(os.path.join(staging, entries[0]))
    ):
        top = os.path.join(staging, entries[0])
    if not options.only:
        shutil.rmtree(options.target, ignore_errors=True)
        shutil.move(top, options.target)
    for path in options.only:
        source, target = safe_path(top, path), safe_path(options.target, path)
        if os.path.isdir(target):
            shutil.rmtree(target)
        elif os.path.exists(target):
            os.unlink(target)
        if os.path.exists(source):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.move(source, target)
    shutil.rmtree(staging, ignore_errors=True)


if __name__ == "__main__":
    main()
