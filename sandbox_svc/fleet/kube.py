"""Keeps the wanted number of workers in a cluster and tells which of them are ready.

- What is there is read by a list and a watch from its version; when the watch breaks, or its
  version is too old, by a list again, and anew now and then whatever happens.
- Where the cluster knows agent-sandbox, a worker is a SandboxClaim out of a SandboxWarmPool; else
  a plain pod. Scheduling is the cluster's.
- Workers of an earlier front of this name are taken over if they have the spec wanted now, and
  removed if not; so are those that ended for good.
- A pod whose process began anew has lost its sandboxes; its states are still in its volume.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from regreen.rpc.errors import AlreadyExists, InfraError, MissingDependency, RegreenError
from regreen.rpc.logging import get
from sandbox_svc.fleet.calls import Endpoint
from sandbox_svc.fleet.kube_api import Gone, KubeApi
from sandbox_svc.fleet.manifests import CONTAINER, GRPC_PORT, SPEC, WORKER, Manifest, Plan

_RESYNC_S = 300.0
_ROUND_S = 5.0
"""The wanted number is looked after at least so often."""
_GRACE_S = 10


class KubeWorkers:
    """The workers of one front."""

    def __init__(self, plan: Plan, changed: Callable[[Sequence[Endpoint]], None]) -> None:
        self._plan, self._changed = plan, changed
        self._api = KubeApi(plan.settings.kube_config, plan.settings.kube_namespace, plan.instance)
        self._pods: dict[str, Manifest] = {}
        self._owner: Manifest = {}
        self._claims = False
        self._stir = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._log = get()

    async def start(self) -> None:
        """Find or make what the cluster should hold, and begin to look after it.

        Raises:
            MissingDependency: the account may not, or the cluster has no agent-sandbox.
            Unavailable: the cluster does not answer.
        """
        wanted = self._plan.settings.kube_api
        self._claims = wanted != "pods" and await self._api.has_agent_sandbox()
        if wanted == "agent-sandbox" and not self._claims:
            raise MissingDependency(
                "kube_api: the cluster does not know agent-sandbox's SandboxClaim, or this account "
                "may not list it; install it or use --kube-api pods"
            )
        anchor = await self._api.create(self._plan.anchor())
        self._owner = _owner(anchor)
        if self._claims:
            await self._api.create(self._plan.template(self._owner))
            await self._api.create(self._plan.warm_pool(self._owner))
        await self._list()
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._look_after())]

    async def close(self) -> None:
        """Stop; the workers go too unless they shall stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            if self._owner and not self._plan.settings.kube_keep_workers:
                await self._remove_all()
        except RegreenError as error:
            self._log.warning("workers left in the cluster", why=str(error))
        finally:
            await self._api.close()

    async def _remove_all(self) -> None:
        for kind in ("SandboxWarmPool", "SandboxClaim", "SandboxTemplate") if self._claims else ():
            for item in (await self._api.list(kind))[1]:
                await self._api.delete(kind, _name(item))
        for pod in (await self._api.list("Pod"))[1]:
            await self._api.delete("Pod", _name(pod), grace_s=_GRACE_S)
        await self._api.delete("ConfigMap", self._plan.instance)

    def explain(self) -> str:
        """Why workers are not ready, for people."""
        told = [f"{name}: {_trouble(pod)}" for name, pod in sorted(self._pods.items())]
        return "; ".join(told[:5]) or "the cluster has made no pod yet"

    async def _list(self) -> str:
        version, pods = await self._api.list("Pod")
        self._pods = {_name(pod): pod for pod in pods}
        self._tell()
        return version

    async def _follow(self) -> None:
        """Keep `_pods` as the cluster has it."""
        delay_s = 0.0
        while True:
            await asyncio.sleep(delay_s)
            try:
                version = await self._list()
                delay_s = 0.2
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RESYNC_S):
                        await self._watch(version)
            except Gone as error:
                self._log.info("watch ended", why=str(error))
            except RegreenError as error:
                self._log.warning("cannot read workers", why=str(error))
                delay_s = min(max(delay_s, 0.5) * 2, 15.0)

    async def _watch(self, version: str) -> None:
        async for change, pod in self._api.watch("Pod", version):
            if change == "DELETED":
                self._pods.pop(_name(pod), None)
            elif change in ("ADDED", "MODIFIED"):
                self._pods[_name(pod)] = pod
            else:
                continue
            self._tell()

    def _tell(self) -> None:
        mine = [pod for pod in self._pods.values() if _label(pod, SPEC) == self._plan.digest]
        self._changed([_endpoint(pod) for pod in mine if _serves(pod)])
        self._stir.set()

    async def _look_after(self) -> None:
        """Bring the number of workers to what is wanted, again and again."""
        while True:
            try:
                await (self._tend_claims() if self._claims else self._tend_pods())
            except RegreenError as error:
                self._log.warning("cannot bring workers to their number", why=str(error))
                await asyncio.sleep(1.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ROUND_S):
                    await self._stir.wait()
            self._stir.clear()

    async def _tend_pods(self) -> None:
        good, bad = self._sorted_out(self._pods.values(), over=_ended)
        for pod in bad:
            await self._api.delete("Pod", _name(pod), grace_s=_GRACE_S)
            self._pods.get(_name(pod), pod)["metadata"].setdefault("deletionTimestamp", "asked")
        for _ in range(self._plan.settings.kube_workers - len(good)):
            pod = await self._make(self._plan.pod)
            self._pods.setdefault(_name(pod), pod)

    async def _tend_claims(self) -> None:
        claims = (await self._api.list("SandboxClaim"))[1]
        good, bad = self._sorted_out(claims, over=_claim_ended)
        for claim in bad:
            await self._api.delete("SandboxClaim", _name(claim))
        for _ in range(self._plan.settings.kube_workers - len(good)):
            await self._make(self._plan.claim)
        await self._sweep_pools()

    async def _sweep_pools(self) -> None:
        """Remove pools and templates of other specs, and pods that are no claim's."""
        for kind in ("SandboxWarmPool", "SandboxTemplate"):
            for item in (await self._api.list(kind))[1]:
                if _name(item) != self._plan.pool_name:
                    await self._api.delete(kind, _name(item))
        for pod in list(self._pods.values()):
            controlled = any(o.get("controller") for o in _meta(pod).get("ownerReferences") or ())
            if not controlled and not _meta(pod).get("deletionTimestamp"):
                await self._api.delete("Pod", _name(pod), grace_s=_GRACE_S)

    def _sorted_out(
        self, items: Any, *, over: Callable[[Manifest], bool]
    ) -> tuple[list[Manifest], list[Manifest]]:
        """Those to keep and those to remove; what is going already is neither."""
        there = [item for item in items if not _meta(item).get("deletionTimestamp")]
        fits = [i for i in there if _label(i, SPEC) == self._plan.digest and not over(i)]
        fits.sort(key=lambda i: (not _is_ready(i), str(_meta(i).get("creationTimestamp"))))
        wanted = self._plan.settings.kube_workers
        keep = fits[:wanted]
        kept = {_name(item) for item in keep}
        return keep, [item for item in there if _name(item) not in kept]

    async def _make(self, manifest: Callable[[str, Manifest], Manifest]) -> Manifest:
        for _ in range(5):
            name = f"{self._plan.instance}-{secrets.token_hex(4)}"
            try:
                made = await self._api.create(manifest(name, self._owner))
            except AlreadyExists:
                continue
            self._log.info("worker asked for", worker=name)
            return made
        raise InfraError("five names in a row were taken")


def _owner(anchor: Manifest) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": anchor["metadata"]["name"],
        "uid": anchor["metadata"]["uid"],
    }


def _meta(item: Manifest) -> Manifest:
    found: Manifest = item.get("metadata") or {}
    return found


def _name(item: Manifest) -> str:
    return str(_meta(item)["name"])


def _label(item: Manifest, name: str) -> str:
    return str((_meta(item).get("labels") or {}).get(name, ""))


def _status(item: Manifest) -> Manifest:
    found: Manifest = item.get("status") or {}
    return found


def _is_ready(item: Manifest) -> bool:
    conditions = _status(item).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def _ended(pod: Manifest) -> bool:
    return _status(pod).get("phase") in ("Failed", "Succeeded")


def _claim_ended(claim: Manifest) -> bool:
    conditions = _status(claim).get("conditions") or ()
    return any(c.get("type") == "Finished" and c.get("status") == "True" for c in conditions)


def _serves(pod: Manifest) -> bool:
    """Whether a pod is, or will again be, a worker."""
    claimed = _label(pod, WORKER) == "true"
    going = _meta(pod).get("deletionTimestamp") or _ended(pod)
    return bool(claimed and not going and _status(pod).get("podIP"))


def _container(pod: Manifest) -> Manifest:
    statuses = _status(pod).get("containerStatuses") or ()
    return next((s for s in statuses if s.get("name") == CONTAINER), {})


def _endpoint(pod: Manifest) -> Endpoint:
    address = str(_status(pod)["podIP"])
    host = f"[{address}]" if ":" in address else address
    return Endpoint(
        name=_name(pod),
        incarnation=str(_meta(pod).get("uid")),
        process=str(_container(pod).get("restartCount", 0)),
        address=f"{host}:{GRPC_PORT}",
        ready=_is_ready(pod),
    )


def _trouble(pod: Manifest) -> str:
    status, container = _status(pod), _container(pod)
    for state in (container.get("state") or {}, container.get("lastState") or {}):
        for kind in ("waiting", "terminated"):
            if found := state.get(kind):
                return f"{found.get('reason', kind)} {found.get('message', '')}".strip()
    for condition in status.get("conditions") or ():
        if condition.get("status") == "False" and condition.get("message"):
            return str(condition["message"])
    return str(status.get("phase", "no status"))
