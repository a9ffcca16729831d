"""A sandbox service on a socket of its own, and states made of a few files."""

import pytest

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common import v1 as common_pb
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.base import Limits, Runtime
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import (
    EnvironmentSpec,
    Installed,
    Prepared,
    Progress,
    Stage,
    check_overlay,
    lay_over,
    nothing_installed,
)
from sandbox_svc.fetches import Fetches
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings


class OverlayBuilder:
    """Builds a state from a spec's overlay files alone."""

    name = "overlay"
    builds = 0

    async def prepare(
        self,
        spec: EnvironmentSpec,
        runtime: Runtime,
        limits: Limits,
        progress: Progress,
        fetches: Fetches | None = None,
        installed: Installed = nothing_installed,
    ) -> Prepared:
        check_overlay(spec)
        OverlayBuilder.builds += 1
        box = await runtime.create([], limits=limits)
        try:
            for number, change in enumerate(spec.overlay):
                progress(Stage("build", number, len(spec.overlay), change.path))
                await lay_over(box, number, change)
            if spec.package == "broken":
                raise InvalidArgument("spec.package", "is broken", "use another")
            return Prepared((await box.freeze(),), (), {"SPEC": spec.package}, {"python": "3.11"})
        finally:
            await box.delete()


@pytest.fixture
async def service(tmp_path):
    settings = SandboxSettings(
        home=tmp_path / "home",
        listen=f"unix:{tmp_path}/s",
        metrics="127.0.0.1:0",
        max_sandboxes=4,
        drain_s=0.2,
    )
    runtime = EmbeddedRuntime(tmp_path / "home" / "sandbox", run_probes=False, warm_seats=1)
    host = SandboxHost(settings, runtime, [OverlayBuilder()])
    async with serving(settings, host) as server:
        channel = connect(server.address)
        yield StateClient(channel, patience_s=0.0), SandboxClient(channel, patience_s=0.0), server
        await channel.close()


def spec(**files: str) -> pb.EnvironmentSpec:
    overlay = [
        common_pb.FileChange(path=path, kind=common_pb.CHANGE_KIND_ADD, content=text.encode())
        for path, text in files.items()
    ]
    return pb.EnvironmentSpec(builder="overlay", package="demo", python="3.11", overlay=overlay)


async def prepared(states: StateClient, **files: str) -> pb.State:
    events = [event async for event in states.prepare_state(spec(**files))]
    return events[-1].state
