"""A sandbox that lives as long as the work that holds it.

- It is deleted when the work ends. Of a worker that was killed it expires within `HELD_S`, however
  long an episode may take: else the sandboxes of a few lost workers fill the service.
- One that is gone under the work is trouble of the platform.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING

import structlog

from regreen.client.kept import keep
from regreen.rpc.errors import NotFound, RegreenError, SandboxLost

if TYPE_CHECKING:
    from regreen.client.stack import Stack

HELD_S = 120.0
"""Longer than the service is usually away, and than a worker's own loop ever stands still."""
log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def held_sandbox(
    stack: "Stack", state_id: str, labels: Mapping[str, str], egress: Sequence[str] = ()
) -> AsyncIterator[str]:
    """The id of a new sandbox of a State.

    Raises:
        SandboxLost: it went away meanwhile.
        RegreenError: it cannot be made.
    """
    sandbox = await stack.sandbox.create_sandbox(
        state_id, labels=labels, egress=egress, ttl_s=HELD_S
    )
    keeper = asyncio.create_task(keep(stack.sandbox, sandbox.id, HELD_S))
    try:
        yield sandbox.id
    except NotFound as error:
        if await _is_gone(stack, sandbox.id):
            raise SandboxLost(f"sandbox {sandbox.id} is gone") from error
        raise
    finally:
        keeper.cancel()
        await discard(stack, sandbox.id)


async def discard(stack: "Stack", sandbox_id: str) -> None:
    """Delete a sandbox that is not needed any more."""
    try:
        await stack.sandbox.delete_sandbox(sandbox_id)
    except RegreenError as error:
        # It expires by itself; losing a finished rollout over this would be worse.
        log.warning("sandbox not deleted", sandbox_id=sandbox_id, error=str(error))


async def _is_gone(stack: "Stack", sandbox_id: str) -> bool:
    try:
        await stack.sandbox.get_sandbox(sandbox_id)
    except NotFound:
        return True
    return False
