"""Applies rules in a process of its own, since what they read is written by strangers.

- A parser may end the process that it runs in: nested brackets are enough. It ends this one.
- The process has bounded memory and time, gets texts on its input and gives texts back; it opens
  no file and imports nothing of what it reads.
- A file that ends it, alone, is a file that no rule applies to. Files that are looked at alone
  share as much time as all had together; none has more than a quarter of it.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A text and the rules to apply to it, in their order."""

    text: str
    rules: Sequence[str]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A text as rules left it, and those that changed it."""

    text: str
    rules: tuple[str, ...]


async def rewrite(files: Mapping[str, Wanted]) -> dict[str, Rewritten]:
    """The files as rules leave them, by path; those that cannot be read are not among them."""
    if not files:
        return {}
    now = asyncio.get_running_loop().time
    found = await _run(files, now() + TIMEOUT_S)
    if found is not None:
        return found
    if len(files) == 1:
        return {}
    every: dict[str, Rewritten] = {}
    end_s = now() + TIMEOUT_S
    for path, wanted in files.items():
        one_s = min(end_s, now() + TIMEOUT_S / 4)
        every.update(await _run({path: wanted}, one_s) or {})
    return every


async def _run(files: Mapping[str, Wanted], end_s: float) -> dict[str, Rewritten] | None:
    """What one process makes of the files; None if it did not live to say."""
    asked = json.dumps({path: [one.text, list(one.rules)] for path, one in files.items()})
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-m", "regreen.rules"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout_at(end_s):
            out, _ = await process.communicate(asked.encode("ascii"))
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        return None
    return {path: Rewritten(text, tuple(rules)) for path, (text, rules) in json.loads(out).items()}
