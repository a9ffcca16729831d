"""Sets of pins by uv: as of a day, and with as few moves as possible.

- Nothing of a package is built or run to resolve. One without wheels takes part by the
  requirements that its newest source archive of that day names.
- `settle` prefers the pins that there are: only what must move moves.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from regreen.lockfile import normalize
from regreen.mine.bisect import release_before
from regreen.mine.registry import Registry
from regreen.rpc.errors import NotFound
from regreen.tasks.complete import requires_of_sdist

TIMEOUT_S = 180.0
AT_ONCE = 3
"""Processes of uv."""
MOST_BUILT = 5
"""Packages without wheels in one set."""
_NO_WHEEL = re.compile(r"Wheels are required for `([^`]+)`")
_ALWAYS = "9999-12-31"


class Resolver:
    """uv against one index."""

    def __init__(self, uv: str, index_url: str, cache: Path, registry: Registry) -> None:
        self.uv, self.index_url, self.cache = uv, index_url, cache
        self.registry = registry
        self._room = asyncio.Semaphore(AT_ONCE)

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
        """Ask uv, and again with what it says has no wheel taken from source archives."""
        built: dict[str, str] = {}
        asked: list[str] = []
        while True:
            lines = [line for line in [*requirements, *asked] if _name(line) not in built]
            bounds = [line for line in constraints if _name(line) not in built]
            try:
                async with self._room:
                    found = await self._ask(lines, python, day, bounds, preferences or {}, built)
            except NotFound as error:
                said = " ".join(error.message.split())
                lost = {normalize(name) for name in _NO_WHEEL.findall(said)} - set(built)
                if not lost or len(built) + len(lost) > MOST_BUILT:
                    raise
                for name in sorted(lost):
                    every = [*requirements, *asked, *constraints]
                    held = (preferences or {}).get(name, "")
                    version, more = await self._source(name, every, python, day, held, error)
                    built[name] = version
                    asked += more
                continue
            return {**found, **built}

    async def _source(
        self,
        name: str,
        requirements: Sequence[str],
        python: str,
        day: str,
        held: str,
        error: NotFound,
    ) -> tuple[str, list[str]]:
        """The newest source release that is allowed, and what it requires."""
        allowed = SpecifierSet(f"=={held}") if held else SpecifierSet()
        for line in requirements:
            if _name(line) == name and not held:
                allowed &= Requirement(line).specifier
        try:
            every = await self.registry.files(name)
            fitting = [f for f in every if f.version and allowed.contains(f.version)]
            entry = release_before(fitting, day[:10] or _ALWAYS)
            if entry is None:
                raise error
            archive = await self.registry.sdist(name, entry.filename, entry.sha256)
        except NotFound as missing:
            raise error from missing
        return entry.version, requires_of_sdist(archive, python)

    async def _ask(
        self,
        requirements: Sequence[str],
        python: str,
        day: str,
        constraints: Sequence[str],
        preferences: dict[str, str],
        built: dict[str, str],
    ) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            out, bounds = Path(folder) / "out.txt", Path(folder) / "bounds.txt"
            without = Path(folder) / "without.txt"
            out.write_text("".join(f"{n}=={v}\n" for n, v in preferences.items()))
            bounds.write_text("\n".join([*constraints, ""]))
            without.write_text("".join(f"{name} ; python_version < '0'\n" for name in built))
            command = [
                self.uv, "pip", "compile", "-", "--no-header", "--no-annotate", "--quiet",
                # This interpreter is asked, since to look for others can take uv long.
                "--python", sys.executable, "--python-version", python,
                "--only-binary", ":all:", "--no-config",
                "--python-platform", "x86_64-manylinux_2_28", "--constraint", str(bounds),
                "--override", str(without), "--output-file", str(out),
                *(["--exclude-newer", day] if day else []),
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


def _name(line: str) -> str:
    try:
        return normalize(Requirement(line).name)
    except InvalidRequirement:
        return ""


def _pins(text: str) -> dict[str, str]:
    lines = (line.split(" ;")[0].strip() for line in text.splitlines())
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normalize(name.partition("[")[0]): version for name, _, version in pins}
