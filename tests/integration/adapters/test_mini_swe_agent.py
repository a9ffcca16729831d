"""mini-swe-agent's own agent and models, unchanged, in a Regreen sandbox."""

import json
import platform

import pytest

from tests.integration.adapters.conftest import HERE, ROOT, Script, World

pytestmark = [pytest.mark.registry, pytest.mark.asyncio(loop_scope="module")]
DRIVER = HERE / "mini_driver.py"
SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def config(world: World, **more: object) -> dict[str, object]:
    return {"address": world.address, "state_id": world.state_id, **more}


async def test_an_agent_repairs_a_file_and_submits(world: World, script: Script) -> None:
    commands = [
        "python3 check.py",
        "sed -i 's/a - b/a + b/' mathlib.py",
        "cd /tmp && export LOST=1",
        "pwd; echo ${LOST-unset}; python3 check.py",
        f"echo {SUBMIT} && cat mathlib.py",
    ]
    given = {"environment": config(world), "agent": commands}
    told = json.loads(await script(DRIVER, given=given))
    assert told["result"] == {
        "exit_status": "Submitted",
        "submission": "def add(a, b):\n    return a + b\n",
    }
    observations = told["observations"]
    assert observations[0].startswith("<returncode>1</returncode>")
    assert "AssertionError: -1" in observations[0]
    assert observations[1] == "<returncode>0</returncode>\n<output>\n</output>"
    assert "/work/repo\nunset\nok\n" in observations[3]
    assert f"on Linux {platform.machine()}" in told["task"]
    saved = told["saved"]["info"]
    assert saved["exit_status"] == "Submitted"
    assert saved["config"]["environment"]["state_id"] == world.state_id
    assert saved["config"]["environment"]["sandbox_id"].startswith("sbx_")
    assert saved["config"]["environment_type"].endswith("mini_swe_agent.RegreenEnvironment")
    assert await world.count() == 0


async def test_what_commands_do_is_told_as_the_frameworks_own_environments_tell_it(
    world: World, script: Script
) -> None:
    actions = [
        [{"command": "echo out; echo err >&2; exit 3"}, "", None],
        [{"command": "echo part; exec sleep 60"}, "", 0.5],
        [{"command": "echo after; pwd; echo $GREETING"}, "", None],
        [{"command": "pwd"}, "/tmp", None],
        [{"command": "pwd"}, "/no/such/place", None],
        [{"command": "printf 'a\\377b'"}, "", None],
        [{"command": f"echo {SUBMIT}; false"}, "", None],
        [{"command": f"echo; echo {SUBMIT}; echo mine"}, "", None],
        [{"command": "kill -9 $$"}, "", None],
        [{"command": "yes | head -c 300000"}, "", None],
        [{"command": "echo \0"}, "", None],
        [{"command": "echo \ud800"}, "", None],
        [{"command": "rm -r /work/repo"}, "", None],
        [{"command": "pwd"}, "", None],
    ]
    given = {
        "environment": config(world, env={"GREETING": "hello"}, output_bytes=1 << 16, timeout=20),
        "actions": actions,
    }
    told = json.loads(await script(DRIVER, given=given))["outputs"]
    assert told[0] == {"output": "out\nerr\n", "returncode": 3, "exception_info": ""}
    assert told[1]["output"] == "part\n"
    assert told[1]["returncode"] == -1
    assert "timed out after 0.5 seconds" in told[1]["exception_info"]
    assert told[1]["extra"]["exception_type"] == "TimeoutError"
    assert told[2]["output"] == "after\n/work/repo\nhello\n"
    assert told[3]["output"] == "/tmp\n"
    assert told[4]["returncode"] == -1
    assert "/no/such/place" in told[4]["exception_info"]
    assert told[5]["output"] == "a\ufffdb"
    assert told[6]["returncode"] == 1
    assert told[7]["submitted"][0]["extra"] == {"exit_status": "Submitted", "submission": "mine\n"}
    assert told[8]["returncode"] == 137
    assert len(told[9]["output"]) < 70_000
    assert "bytes dropped" in told[9]["output"]
    for number in (10, 11, 13):
        assert told[number]["returncode"] == -1
        assert told[number]["exception_info"]
    assert await world.count() == 0


async def test_limits_are_the_sandboxes_and_wrong_ones_are_named(
    world: World, script: Script
) -> None:
    given = {
        "environment": config(world, limits={"pids": 16}),
        "actions": [[{"command": "sh -c 'for i in $(seq 40); do sleep 9 & done'"}, "", 15]],
    }
    (told,) = json.loads(await script(DRIVER, given=given))["outputs"]
    assert "fork" in told["output"]
    for wrong, said in (
        ({"limits": {"memory": 1}}, "limits: no limit 'memory'"),
        ({"task_id": "both"}, "state_id: give it or task_id"),
        ({"state_id": "st_" + "0" * 32}, "st_" + "0" * 32),
        ({"unknown": 1}, "unknown"),
    ):
        given = {"environment": config(world, **wrong), "actions": []}
        told = json.loads(await script(DRIVER, given=given))
        assert said in told["refused"]
    assert await world.count() == 0


async def test_a_process_that_forgets_to_clean_up_leaves_no_sandbox(
    world: World, script: Script
) -> None:
    given = {"environment": config(world), "actions": [[{"command": "true"}, "", None]]}
    told = json.loads(await script(DRIVER, "--forget", given=given))
    assert told["outputs"][0]["returncode"] == 0
    assert await world.count() == 0


async def test_the_example(world: World, script: Script) -> None:
    printed = await script(ROOT / "examples" / "mini_swe_agent_env.py", world.address)
    assert printed.endswith("Submitted 'echo $(($1 + $2))\\n'\n")
    assert "<returncode>0</returncode>\n<output>\n-1\n</output>" in printed
    assert await world.count() == 0
