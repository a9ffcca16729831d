"""Sets of pins by uv: as of a day, and with as few moves as possible.

- Wheels only: nothing of a package is built or run to resolve.
- `settle` prefers the pins that there are: only what must move moves.
"""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from regreen.lockfile import normalize
from regreen.rpc.errors import NotFound

TIMEOUT_S = 180.0


class Resolver:
    """uv against one index."""

    def __init__(self, uv: str, index_url: str, cache: Path) -> None:
        self.uv, self.index_url, self.cache = uv, index_url, cache

    async def as_of(
        self, requirements: Sequence[str], python: str, day: str, constraints: Sequence[str] = ()
    ) -> dict[str, str]:
        """The newest set as the index was when `day` began.

        Raises:
            NotFound: there is no such set; ends with the resolver's reasons.
        """
        return await self._compile(requirements, python, day=day, constraints=constraints)

    async def newest(
        self, requirements: Sequence[str], python: str, constraints: Sequence[str] = ()
    ) -> dict[str, str]:
        """The newest set of today; raises as `as_of`."""
        return await self._compile(requirements, python, constraints=constraints)

    async def settle(
        self,
        requirements: Sequence[str],
        python: str,
        pins: dict[str, str],
        move: tuple[str, str],
    ) -> dict[str, str]:
        """`pins` with one package moved, and with it what must; raises as `as_of`."""
        lines = [r for r in requirements if normalize(r.partition("[")[0].strip()) != move[0]]
        extra = [r for r in requirements if r not in lines and "[" in r]
        moved = f"{extra[0].strip() if extra else move[0]}=={move[1]}"
        return await self._compile([*lines, moved], python, preferences=pins)

    async def _compile(
        self,
        requirements: Sequence[str],
        python: str,
        *,
        day: str = "",
        constraints: Sequence[str] = (),
        preferences: dict[str, str] | None = None,
    ) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            out, bounds = Path(folder) / "out.txt", Path(folder) / "bounds.txt"
            out.write_text("".join(f"{n}=={v}\n" for n, v in (preferences or {}).items()))
            bounds.write_text("\n".join([*constraints, ""]))
            command = [
                self.uv, "pip", "compile", "-", "--no-header", "--no-annotate", "--quiet",
                "--python-version", python, "--only-binary", ":all:", "--no-config",
                "--python-platform", "x86_64-manylinux_2_28", "--constraint", str(bounds),
                "--output-file", str(out), *(["--exclude-newer", day] if day else []),
            ]  # fmt: skip
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={
                    **os.environ,
                    "UV_DEFAULT_INDEX": self.index_url,
                    "UV_CACHE_DIR": str(self.cache),
                },
            )
            try:
                text = "\n".join(requirements).encode()
                _, err = await asyncio.wait_for(process.communicate(text), TIMEOUT_S)
            except TimeoutError as error:
                process.kill()
                await process.wait()
                raise NotFound(f"uv took longer than {TIMEOUT_S:.0f} s") from error
            if process.returncode:
                raise NotFound(err.decode("utf-8", "replace")[-600:])
            return _pins(out.read_text("utf-8"))


def _pins(text: str) -> dict[str, str]:
    lines = (line.split(" ;")[0].strip() for line in text.splitlines())
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normalize(name.partition("[")[0]): version for name, _, version in pins}
