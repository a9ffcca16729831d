"""A home whose commands use services that others run."""

import asyncio
import json
import sys

import pytest

from regreen.cli.options import open_stack
from regreen.client.stack import Endpoints
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from regreen.stack import control
from regreen.stack.borrow import borrowed_stack
from regreen.stack.elsewhere import leave, use
from regreen.stack.layout import ELSEWHERE, Layout

NOBODY = {"judge": "127.0.0.1:1"}


async def test_up_waits_for_them_and_starts_nothing(tmp_path):
    layout = Layout(tmp_path)
    use(layout, "Compose", NOBODY)
    assert Endpoints.load(tmp_path).judge == "127.0.0.1:1"
    with pytest.raises(Unavailable, match=r"judge \(127.0.0.1:1\): not serving.*Compose"):
        await control.up(layout, timeout_s=0.0)
    assert not layout.supervised()
    (row,) = await control.status(layout)
    assert row.state == "starting"


async def test_they_are_not_stopped_from_here(tmp_path):
    layout = Layout(tmp_path)
    use(layout, "Compose", NOBODY)
    with pytest.raises(FailedPrecondition, match="are run by Compose"):
        await control.down(layout)
    with pytest.raises(FailedPrecondition, match="set it there"):
        await control.up(layout, arguments={"policy": ["--engine", "torch"]})
    leave(layout)
    assert await control.down(layout) is False


async def test_a_command_that_borrows_leaves_them_be(tmp_path, dataset_address):
    layout = Layout(tmp_path)
    use(layout, "Compose", {"dataset": dataset_address})
    async with borrowed_stack(layout):
        assert not layout.borrowed.exists()
    assert control.describe(layout) is not None


async def test_the_command_says_who_runs_them(tmp_path, dataset_address):
    use(Layout(tmp_path), "Compose (make down-docker)", {"dataset": dataset_address})
    asked = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "regreen.cli", "up", "--home", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await asked.communicate())[0].decode()
    assert asked.returncode == 0, said
    assert "these are run by Compose (make down-docker)" in said
    assert "regreen down" not in said


@pytest.mark.parametrize("theirs", [True, False])
async def test_only_what_may_come_back_is_waited_for(tmp_path, theirs):
    """Services that others run are begun anew by them; those of a stack that is gone by nobody."""
    layout = Layout(tmp_path)
    use(layout, "Kubernetes", NOBODY)
    if not theirs:
        found = json.loads(layout.description.read_text())
        del found[ELSEWHERE]
        layout.description.write_text(json.dumps(found))
    async with open_stack(tmp_path, patience_s=77.0) as stack:
        assert stack.judge.patience_s == (77.0 if theirs else 2.0)


def test_only_services_that_there_are(tmp_path):
    with pytest.raises(InvalidArgument, match="'jury' is unknown"):
        use(Layout(tmp_path), "Compose", {"jury": "127.0.0.1:1"})
