"""What the policy service serves while something is measured or repaired, and afterwards."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection

from regreen.client.stack import Stack
from regreen.rpc.errors import RegreenError
from regreen.train.weights import resolve_weights

_RESTORE_S = 60.0


@contextlib.asynccontextmanager
async def serving_again(stack: Stack, versions: Collection[int]) -> AsyncIterator[None]:
    """Have the policy serve at the end what it served at the start.

    `versions` are those that the block may load. Best effort: nothing is done where another client
    has switched to something else, or the service does not answer.

    Raises:
        RegreenError: the policy service does not answer at the start.
    """
    if not versions:
        yield
        return
    before = (await stack.policy.get_policy()).policy
    try:
        yield
    finally:
        with contextlib.suppress(RegreenError, TimeoutError):
            async with asyncio.timeout(_RESTORE_S):
                now = (await stack.policy.get_policy()).policy.version
                if now != before.version and now in versions:
                    await stack.policy.load_version(before, allow_older=True)


@contextlib.asynccontextmanager
async def serving(stack: Stack, name: str) -> AsyncIterator[None]:
    """Have "base" or a training run's weights served meanwhile; without a name, whatever serves.

    Raises:
        InvalidArgument: no run of that name, or it has no checkpoint yet.
    """
    if not name:
        yield
        return
    weights = await resolve_weights(stack, name)
    async with serving_again(stack, {weights.version}):
        await stack.policy.load_version(weights.to_policy(), allow_older=True)
        yield
