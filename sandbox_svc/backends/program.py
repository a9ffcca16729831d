"""Builds the spawner, a C program, once for each change of its sources, and finds it again.

- It is kept beside its sources, or where those may not be written, in the user's cache; the name
  has a digest of everything it was built from.
- Any C compiler will do: `cc`, `gcc`, `clang`, or the one in the `ziglang` package.
- Linked statically where the C library can be: a sandbox's first process then has few pages that
  its fork must copy.
- What another user could have written is not executed.
- Two that build at once each write a draft; whoever renames last wins, with the same program.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from regreen.rpc.errors import MissingDependency

_SOURCES = Path(__file__).with_name("spawner")
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
_LINKING = (("-static",), ("-Wl,-z,now",))
"""In order of preference; a library that has no static form leaves the second."""
_DRAFT, _OLD_S = ".draft-", 3600.0
_REMEDY = "install a C compiler (Debian: gcc and libc6-dev) or `pip install ziglang`"


def compilers() -> Iterator[list[str]]:
    """Commands that compile C here, best first."""
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            yield [found]
    if importlib.util.find_spec("ziglang") is not None:
        target = f"{os.uname().machine}-linux-musl"
        yield [sys.executable, "-m", "ziglang", "cc", "-target", target, "-s"]


def spawner(defines: Sequence[str] = (), into: Path | None = None) -> Path:
    """The program, built where it is not there yet.

    `defines` are given to the compiler; `into` is where it is kept, instead of the usual places.

    Raises:
        MissingDependency: there is no compiler, or it fails; says what to install.
    """
    files = sorted(_SOURCES.glob("*.[ch]"))
    parts = (_FLAGS, _LINKING, tuple(defines), os.uname().machine)
    digest = hashlib.sha256(repr(parts).encode())
    for file in files:
        digest.update(file.read_bytes())
    name = f"spawner-{digest.hexdigest()[:16]}"
    sources = [str(file) for file in files if file.suffix == ".c"]
    places = _places() if into is None else [into]
    for place in places:
        if _usable(place / name) or _built(sources, place / name, defines):
            return place / name
    told = " and ".join(map(str, places))
    raise MissingDependency(
        f"the spawner cannot be kept: in {told} this user may not write, others may, "
        "or nothing may be executed"
    )


def _usable(path: Path) -> bool:
    """Whether it can be executed, and nobody else can have put it there or changed it."""
    return _ours(path) and _ours(path.parent) and os.access(path, os.X_OK)


def _ours(path: Path) -> bool:
    try:
        info = path.stat()
    except OSError:
        return False
    return info.st_uid in (0, os.geteuid()) and not info.st_mode & 0o022


def _built(sources: Sequence[str], target: Path, defines: Sequence[str]) -> bool:
    """Compile it; False where its place will not do."""
    place = target.parent
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o755)
            place.chmod(0o755)
        if not _ours(place):
            return False
        _remove_old_drafts(place)
        draft = tempfile.mkdtemp(prefix=_DRAFT, dir=place)
    except OSError:
        return False
    try:
        _compile(sources, Path(draft, target.name), defines)
        os.replace(Path(draft, target.name), target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return _usable(target)


def _remove_old_drafts(place: Path) -> None:
    """Remove what builds left that were killed; no build takes an hour."""
    for draft in place.glob(f"{_DRAFT}*"):
        if time.time() - draft.stat().st_mtime > _OLD_S:
            shutil.rmtree(draft, ignore_errors=True)


def _places() -> list[Path]:
    """Where the program may be kept, best first."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return [_SOURCES / "built", Path(cache, "regreen")]


def _compile(sources: Sequence[str], target: Path, defines: Sequence[str]) -> None:
    said = "there is none"
    for compiler in compilers():
        for linking in _LINKING:
            options = [*_FLAGS, *(f"-D{define}" for define in defines), *linking]
            command = [*compiler, *options, "-o", str(target), *sources]
            try:
                done = subprocess.run(command, capture_output=True, check=False)
            except OSError as error:
                said = f"{compiler[0]}: {error}"
                continue
            if done.returncode == 0:
                target.chmod(0o755)
                return
            told = (done.stderr or done.stdout).decode("utf-8", "replace")
            said = f"{compiler[0]}: {told.strip()[-500:]}"
    raise MissingDependency(f"the spawner needs a C compiler; {_REMEDY} ({said})")


if __name__ == "__main__":
    sys.stdout.write(f"{spawner()}\n")
