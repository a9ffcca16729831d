"""Keeping a sandbox alive: it lives as long as whoever uses it, and not much longer.

- Whoever dies cannot delete; what it held goes when its time to live is over. So that is short, and
  moved on by the living.
"""

import asyncio

import structlog

from regreen.client.sandbox import SandboxClient
from regreen.rpc.errors import NotFound, RegreenError

_log = structlog.get_logger(__name__)


async def keep(sandboxes: SandboxClient, sandbox_id: str, ttl_s: float) -> None:
    """Move a sandbox's expiry on, three times in each time to live, until it is gone.

    A call that fails is logged, and the next one tries again.
    """
    while True:
        await asyncio.sleep(ttl_s / 3)
        try:
            await sandboxes.keep_alive(sandbox_id, ttl_s=ttl_s)
        except NotFound:
            return  # the next call of who uses it says so
        except RegreenError as error:
            _log.warning("keep alive failed", sandbox_id=sandbox_id, error=str(error))
