"""The `regreen` command in a process of its own, against services of a test."""

import asyncio
import json
import sys
from pathlib import Path


def stack_home(root: Path, **endpoints: str) -> Path:
    """A home that says where services are."""
    home = root / "stack"
    (home / "run").mkdir(parents=True)
    (home / "run" / "stack.json").write_text(json.dumps({"endpoints": endpoints}))
    return home


async def start(home: Path, *words: str) -> asyncio.subprocess.Process:
    """The running command."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from regreen.cli.main import main; main()", *words,
        "--home", str(home), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def regreen(home: Path, *words: str) -> tuple[int, str, str]:
    """Exit code and outputs of the command."""
    process = await start(home, *words)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()
