"""A stand-in cluster whose pods are real sandbox services, and a front over it."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common import v1 as common_pb
from regreen.rpc.errors import NotFound, Unavailable
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.settings import SandboxSettings
from tests.fixtures import kube, kubelet


@dataclass
class Front:
    """A running front and its clients."""

    states: StateClient
    sandboxes: SandboxClient
    settings: SandboxSettings
    address: str


@dataclass
class World:
    """A cluster with one node."""

    cluster: kube.Cluster
    kubelet: kubelet.Kubelet
    home: Path
    kubeconfig: Path

    def settings(self, **options: Any) -> SandboxSettings:
        given = {
            "backend": "kubernetes",
            "home": self.home / "front",
            "listen": "127.0.0.1:0",
            "metrics": "127.0.0.1:0",
            "drain_s": 0.2,
            "kube_config": self.kubeconfig,
            "kube_start_s": 90.0,
            "warm_seats": 1,
            "max_sandboxes": 8,
        }
        return SandboxSettings(**(given | options))

    @contextlib.asynccontextmanager
    async def front(
        self, patience_s: float = 0.0, access: Access | None = None, **options: Any
    ) -> AsyncIterator[Front]:
        settings = self.settings(**options)
        async with serving(settings) as server:
            channel = connect(server.address, access)
            async with asyncio.timeout(60):
                while ready_workers() < settings.kube_workers:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            try:
                yield Front(
                    StateClient(channel, patience_s=patience_s),
                    SandboxClient(channel, patience_s=patience_s),
                    settings,
                    server.address,
                )
            finally:
                await channel.close()


@contextlib.asynccontextmanager
async def world(volume_bytes: int = 0, **options: Any) -> AsyncIterator[World]:
    """A cluster with one node, gone at the end; `volume_bytes` bounds the volumes of pods."""
    home = Path(tempfile.mkdtemp(prefix="regreen-kube-"))
    home.chmod(0o711)
    cluster = kube.Cluster(**options)
    try:
        async with (
            kube.running(cluster, home / "kubeconfig"),
            kubelet.node(cluster, home, volume_bytes) as node,
        ):
            yield World(cluster, node, home, home / "kubeconfig")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain() -> AsyncIterator[World]:
    """A cluster that knows nothing but core kinds."""
    pytest.importorskip("lightkube", reason="regreen[kubernetes] is not installed")
    async with world() as found:
        yield found


def ready_workers() -> int:
    """How many workers the front of this process counts as ready."""
    labels = {"state": "ready"}
    return int(REGISTRY.get_sample_value("regreen_sandbox_workers", labels) or 0)


def spec(text: str) -> pb.EnvironmentSpec:
    """A state of one file."""
    change = common_pb.FileChange(
        path="notes.txt", kind=common_pb.CHANGE_KIND_ADD, content=text.encode()
    )
    return pb.EnvironmentSpec(builder="system", overlay=[change])


async def prepared(front: Front, text: str) -> pb.State:
    """The state of `spec(text)`, through the front."""
    events = [event async for event in front.states.prepare_state(spec(text))]
    return events[-1].state


async def eventually(check, within_s: float = 30.0):
    """The first true answer of `check`, which may be refused meanwhile."""
    give_up = time.monotonic() + within_s
    while True:
        try:
            if found := await check():
                return found
        except Unavailable:
            pass
        assert time.monotonic() < give_up, "did not happen"
        await asyncio.sleep(0.05)


def pods(world) -> dict[str, dict]:
    return {pod["metadata"]["name"]: pod for pod in world.cluster.all("pods")}


async def holding(world, state_id: str) -> set[str]:
    """Pods whose service, asked itself, has a state."""
    found = set()
    for name, pod in pods(world).items():
        channel = connect(f"{pod['status']['podIP']}:50052")
        with contextlib.suppress(NotFound, Unavailable):
            await StateClient(channel, patience_s=0.0).get_state(state_id)
            found.add(name)
        await channel.close()
    return found
