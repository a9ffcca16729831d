"""A stack for the length of one command: the one that runs, or one that is stopped again.

- Whoever comes first starts it and whoever leaves last stops it, also after one that was killed.
- Services that others run are used and left as they are.
- One that was asked for by name (`regreen up`) stays, also where a command had started it.
"""

import asyncio
import fcntl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO

from regreen.stack import control
from regreen.stack.layout import Layout

_POLL_S = 0.1


@asynccontextmanager
async def borrowed_stack(
    layout: Layout, progress: control.Progress | None = None
) -> AsyncIterator[None]:
    """The stack of this home, serving.

    Raises:
        As `control.up`.
    """
    layout.make()
    with layout.open(layout.borrowers) as borrowers:
        await _join(borrowers)
        if control.describe(layout) is None and not layout.supervised():
            layout.open(layout.borrowed).close()
        try:
            await control.up(layout, progress=progress)
            yield
        finally:
            if layout.borrowed.exists() and _last(borrowers):
                await control.down(layout)


async def _join(borrowers: IO[str]) -> None:
    """Be counted; waits while the last one stops the stack."""
    while True:
        try:
            fcntl.flock(borrowers, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(_POLL_S)
        else:
            return


def _last(borrowers: IO[str]) -> bool:
    """Leave, or keep newcomers out if nobody else is there."""
    try:
        fcntl.flock(borrowers, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
