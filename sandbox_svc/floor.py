"""The kernel's floor of a sandbox, and of a command: builds and runs `floor.c`.

- Built with the host's C compiler when a benchmark starts; nothing of it is installed.
- Its lower directory has what a sandbox's has: places for the host's programs, /proc and /tmp.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sandbox_svc.backends.spread import spread

_SOURCE = Path(__file__).with_name("floor.c")
_PROGRAMS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")


@dataclass(frozen=True, slots=True)
class Floor:
    """The built program and its directories."""

    program: Path
    lower: Path
    run: Path

    @classmethod
    def build(cls, home: Path, skipped: dict[str, str]) -> "Floor | None":
        """Compile it and see one turn work; None, with the reason in `skipped`, where it cannot."""
        compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
        if compiler is None:
            skipped["floor"] = "no C compiler (cc, gcc or clang) is installed"
            return None
        floor = cls(home / "floor", home / "lower", home / "run")
        floor.run.mkdir(parents=True)
        spread(floor.run)  # as the service's own are
        for name in _PROGRAMS:
            host = Path("/", name)
            if host.is_symlink():
                (floor.lower / name).parent.mkdir(exist_ok=True)
                (floor.lower / name).symlink_to(os.readlink(host))
            else:
                (floor.lower / name).mkdir(parents=True)
        for name in ("proc", "tmp"):
            (floor.lower / name).mkdir()
        command = [compiler, "-O2", "-o", str(floor.program), str(_SOURCE)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            if built.returncode:
                raise OSError(built.stderr)
            floor.turns(1, 1)
        except OSError as error:
            skipped["floor"] = str(error)[-300:]
            return None
        return floor

    def turns(self, count: int, lanes: int) -> list[float]:
        """Milliseconds of `count` turns, `lanes` at a time.

        Raises:
            OSError: this host cannot make such a process; says at which step.
        """
        return self._times(self.lower, self.run, count, lanes)

    def plain_turns(self, count: int, lanes: int) -> list[float]:
        """The same of a plain fork, exec and wait.

        Raises:
            OSError: as there.
        """
        return self._times(count, lanes)

    def _times(self, *words: object) -> list[float]:
        command = [str(part) for part in (self.program, *words)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise OSError(ended.stderr)
        return [int(line) / 1e6 for line in ended.stdout.split()]
