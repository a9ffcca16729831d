"""A task that asks for hosts: its rollouts reach them, recorded; its validations reach nothing."""

import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from regreen.common.v1 import (
    CHANGE_KIND_MODIFY,
    GRADER_BUILD_GATES,
    PIPELINE_FULL,
    PIPELINE_SIMPLIFIED,
    FileChange,
)
from regreen.dataset import v1 as pb
from regreen.rollout.context import FULL, SIMPLIFIED, EpisodeSpec
from regreen.rollout.episode import Runner
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, MissingDependency, NotFound
from regreen.sandbox import v1 as sandbox_pb
from tests.integration.rollout.world import PIN, VALIDATE, World, call, open_world, says
from tests.integration.sandbox.egressing import Seen, web

pytestmark = pytest.mark.asyncio(loop_scope="module")
HOST = "127.0.0.2"
"""What clients leave to a proxy, unlike 127.0.0.1."""
PIPELINES = [(PIPELINE_SIMPLIFIED, SIMPLIFIED), (PIPELINE_FULL, FULL)]
ASK = """
import os, socket, urllib.request
def ask(url):
    try:
        return urllib.request.urlopen(url, timeout=10).read().decode()
    except OSError:
        return "nothing"
"""


@dataclass(frozen=True)
class Networked:
    """A service that may give a way to a server of the test, and to no other host."""

    world: World
    seen: Seen

    @property
    def place(self) -> str:
        return f"{HOST}:{self.seen.port}"

    async def task(self, stack, *egress: str) -> pb.Task:
        """The task, with hosts that its rollouts may reach, prepared."""
        task = pb.Task()
        task.CopyFrom(self.world.task)
        task.environment.egress.extend(egress)
        async for event in stack.state.prepare_state(task.environment):
            task.state_id = event.state.id or task.state_id
        return task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def networked() -> AsyncIterator[Networked]:
    home = Path(tempfile.mkdtemp(prefix="regreen-network-"))
    home.chmod(0o711)
    try:
        async with web(b"the manual", host=HOST) as seen:
            allowed = {"egress_private": "127.0.0.0/8", "egress_hosts": f"{HOST}:{seen.port}"}
            async with open_world(home, **allowed) as world:
                yield Networked(world, seen)
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def looking(url: str) -> str:
    """A call of the policy that asks for an address."""
    return call(
        "run_sh", cmd=f"python -c \"import urllib.request as u;print(u.urlopen('{url}').read())\""
    )


@pytest.mark.parametrize(("pipeline", "budget"), PIPELINES)
async def test_a_rollout_reaches_what_its_task_asks_for(networked, pipeline, budget):
    spec = EpisodeSpec(pipeline=pipeline, grader=GRADER_BUILD_GATES, budget=budget)
    place, port = networked.place, networked.seen.port
    networked.seen.heads.clear()
    asks = looking(f"http://{place}/a"), looking(f"http://127.0.0.3:{port}/b")
    async with networked.world.playing(says(*asks, PIN, VALIDATE)) as stack:
        task = await networked.task(stack, place)
        assert task.state_id != networked.world.task.state_id
        with structlog.testing.capture_logs() as logs:
            found = await Runner(stack).run(task, spec)
        assert found.reward.solved
        told = [turn.text for turn in found.turns if turn.role == pb.TURN_ROLE_TOOL]
        assert "b'the manual'" in told[0]
        assert "403" in told[1]
        (sandbox,) = {log["sandbox_id"] for log in logs if log["event"] == "egress"}
        records = [record async for record in stack.egress.egress_records(sandbox)]
    assert [(r.host, r.port, r.allowed) for r in records] == [
        (HOST, port, True),
        ("127.0.0.3", port, False),
    ]
    assert records[0].received_sha256 == hashlib.sha256(b"the manual").hexdigest()
    assert [head.split()[1] for head in networked.seen.heads] == [b"/a"]


async def test_without_the_wish_a_rollout_has_no_network(networked):
    networked.seen.heads.clear()
    ask = looking(f"http://{networked.place}/a")
    async with networked.world.playing(says(ask, PIN, VALIDATE)) as stack:
        spec = EpisodeSpec(grader=GRADER_BUILD_GATES)
        found = await Runner(stack).run(networked.world.task, spec)
        told = [turn.text for turn in found.turns if turn.role == pb.TURN_ROLE_TOOL]
        assert "Connection refused" in told[0]
    assert networked.seen.heads == []


async def test_the_validations_of_such_a_task_have_no_way_out(networked):
    networked.seen.heads.clear()
    nosy = (
        f"{ASK}\n"
        "def proxy():\n"
        "    try: socket.create_connection(('127.0.0.1', 3128), 3); return 'a proxy'\n"
        "    except OSError as error: return error.errno\n"
        "given = [name for name in os.environ if 'proxy' in name]\n"
        f"seen = ask('http://{networked.place}/c'), proxy(), given\n"
        "raise RuntimeError(f'saw {seen}')\n"
    )
    change = FileChange(path="greet/__init__.py", kind=CHANGE_KIND_MODIFY, content=nosy.encode())
    async with networked.world.playing([]) as stack:
        task = await networked.task(stack, networked.place)
        for _ in range(2):  # the second one may find an interpreter that was started ahead
            verdict = await stack.sandbox.validate(
                task.state_id, [change], skip_cache_lookup=True, timeout_s=60
            )
            assert "saw ('nothing', 111, [])" in verdict.log
        state = await stack.state.get_state(task.state_id)
        assert "network" not in state.baseline.log
        assert [r async for r in stack.egress.egress_records(state_id=state.id)] == []
    assert networked.seen.heads == []


async def test_more_than_the_operator_allows_is_refused_and_says_so(networked):
    async with networked.world.playing([]) as stack:
        task = await networked.task(stack, networked.place, "pypi.org")
        with pytest.raises(FailedPrecondition, match=r"pypi\.org on 80 and 443.*egress_hosts"):
            await Runner(stack).run(task, EpisodeSpec(grader=GRADER_BUILD_GATES))
        task.environment.egress.append("http://pypi.org")
        with pytest.raises(InvalidArgument, match=r"spec\.egress\[2\].*give names such as"):
            [_ async for _ in stack.state.prepare_state(task.environment)]
        with pytest.raises(NotFound):
            await stack.egress.list_egress("sbx_" + "0" * 32)


async def test_the_hosts_are_part_of_the_spec_and_none_changes_nothing(networked):
    async with networked.world.playing([]) as stack:
        same = sandbox_pb.EnvironmentSpec()
        same.CopyFrom(networked.world.task.environment)
        *_, last = [event async for event in stack.state.prepare_state(same)]
        assert last.state.id == networked.world.task.state_id
        one, other = [await networked.task(stack, *hosts) for hosts in (("a.test",), ("b.test",))]
        assert len({one.state_id, other.state_id, last.state.id}) == 3
