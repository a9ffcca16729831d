"""The parts of one sandbox service, built from its settings and taken down in order.

- Start: runtime (sweeps what a crash left), states, manager, builder, validator, actions, upkeep;
  stop: reversed.
- Validations wait for a place, which they hold as long as they run, whoever still waits for them;
  agents' sandboxes never wait, they are refused.
- This module knows no gRPC; the servicers translate and call it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from regreen.blobs import ready_blobs
from regreen.common.v1 import QuotaUse
from regreen.rpc.errors import InvalidArgument, NotFound, RegreenError
from regreen.rpc.logging import get
from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import sees_any
from sandbox_svc import egress_probe, fetches, metrics
from sandbox_svc.actions import Actions
from sandbox_svc.backends.base import Capability, Runtime
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import (
    Builder,
    EnvironmentSpec,
    FileChange,
    Prepared,
    Progress,
    nothing_installed,
)
from sandbox_svc.builders.interpreters import find_all
from sandbox_svc.builders.python import PythonBuilder
from sandbox_svc.builders.system import SystemBuilder
from sandbox_svc.egress import Egress
from sandbox_svc.executions import Executions
from sandbox_svc.images.store import Images
from sandbox_svc.sandboxes import Manager
from sandbox_svc.selfcheck import SelfCheck
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.state_records import State, state_id
from sandbox_svc.states import StateStore
from sandbox_svc.transfer import Transfer
from sandbox_svc.upkeep import Upkeep
from sandbox_svc.validate import Validation, ValidationOptions, Validator
from sandbox_svc.warm import WarmPool
from sandbox_svc.wheelhouse import DistStore
from sandbox_svc.workers import Workers


def make_runtime(settings: SandboxSettings) -> Runtime:
    """The runtime that the settings name."""
    home = settings.home / "sandbox"
    if settings.backend == "docker":
        from sandbox_svc.backends.docker import DockerRuntime
        from sandbox_svc.backends.docker_pool import PoolSize

        return DockerRuntime(
            home,
            image=settings.docker_image,
            oci_runtime=settings.docker_runtime,
            defaults=settings.limits(),
            pool=PoolSize(settings.docker_pool, settings.docker_pool_total),
        )
    return EmbeddedRuntime(home, defaults=settings.limits(), warm_seats=settings.warm_seats)


class SandboxHost:
    """Everything behind the two servicers; use as an async context manager."""

    def __init__(
        self,
        settings: SandboxSettings,
        runtime: Runtime | None = None,
        builders: Sequence[Builder] = (),
        egress: Egress | None = None,
    ) -> None:
        self.settings = settings
        self.runtime = runtime or make_runtime(settings)
        home = settings.home / "sandbox"
        quotas = self._quotas = Quotas(settings.quotas)
        self.states = StateStore(home, self.runtime, quotas=quotas)
        self.egress = egress or settings.make_egress()
        self.manager = Manager(
            self.runtime, self.states, pool=settings.pool(), egress=self.egress, quotas=quotas
        )
        self.executions = Executions(self.manager, max_kept=settings.max_executions)
        self.self_check = SelfCheck(
            self.runtime,
            home,
            period_s=settings.self_check_s,
            doors=lambda: self.egress.open_for,
            live=self.manager.with_doors,
        )
        self.proven: tuple[Capability, ...] = ()
        """What was proven of the service beside its runtime."""
        bounds: Any = {"max_bytes": settings.import_bytes, "idle_s": settings.transfer_idle_s}
        self.transfer = Transfer(self.states, self.runtime, self._offered, **bounds)
        self.upkeep = Upkeep(
            self.states, self.runtime, self.manager.stood_on, time.time, settings.upkeep()
        )
        self.actions = Actions(
            self.states,
            self.runtime,
            home,
            limits=settings.actions(),
            defaults=settings.limits(),
        )
        self.images = Images(self.states, self.runtime, **bounds)
        self._dists, self._tools = home / "dists", home / "tools"
        self._builders = {builder.name: builder for builder in builders}
        self._validator: Validator | None = None
        self.warm: WarmPool | None = None
        self._places = asyncio.Semaphore(settings.max_validations)
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as parts:
            await self._start(parts)
            self._parts = parts.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._parts.aclose()

    async def _start(self, parts: contextlib.AsyncExitStack) -> None:
        """Start the parts one after the other; each is closed before what it stands on."""
        with metrics.uncounted():
            await self.runtime.start()
        parts.push_async_callback(self.runtime.close)
        for name, remedy in self.runtime.unkept().items():
            if name in self.settings.model_fields_set:
                get().warning("nothing keeps this limit here", setting=name, remedy=remedy)
        await self.states.open()
        parts.push_async_callback(self.states.close)
        parts.push_async_callback(self.images.close)
        parts.push_async_callback(self.egress.close)
        await self.manager.start()
        parts.push_async_callback(self.manager.close)
        blobs = await ready_blobs(self.settings.blobs or self.settings.home / "blobs")
        python = PythonBuilder(DistStore(self._dists), self._tools, blobs)
        for builder in (python, SystemBuilder()):
            self._builders.setdefault(builder.name, builder)
        if self.runtime.capabilities():  # a runtime that was told to prove nothing has none
            with metrics.uncounted():
                proven = await egress_probe.prove(self.runtime, enabled=self.settings.egress)
            self.proven = (proven,)
        if self.runtime.name == "embedded" and self.settings.warm_states:
            home, kept = self.settings.home / "sandbox", self.settings.warm()
            self.warm = WarmPool(self.states, self.runtime, home, settings=kept)
            parts.push_async_callback(self.warm.close)
        await self.self_check.start()
        parts.push_async_callback(self.self_check.close)
        parts.push_async_callback(self.executions.close)
        self._validator = Validator(
            self.states, self.runtime, place=self._place, warm=self.warm, workers=self._workers()
        )
        parts.push_async_callback(self._validator.close)
        parts.push_async_callback(self.actions.close)
        await self.actions.open()
        parts.push_async_callback(self.upkeep.close)
        await self.upkeep.start()
        metrics.ACTIVE.set_function(self.manager.count)
        metrics.STATES.set_function(lambda: len(self.states.every()))

    def uses(self) -> list[QuotaUse]:
        """What tenants have of what their quotas bound, as the present call sees it."""
        has, state_bytes = self.manager.by_tenant(), self.states.owners.bytes_by_tenant()
        return self._quotas.uses(sandboxes=has, state_bytes=state_bytes)

    def _workers(self) -> Workers | None:
        """What shares the tests of a validation among forks, if that is asked for."""
        if self.runtime.name != "embedded" or self.settings.validation_workers < 2:
            return None
        home, limits = self.settings.home / "sandbox", self.settings.limits()
        kept = self.settings.workers()
        return Workers(self.states, self.runtime, home, limits=limits, settings=kept)

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places of validations."""
        with metrics.QUEUE_DEPTH.track_inprogress():
            await self._places.acquire()
        try:
            yield
        finally:
            self._places.release()

    def _offered(self) -> dict[str, Path]:
        """Directories of this host that states may mount."""
        roots = {"dists": self._dists.absolute(), "tools": self._tools.absolute()}
        return roots | {f"python{v}": found.prefix for v, found in find_all().items()}

    def interpreters(self) -> dict[str, str]:
        """Interpreters of this host: version to path."""
        return {version: str(found.executable) for version, found in find_all().items()}

    async def prepare(
        self, spec: EnvironmentSpec, *, rebuild: bool = False, progress: Progress | None = None
    ) -> State:
        """The state of a spec: found, or built once.

        Raises:
            InvalidArgument: no builder understands the spec, or it is malformed.
            MissingDependency: something that the spec names is not to be had here.
        """
        builder = self._builders.get(spec.builder)
        if builder is None:
            known = ", ".join(sorted(self._builders))
            raise InvalidArgument("spec.builder", f"{spec.builder!r} is unknown", f"use {known}")
        found = self.states.find(spec.digest)
        (metrics.STATE_CACHE_HITS if found and not rebuild else metrics.STATE_CACHE_MISSES).inc()

        async def build(report: Progress) -> Prepared:
            made = state_id("", spec.digest)
            allow, limits = self.settings.prepared_from(), self.settings.limits()
            way = fetches.Fetches(self.egress.ledger, made, allow)
            try:
                there = nothing_installed if rebuild else self.states.installed
                prepared = await builder.prepare(
                    spec, self.runtime, limits, report, way, installed=there
                )
            finally:
                way.close()
            asked = {fetches.METADATA: way.encode()}
            return replace(prepared, metadata={**prepared.metadata, **asked})

        try:
            return await self.states.prepare(spec.digest, build, rebuild=rebuild, progress=progress)
        except RegreenError:
            self.egress.ledger.share(state_id("", spec.digest))  # it may have been another's run
            raise

    def asked(self, sandbox_id: str) -> Sequence[Mapping[str, Any]]:
        """What a sandbox asked of the network, oldest first.

        Raises:
            NotFound: it has asked for nothing that is still kept.
        """
        return [record.facts() for record in self.egress.ledger.list(sandbox_id)]

    def fetched(self, wanted: str) -> Sequence[Mapping[str, Any]]:
        """What was asked of the network to prepare a state, oldest first.

        Raises:
            NotFound: nothing is known of it.
        """
        state = self.states.peek(wanted)
        if state is None or not sees_any(state.tenants):
            return self.asked(wanted)
        if fetches.METADATA not in state.metadata:
            raise NotFound(
                f"no preparation of state {wanted} is on record: it was imported, or prepared "
                "before requests were recorded"
            )
        return fetches.decode(state.metadata[fetches.METADATA])

    async def delete_state(self, state_id: str) -> None:
        """Forget a state and the layers that only it uses; others' stay, and are theirs.

        Raises:
            FailedPrecondition: sandboxes run on it.
        """
        if self.warm is not None and self.states.owners.goes(state_id):
            await self.warm.drop(state_id)
        await self.manager.delete_state(state_id)

    async def validate(
        self,
        state_id: str,
        changes: Sequence[FileChange],
        options: ValidationOptions,
        *,
        skip_cache_lookup: bool = False,
    ) -> Validation:
        """The verdict on a diff, computed in a fresh fork of its state."""
        if self._validator is None:
            raise RuntimeError("the host was not started")
        state = self.states.runnable(state_id)
        began = time.monotonic()
        verdict = await self._validator.validate(
            state.id, changes, options, skip_cache_lookup=skip_cache_lookup
        )
        if verdict.cached:
            metrics.VALIDATION_CACHE_HITS.inc()
        metrics.VALIDATE_SECONDS.labels(verdict.outcome.value).observe(time.monotonic() - began)
        return verdict
