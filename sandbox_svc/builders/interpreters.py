"""Finds the CPython interpreters of this host; run as a module, prints them as JSON.

- Only interpreters that ran and told their own version count; their prefix is shown read-only
  inside sandboxes at the same path.
- A version is two numbers before it becomes part of a path of this host.
- The host is looked at anew each time: what is installed or removed meanwhile is seen at once. Only
  the answer of a program is kept, as long as its file stays the same.
- A missing one is a typed error that names the version, the places that were looked at and how to
  get it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InvalidArgument, MissingDependency
from sandbox_svc.backends.base import HOST_BASE, Mount
from sandbox_svc.hosts import program_stamps

VERSIONS = ("3.7", "3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
_ASK = (
    "import json,sys;print(json.dumps([list(sys.version_info[:3]),sys.base_prefix,"
    "sys.base_exec_prefix,sys.implementation.name,"
    "getattr(sys,'_base_executable',sys.executable)]))"
)


@dataclass(frozen=True, slots=True)
class Interpreter:
    """One CPython of the host."""

    version: str
    """`major.minor`."""
    full_version: str
    executable: Path
    prefix: Path

    @property
    def mount(self) -> Mount | None:
        """What a sandbox needs to see to run it; None where its base already has it."""
        if self.prefix.is_relative_to("/usr"):
            return None
        return Mount(self.prefix, str(self.prefix), read_only=True)


def _versioned(env: Mapping[str, str]) -> dict[str, Path]:
    """Folders of the tools that keep one folder for each version, by the prefix of its name."""
    home = Path(env.get("HOME") or "/nonexistent")
    pyenv = Path(env.get("PYENV_ROOT") or home / ".pyenv") / "versions"
    uv = Path(env.get("UV_PYTHON_INSTALL_DIR") or home / ".local/share/uv/python")
    return {"": pyenv, "cpython-": uv}


def _plain(version: str) -> tuple[Path, ...]:
    return Path("/usr/bin"), Path("/usr/local/bin"), Path(f"/opt/python{version}/bin")


def _candidates(version: str, env: Mapping[str, str]) -> Iterator[Path]:
    """Places to look, best first; shims are left out because they run a shell."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        yield Path(sys.base_prefix) / "bin" / f"python{version}"
    for prefix, root in _versioned(env).items():
        try:
            found = sorted(root.glob(f"{prefix}{version}.*"), reverse=True)
        except OSError:
            found = []
        for folder in found:
            yield folder / "bin" / f"python{version}"
    for folder in _plain(version):
        yield folder / f"python{version}"
    on_path = shutil.which(f"python{version}", path=env.get("PATH"))
    if on_path and "shims" not in on_path:
        yield Path(on_path)


def _ask(path: Path, version: str) -> Interpreter | None:
    try:
        if not os.access(path, os.X_OK):
            return None
        file = path.stat()
        return _answer(path, version, (file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


@lru_cache(maxsize=128)
def _answer(path: Path, version: str, _file: tuple[int, ...]) -> Interpreter | None:
    """What the program says of itself; a failure is raised, and so not remembered."""
    command = [str(path), "-I", "-c", _ASK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    numbers, prefix, _, name, executable = json.loads(done.stdout)
    short = f"{numbers[0]}.{numbers[1]}"
    if name != "cpython" or short != version:
        return None
    full = ".".join(map(str, numbers))
    return Interpreter(short, full, Path(executable), Path(prefix))


def _find(version: str) -> Interpreter | None:
    for path in _candidates(version, os.environ):
        found = _ask(path, version)
        if found is not None:
            return found
    return None


def stamps(facts: Mapping[str, Any], base: str) -> list[list[object]]:
    """What tells the interpreters of a State's facts from others that were put in their places.

    They are the host's, as are the programs of a State that stands on it: a State names them, and
    does not hold them.
    """
    found = program_stamps() if base == HOST_BASE else []
    for version, executable in sorted(facts.get("interpreters", {}).items()):
        path = os.path.realpath(executable)
        try:
            info = os.stat(path)
        except OSError:
            found.append([version, path])
        else:
            found.append([version, path, info.st_size, info.st_mtime_ns])
    return found


def check_version(version: str) -> None:
    """Refuse what is no `major.minor`.

    Raises:
        InvalidArgument: it is something else.
    """
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,3}", version):
        raise InvalidArgument("spec.python", f"{version[:40]!r} is no version", "give major.minor")


def find_interpreter(version: str) -> Interpreter:
    """The host's CPython `version` (`3.9`).

    Raises:
        InvalidArgument: `version` is no `major.minor`.
        MissingDependency: there is none; says how to install one.
    """
    check_version(version)
    found = _find(version)
    if found is None:
        places = ", ".join(map(str, (*_versioned(os.environ).values(), *_plain(version))))
        raise MissingDependency(
            f"Python {version} is not on this host; looked in {places} and on the PATH of this "
            f"service; install it there (`uv python install {version}`, pyenv, the system's "
            "packages), which is seen at once, or choose a task made for one of: "
            f"{', '.join(find_all()) or 'none'}"
        )
    return found


def find_all() -> dict[str, Interpreter]:
    """Every supported CPython of the host by version."""
    found = {version: _find(version) for version in VERSIONS}
    return {version: value for version, value in found.items() if value is not None}


if __name__ == "__main__":
    sys.stdout.write(json.dumps({v: str(found.executable) for v, found in find_all().items()}))
