"""Keeps the wanted number of workers in a cluster and tells which of them are ready.

- What is there is read by a list and a watch from its version; when the watch breaks, or its
  version is too old, by a list again, and anew now and then whatever happens.
- Where the cluster knows agent-sandbox, a worker is a SandboxClaim out of a SandboxWarmPool, and
  its pod that of the Sandbox which the claim names; else a plain pod. Scheduling is the cluster's.
- Workers of an earlier front of this name are taken over if they have the spec wanted now, and
  removed if not; so are those that ended for good.
- A pod whose process began anew has lost its sandboxes; its states are still in its volume.
- Fronts of one name agree: equal ones on which workers stay, by an order that all of them see; of
  different ones the last to start, whose wish stands in the anchor. The others go on serving with
  the workers that are left to them, and remove nothing.
- Nothing that the cluster answers ends the watch or the care for the number of workers.
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
_TRIES = 5
_ROUND_S = 5.0
"""The wanted number is looked after at least so often."""
_GRACE_S = 10
_SHORT_S = 5.0
"""A watch that broke after less than this is begun anew with a growing delay."""


class KubeWorkers:
    """The workers of one front."""

    def __init__(self, plan: Plan, changed: Callable[[Sequence[Endpoint]], None]) -> None:
        self._plan, self._changed = plan, changed
        self._api = KubeApi(plan.settings.kube_config, plan.settings.kube_namespace, plan.instance)
        self._pods: dict[str, Manifest] = {}
        self._owner: Manifest = {}
        self._bound: dict[str, str] = {}
        """Claims to their Sandboxes; a name that a claim shows no more for a moment stays known."""
        self._claims, self._mine = False, True
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
        await self._claim_name()
        if self._claims:
            await self._ensure_pool()
            await self._list_claims()
        await self._list()
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._look_after())]

    async def _claim_name(self) -> None:
        """Have the anchor say what this front wants, whatever a former one wanted."""
        wanted = self._plan.anchor(self._claims)
        anchor = await self._api.create(wanted)
        for _ in range(_TRIES):
            if anchor.get("data") == wanted["data"]:
                break
            version = {"resourceVersion": _meta(anchor).get("resourceVersion")}
            changed = wanted | {"metadata": wanted["metadata"] | version}
            anchor = await self._api.replace(changed) or await self._api.create(wanted)
        self._owner = _owner(anchor)

    async def _is_mine(self) -> bool:
        """Whether the workers of this name are this front's to look after.

        An anchor that somebody removed, with all that it owned, is made again.
        """
        wanted = self._plan.anchor(self._claims)
        there = await self._api.find("ConfigMap", self._plan.instance)
        anchor = there or await self._api.create(wanted)
        self._owner = _owner(anchor)
        mine = bool(anchor.get("data") == wanted["data"])
        if not mine and self._mine:
            self._log.warning("another front took the name", front=self._plan.instance)
        self._mine = mine
        return mine

    async def close(self) -> None:
        """Stop; the workers go too unless they shall stay, or are another front's by now."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            keep = self._plan.settings.kube_keep_workers
            if self._owner and not keep and await self._is_mine():
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
        self._stir.set()
        return version

    async def _follow(self) -> None:
        """Keep `_pods` as the cluster has it."""
        delay_s = 0.0
        while True:
            await asyncio.sleep(delay_s)
            began_s = asyncio.get_running_loop().time()
            try:
                version = await self._list()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RESYNC_S):
                        await self._watch(version)
            except Gone as error:
                self._log.info("watch ended", why=str(error))
            except Exception as error:  # noqa: BLE001  (blind for good is worse than any answer)
                self._log.warning("cannot read workers", why=str(error), kind=type(error).__name__)
            lasted_s = asyncio.get_running_loop().time() - began_s
            delay_s = 0.2 if lasted_s > _SHORT_S else min(max(delay_s * 2, 0.2), 15.0)

    async def _watch(self, version: str) -> None:
        async for change, pod in self._api.watch("Pod", version):
            if change == "DELETED":
                self._pods.pop(_name(pod), None)
            elif change in ("ADDED", "MODIFIED"):
                self._pods[_name(pod)] = pod
            else:
                continue
            self._tell()
            self._stir.set()

    def _tell(self) -> None:
        mine = [pod for pod in self._pods.values() if _label(pod, SPEC) == self._plan.digest]
        self._changed([_endpoint(pod) for pod in mine if self._serves(pod)])

    def _serves(self, pod: Manifest) -> bool:
        """Whether a pod is, or will again be, a worker."""
        if _meta(pod).get("deletionTimestamp") or _ended(pod):
            return False
        if self._claims:
            return _controller(pod) in self._bound.values()
        return _label(pod, WORKER) == "true"

    async def _list_claims(self) -> Sequence[Manifest]:
        """The claims that there are; notes which Sandboxes they have."""
        claims = (await self._api.list("SandboxClaim"))[1]
        fits = [claim for claim in claims if _label(claim, SPEC) == self._plan.digest]
        known = self._bound
        self._bound = {}
        for claim in fits:
            found = (_status(claim).get("sandbox") or {}).get("name") or known.get(_name(claim))
            if found and not _meta(claim).get("deletionTimestamp"):
                self._bound[_name(claim)] = str(found)
        if self._bound != known and self._tasks:  # the first that is told is all that there is
            self._tell()
        return claims

    async def _look_after(self) -> None:
        """Bring the number of workers to what is wanted, again and again."""
        while True:
            try:
                claims = await self._list_claims() if self._claims else ()
                if await self._is_mine():
                    await (self._tend_claims(claims) if self._claims else self._tend_pods())
            except Exception as error:  # noqa: BLE001  (no answer of the cluster may end the care)
                problem = {"why": str(error), "kind": type(error).__name__}
                self._log.warning("cannot bring workers to their number", **problem)
                await asyncio.sleep(1.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ROUND_S):
                    await self._stir.wait()
            self._stir.clear()

    async def _tend_pods(self) -> None:
        plain = [pod for pod in self._pods.values() if not _controller(pod)]
        good, bad = self._sorted_out(plain, over=_ended)
        for pod in bad:
            await self._api.delete("Pod", _name(pod), grace_s=_GRACE_S)
            self._pods.get(_name(pod), pod)["metadata"].setdefault("deletionTimestamp", "asked")
        for _ in range(self._plan.settings.kube_workers - len(good)):
            pod = await self._make(self._plan.pod)
            self._pods.setdefault(_name(pod), pod)

    async def _ensure_pool(self) -> None:
        """Have the pool that claims take from, also after somebody removed it."""
        for manifest in (self._plan.template(self._owner), self._plan.warm_pool(self._owner)):
            if await self._api.find(manifest["kind"], self._plan.pool_name) is None:
                await self._api.create(manifest)

    async def _tend_claims(self, claims: Sequence[Manifest]) -> None:
        await self._ensure_pool()
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
            if not _controller(pod) and not _meta(pod).get("deletionTimestamp"):
                await self._api.delete("Pod", _name(pod), grace_s=_GRACE_S)

    def _sorted_out(
        self, items: Any, *, over: Callable[[Manifest], bool]
    ) -> tuple[list[Manifest], list[Manifest]]:
        """Those to keep and those to remove; what is going already is neither."""
        there = [item for item in items if not _meta(item).get("deletionTimestamp")]
        fits = [i for i in there if _label(i, SPEC) == self._plan.digest and not over(i)]
        fits.sort(key=_seniority)
        wanted = self._plan.settings.kube_workers
        keep = fits[:wanted]
        kept = {_name(item) for item in keep}
        return keep, [item for item in there if _name(item) not in kept]

    async def _make(self, manifest: Callable[[str, Manifest], Manifest]) -> Manifest:
        for _ in range(_TRIES):
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


def _seniority(item: Manifest) -> tuple[bool, str, str]:
    """Which workers stay where there are too many: the oldest, before those that never began."""
    began = _status(item) and _status(item).get("phase") != "Pending"
    return not began, str(_meta(item).get("creationTimestamp")), _name(item)


def _controller(pod: Manifest) -> str:
    """The object that keeps a pod, as a Sandbox does that of a claim; empty when it is ours."""
    owners = _meta(pod).get("ownerReferences") or ()
    return next((str(owner["name"]) for owner in owners if owner.get("controller")), "")


def _ended(pod: Manifest) -> bool:
    return _status(pod).get("phase") in ("Failed", "Succeeded")


def _claim_ended(claim: Manifest) -> bool:
    conditions = _status(claim).get("conditions") or ()
    return any(c.get("type") == "Finished" and c.get("status") == "True" for c in conditions)


def _container(pod: Manifest) -> Manifest:
    statuses = _status(pod).get("containerStatuses") or ()
    return next((s for s in statuses if s.get("name") == CONTAINER), {})


def _endpoint(pod: Manifest) -> Endpoint:
    address = str(_status(pod).get("podIP") or "")  # none before it starts, and while it restarts
    host = f"[{address}]" if ":" in address else address
    return Endpoint(
        name=_name(pod),
        incarnation=str(_meta(pod).get("uid")),
        process=str(_container(pod).get("restartCount", 0)),
        address=f"{host}:{GRPC_PORT}",
        ready=bool(address) and _is_ready(pod),
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
