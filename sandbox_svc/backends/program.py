"""Builds the spawner, a C program, once for each change of its sources, and finds it again.

- It is kept beside its sources, or where those may not be written, in the user's cache; the name
  has a digest of everything it was built from.
- Any C compiler will do: `cc`, `gcc`, `clang`, or the one in the `ziglang` package.
- Linked statically where the C library can be: a sandbox's first process then has few pages that
  its fork must copy.
- Two that build at once each write a draft; whoever renames last wins, with the same program.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from regreen.rpc.errors import MissingDependency

_SOURCES = Path(__file__).with_name("spawner")
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
_LINKING = (("-static",), ("-Wl,-z,now",))
"""In order of preference; a library that has no static form leaves the second."""
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
    digest = hashlib.sha256(repr((_FLAGS, tuple(defines), os.uname().machine)).encode())
    for file in files:
        digest.update(file.read_bytes())
    name = f"spawner-{digest.hexdigest()[:16]}"
    places = _places() if into is None else [into]
    for place in places:
        if os.access(place / name, os.X_OK):
            return place / name
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            draft = tempfile.mkdtemp(prefix=".draft-", dir=place)
        except OSError:
            continue
        try:
            built = Path(draft, name)
            _compile([str(file) for file in files if file.suffix == ".c"], built, defines)
            built.replace(place / name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return place / name
    told = " and ".join(map(str, places))
    raise MissingDependency(f"the spawner cannot be kept: {told} may not be written")


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
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                target.chmod(0o755)
                return
            said = f"{compiler[0]}: {(done.stderr or done.stdout).strip()[-500:]}"
    raise MissingDependency(f"the spawner needs a C compiler; {_REMEDY} ({said})")


if __name__ == "__main__":
    sys.stdout.write(f"{spawner()}\n")
