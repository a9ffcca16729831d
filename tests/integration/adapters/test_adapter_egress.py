"""What commands of an adapter's sandbox reach: what its configuration says, or its task."""

import json
from pathlib import Path

import pytest

from dataset_svc.__main__ import serving as dataset_serving
from dataset_svc.settings import DatasetSettings
from regreen.adapters.held import HeldSandbox, SandboxConfig
from regreen.client.channel import connect
from regreen.client.dataset import TaskClient
from regreen.client.egress import EgressClient
from regreen.common.v1 import MODE_ANY_FIX
from regreen.dataset import v1 as dataset_pb
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
from tests.integration.adapters.conftest import HERE, Script, World
from tests.integration.sandbox.egressing import Seen, web

pytestmark = pytest.mark.asyncio(loop_scope="module")
HOST = "127.0.0.2"
"""What clients leave to a proxy, unlike 127.0.0.1."""


def asking(seen: Seen, path: str) -> str:
    """A command that asks the server of a test."""
    url = f"http://{HOST}:{seen.port}/{path}"
    return f"python3 -c \"import urllib.request as u; print(u.urlopen('{url}').read())\" 2>&1"


async def said(config: SandboxConfig, command: str) -> tuple[str, bytes]:
    """The id of a sandbox, and what a command printed in it."""
    box = await HeldSandbox.open(config)
    try:
        return box.id, (await box.run(["sh", "-c", command])).stdout.head
    finally:
        await box.close()


async def test_commands_reach_the_hosts_of_the_configuration(world: World) -> None:
    async with web(b"the manual", host=HOST) as seen, connect(world.address) as channel:
        config = SandboxConfig(address=world.address, state_id=world.state_id)
        _, without = await said(config, asking(seen, "a"))
        assert b"Connection refused" in without
        allowing = config.model_copy(update={"egress": [f"{HOST}:{seen.port}"]})
        id, found = await said(allowing, asking(seen, "b"))
        assert found == b"b'the manual'\n"
        (record,) = [record async for record in EgressClient(channel).egress_records(id)]
        assert (record.host, record.port, record.path) == (HOST, seen.port, "/b")
        with pytest.raises(InvalidArgument, match=r"egress\.allow\[0\]"):
            await said(config.model_copy(update={"egress": ["http://x"]}), "true")
    assert [head.split()[1] for head in seen.heads] == [b"/b"]
    assert await world.count() == 0


async def test_by_default_the_hosts_are_those_of_the_task(
    world: World, database_url: str, tmp_path: Path
) -> None:
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, drain_s=1.0, fsync=False
    )
    async with (
        web(b"the manual", host=HOST) as seen,
        dataset_serving(settings, database_url) as server,
        connect(server.address) as channel,
    ):
        task = dataset_pb.Task(
            id="asking-1.0",
            kind="dependency-upgrade",
            environment=pb.EnvironmentSpec(
                builder="system",
                package="asking",
                version="1.0",
                python="3.11",
                source=pb.DistFile(filename="asking-1.0.tar.gz", sha256="ab" * 32),
                egress=[f"{HOST}:{seen.port}"],
            ),
            modes=[MODE_ANY_FIX],
            fail_to_pass_count=1,
            split="train",
        )
        await TaskClient(channel).import_tasks([task])
        config = SandboxConfig(
            address=world.address, task_id=task.id, dataset_address=server.address
        )
        assert (await said(config, asking(seen, "a")))[1] == b"b'the manual'\n"
        none = config.model_copy(update={"egress": []})
        assert b"Connection refused" in (await said(none, asking(seen, "b")))[1]
    assert [head.split()[1] for head in seen.heads] == [b"/a"]


@pytest.mark.registry
async def test_the_frameworks_own_configuration_takes_the_key(world: World, script: Script) -> None:
    async with web(b"the manual", host=HOST) as seen:
        environment = {
            "address": world.address,
            "state_id": world.state_id,
            "egress": [f"{HOST}:{seen.port}"],
        }
        given = {
            "environment": environment,
            "actions": [[{"command": asking(seen, "a")}, "", None]],
        }
        told = json.loads(await script(HERE / "mini_driver.py", given=given))["outputs"]
        assert told[0]["output"] == "b'the manual'\n"
        config = json.dumps({"type": "regreen", **environment})
        fields = {"command": asking(seen, "b"), "shell": True}
        requests = [
            ["start", None, {}],
            ["execute", "Command", fields],
            ["stop", None, {}],
        ]
        told = json.loads(await script(HERE / "rex_driver.py", config, given=requests))["answers"]
        assert told[1]["stdout"] == "b'the manual'\n"
    assert [head.split()[1] for head in seen.heads] == [b"/a", b"/b"]
