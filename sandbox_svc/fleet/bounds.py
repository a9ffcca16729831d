"""What each tenant may have in a whole fleet: the front counts, for no worker knows of the others.

- A front counts the sandboxes and states that it knows of; sandboxes that have ended by themselves
  are looked for once a tenant seems to have as many as it may.
- Of several fronts each knows what was there when it began, and what went through it since.
- What a call makes is not known before: the one that goes over the bound of bytes is the last.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from regreen.common.v1 import QuotaUse
from regreen.rpc.errors import Unavailable
from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import charged, own
from sandbox_svc.fleet.registry import Registry, pages

_RETRY_S = 2.0
_MAKE_STATES = {
    "StateService/PrepareState",
    "StateService/ImportState",
    "ImageService/ImportImage",
    "SandboxService/SnapshotSandbox",
    "SandboxService/ForkSandbox",
}


class Bounds:
    """The quotas of one front."""

    def __init__(self, registry: Registry, quotas: Quotas) -> None:
        self._registry, self._quotas = registry, quotas
        self._starting: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def kept(self, name: str, request: Any = None) -> AsyncIterator[None]:
        """Around a call of a method.

        Raises:
            ResourceExhausted: what it makes is more than its tenant may have.
        """
        mine = charged()
        if name in _MAKE_STATES or getattr(request, "keep_state", False):
            self._quotas.check("state_bytes", self._registry.bytes_of(mine) + 1)
        count = 1 if name == "SandboxService/CreateSandbox" else 0
        count = request.count if name == "SandboxService/ForkSandbox" else count
        bound = self._quotas.mine().sandboxes
        if bound is None or not count:
            yield
            return
        if self._has(mine) + count > bound:
            await self._look(self._registry.sandboxes_of(mine))
        self._quotas.check("sandboxes", self._has(mine) + count, retry_after_s=_RETRY_S)
        self._starting[mine] += count
        try:
            yield
        finally:
            self._starting[mine] -= count

    async def uses(self) -> list[QuotaUse]:
        """What tenants have, and their bounds, as the present call sees it."""
        await self._look(self._registry.sandboxes_of(own()))
        has = self._registry.sandboxes_by_tenant() + self._starting
        return self._quotas.uses(sandboxes=has, state_bytes=self._registry.bytes_by_tenant())

    def _has(self, tenant: str) -> int:
        return len(self._registry.sandboxes_of(tenant)) + self._starting[tenant]

    async def _look(self, known: set[str]) -> None:
        """Forget those of the caller's sandboxes that have ended on workers that can be asked."""
        for worker in list(self._registry.ready.values()):
            with contextlib.suppress(Unavailable):
                listed = pages(worker, "SandboxService/ListSandboxes", "sandboxes")
                live = {sandbox.id async for sandbox in listed}
                for ended in self._registry.placed_on(worker.name, known) - live:
                    self._registry.forget_sandbox(ended)
