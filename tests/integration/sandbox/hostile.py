"""Trees and archives that mean harm, as hypothesis makes them, and programs that lay them out."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

SECRET = "regreen-secret-of-the-host"
NAMES = (
    *("a", "b", "c", "x" * 255, "new\nline", "\udcff\udcfe", "..x", " ", "-rf", ".wh.a", "ü"),
    *("tab\t", "*", "$(id)", ".git", "\\", '"', "\x01\x7f"),
)
_KINDS = (
    *("file", "file", "dir", "dir", "link", "link", "link", "fifo", "socket", "sparse", "huge"),
    *("hard", "locked", "setuid"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to lay out: what, in which earlier directory, by what name, with what argument."""

    kind: str
    parent: int
    name: str
    target: int


TREES = st.lists(
    st.builds(
        Entry,
        st.sampled_from(_KINDS),
        st.integers(0, 9),
        st.sampled_from(NAMES),
        st.integers(0, 99),
    ),
    min_size=3,
    max_size=14,
)


def targets(outside: Path) -> list[str]:
    """Where links may point."""
    return [
        *(f"{outside}/secret", f"{'../' * 30}{str(outside)[1:]}/secret", str(outside)),
        *("/", "..", ".", "a", "b/c", "self", "/dev/zero", "/dev/stdin", "/work/repo"),
        *(f"/proc/self/root{outside}/secret", f"/proc/1/root{outside}/secret"),
        *("/proc/self/fd/0", "/proc/self/mem", f"/proc/self/cwd/../../..{outside}/secret"),
        "x/" * 1500,
    ]


LAY = r"""
import json, os, socket, sys
entries, targets = json.load(sys.stdin)
os.chdir("/work/repo")
folders, made = ["."], []
for kind, parent, name, number in entries:
    path = os.path.join(folders[parent % len(folders)], name)
    target = targets[number % len(targets)]
    try:
        if kind == "dir":
            os.mkdir(path); folders.append(path)
        elif kind == "link": os.symlink(target, path)
        elif kind == "fifo": os.mkfifo(path)
        elif kind == "socket":
            here = os.getcwd(); os.chdir(os.path.dirname(path))
            try: socket.socket(socket.AF_UNIX).bind(name[:100])
            finally: os.chdir(here)
        elif kind == "hard": os.link(made[number % len(made)], path)
        else:
            with open(path, "xb") as out:
                if kind == "file": out.write(b"content %d\n" % number)
                if kind == "sparse": out.seek(1 << 28); out.write(b"end")
                if kind == "huge": out.truncate(3 << 30)
            if kind == "locked": os.chmod(path, 0)
            if kind == "setuid": os.chmod(path, 0o6755)
        made.append(path)
    except (OSError, ValueError, ZeroDivisionError):
        continue
shown = []
for path in made:
    found = None
    try:
        real = os.path.realpath(path)
        if os.path.isfile(real) and not real.startswith("/proc"):
            with open(path, "rb") as source: found = source.read(64).hex()
    except OSError:
        pass
    shown.append([path, found])
print(json.dumps(shown))
"""

SWAP = r"""
import os, random, sys
os.chdir("/work/repo")
secret, paths = sys.argv[1], sys.argv[2:]
while True:
    path = random.choice(paths)
    new = random.choice(["link", "up", "dir", "gone", "back"])
    try:
        if new == "back": os.rename("/work/kept", path)
        else: os.rename(path, "/work/kept")
        if new == "link": os.symlink(secret, path)
        if new == "up": os.symlink(os.path.dirname(secret), path)
        if new == "dir": os.mkdir(path)
    except OSError:
        continue
"""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive."""

    name: str
    kind: bytes
    link: str
    size: int
    mode: int


def members(outside: Path) -> st.SearchStrategy[list[Member]]:
    """Entries of hostile archives; names are relative to where they are to be unpacked."""
    part = st.sampled_from((*NAMES[:8], "..", ".", "", "/", "a", "b", "y" * 300, "nul\0"))
    name = st.lists(part, min_size=1, max_size=4).map("/".join)
    long = st.sampled_from(("/".join(["d" * 200] * 20), "/".join(["d"] * 2100)))
    link = st.sampled_from(targets(outside))
    kinds = (
        *(tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE),
        *(tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.GNUTYPE_SPARSE, b"9"),
    )
    return st.lists(
        st.builds(
            Member,
            st.one_of(name, name, name, long),
            st.sampled_from(kinds),
            link,
            st.sampled_from((0, 1, 512, 100_000, 20 << 20)),
            st.sampled_from((0, 0o644, 0o755, 0o7777)),
        ),
        min_size=1,
        max_size=6,
    )


def packed(entries: list[Member], prefix: str = "", record: bytes | None = None) -> bytes:
    """A tar archive of entries; with a record, one of a State."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        if record is not None:
            info = tarfile.TarInfo("state.json")
            info.size = len(record)
            archive.addfile(info, io.BytesIO(record))
            top = tarfile.TarInfo("layers/0")
            top.type, top.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(top)
        for entry in entries:
            info = tarfile.TarInfo(prefix + entry.name)
            info.type, info.linkname, info.mode = entry.kind, entry.link, entry.mode
            if entry.kind in (tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE):
                info.size = entry.size
            archive.addfile(info, io.BytesIO(bytes(info.size)))
        if record is not None:
            archive.addfile(tarfile.TarInfo("end"))
    return out.getvalue()
