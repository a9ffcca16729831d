"""The calls that a front makes to the Kubernetes API, each repeated until it is settled.

- Over a client library (lightkube), loaded only when this backend is used.
- 429, 5xx and a broken connection are tried again with backoff, as long as the server says to
  wait, within a deadline; what is wrong with the request itself is raised at once.
- Creating what is there already (409) gives what is there, if it is this front's; deleting what is
  gone succeeds: so every call may be sent twice.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from regreen import kube_config
from regreen.rpc.errors import (
    AlreadyExists,
    InfraError,
    MissingDependency,
    RegreenError,
    Unavailable,
)
from regreen.rpc.logging import get
from sandbox_svc.fleet.manifests import AGENT_GROUP, AGENT_VERSION, INSTANCE, Manifest

_T = TypeVar("_T")
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
CONFIGURE = "run in a pod, set KUBECONFIG or give --kube-config"
"""Where a front learns of its cluster."""
_PATIENCE_S = 60.0
_WATCH_S = 120
"""A watch is ended by the server after so long, and begun anew."""
_AGENT_KINDS = {
    "SandboxTemplate": "sandboxtemplates",
    "SandboxWarmPool": "sandboxwarmpools",
    "SandboxClaim": "sandboxclaims",
}


class Gone(Exception):
    """A watch cannot go on from where it was; list again."""


class KubeApi:
    """One namespace of one cluster."""

    def __init__(self, config: Path | None, namespace: str, instance: str) -> None:
        """Read the configuration.

        Raises:
            MissingDependency: no client library, or no usable configuration.
        """
        found = kube_config.read(config, CONFIGURE)
        import httpx2
        import lightkube
        import lightkube.generic_resource as generic
        from lightkube.core.exceptions import ApiError
        from lightkube.resources.core_v1 import ConfigMap, Pod

        with kube_config.using(CONFIGURE):
            self._client = lightkube.AsyncClient(config=found, namespace=namespace or None)
        self._api_error, self._http_error = ApiError, httpx2.HTTPError
        self._kinds: dict[str, Any] = {"Pod": Pod, "ConfigMap": ConfigMap}
        for kind, plural in _AGENT_KINDS.items():
            self._kinds[kind] = generic.create_namespaced_resource(
                AGENT_GROUP, AGENT_VERSION, kind, plural
            )
        self._labels: dict[str, Any] = {INSTANCE: instance}
        self._log = get()

    async def close(self) -> None:
        """End the connections."""
        await self._client.close()

    async def has_agent_sandbox(self) -> bool:
        """Whether the cluster knows agent-sandbox's claims."""
        try:
            await self.list("SandboxClaim")
        except RegreenError as error:
            if error.metadata.get("code") in ("404", "403"):
                return False
            raise
        return True

    async def create(self, manifest: Manifest) -> Manifest:
        """Make an object, or find it made by this front.

        Raises:
            AlreadyExists: the name is taken by something else.
        """
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        resource = self._kinds[kind]
        try:
            made = await self._settled(
                f"create {kind} {name}",
                lambda: self._client.create(resource.from_dict(manifest)),
            )
        except AlreadyExists:
            present = await self.find(kind, name)
            if present is None:
                raise Unavailable(f"{kind} {name} is going; try again", retry_after_s=1.0) from None
            return present
        found: Manifest = made.to_dict()
        return found

    async def find(self, kind: str, name: str) -> Manifest | None:
        """One object of this front.

        Raises:
            AlreadyExists: the name is taken by something else.
        """
        try:
            found: Manifest = await self._settled(
                f"get {kind} {name}", lambda: self._got(kind, name)
            )
        except RegreenError as error:
            if error.metadata.get("code") == "404":
                return None
            raise
        labels = found["metadata"].get("labels") or {}
        if labels.get(INSTANCE) != self._labels[INSTANCE]:
            raise AlreadyExists(
                f"{kind} {name} is there and not of this front; choose another kube_name"
            )
        return found

    async def _got(self, kind: str, name: str) -> Manifest:
        found: Manifest = (await self._client.get(self._kinds[kind], name)).to_dict()
        return found

    async def replace(self, manifest: Manifest) -> Manifest | None:
        """Put an object in the place of the version that it names; None if that is no more."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            made = await self._settled(
                f"replace {kind} {name}",
                lambda: self._client.replace(self._kinds[kind].from_dict(manifest)),
            )
        except RegreenError as error:
            if error.metadata.get("code") in ("404", "409"):
                return None
            raise
        found: Manifest = made.to_dict()
        return found

    async def delete(self, kind: str, name: str, *, grace_s: int | None = None) -> None:
        """Remove an object with what it owns; an absent one is fine."""
        from lightkube.types import CascadeType

        try:
            await self._settled(
                f"delete {kind} {name}",
                lambda: self._client.delete(
                    self._kinds[kind], name, grace_period=grace_s, cascade=CascadeType.BACKGROUND
                ),
            )
        except RegreenError as error:
            if error.metadata.get("code") != "404":
                raise

    async def list(self, kind: str) -> tuple[str, Sequence[Manifest]]:
        """This front's objects of a kind, and the version of the list."""

        async def listed() -> tuple[str, Sequence[Manifest]]:
            found = self._client.list(self._kinds[kind], labels=self._labels, chunk_size=500)
            items = [item.to_dict() async for item in found]
            return str(found.resourceVersion), items

        return await self._settled(f"list {kind}", listed)

    async def watch(self, kind: str, version: str) -> AsyncIterator[tuple[str, Manifest]]:
        """Changes of this front's objects since a version, until something ends it.

        Raises:
            Gone: the version is too old, or the watch broke; list again.
        """
        events: Any = self._client.watch(
            self._kinds[kind],
            labels=self._labels,
            resource_version=version,
            server_timeout=_WATCH_S,
        )
        try:
            async for change, item in events:
                yield change, item.to_dict()
        except (self._http_error, ValueError) as error:
            raise Gone(str(error) or type(error).__name__) from error
        finally:
            await events.aclose()

    async def _settled(self, what: str, call: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat a call until the server has decided it."""
        loop = asyncio.get_running_loop()
        give_up_s, delay_s = loop.time() + _PATIENCE_S, 0.2
        while True:
            try:
                return await call()
            except self._api_error as error:
                problem = self._typed(what, error)
                code = int(error.status.code or 0)
                wait_s = _retry_after(error.response.headers if error.response else {})
                again = code in _AGAIN
            except self._http_error as error:
                problem = Unavailable(f"cannot {what}: {error or type(error).__name__}")
                wait_s, again = 0.0, True
            if not again or loop.time() + delay_s > give_up_s:
                raise problem
            self._log.info("asking the cluster again", why=problem.message)
            await asyncio.sleep(max(wait_s, delay_s * (0.5 + random.random())))
            delay_s = min(delay_s * 2, 10.0)

    def _typed(self, what: str, error: Any) -> RegreenError:
        status = error.status
        code, text = int(status.code or 0), f"cannot {what}: {status.message}"
        metadata = {"code": str(code), "reason": str(status.reason or "")}
        if code in _AGAIN:
            return Unavailable(text, metadata=metadata, retry_after_s=5.0)
        if code == 409 and status.reason == "AlreadyExists":
            return AlreadyExists(text, metadata=metadata)
        if code in (401, 403):
            return MissingDependency(
                f"{text}; give its account the role of docs/operations/kubernetes.md",
                metadata=metadata,
            )
        return InfraError(text, metadata=metadata)


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "")
    return min(float(text), 30.0) if text.isdigit() else 0.0
