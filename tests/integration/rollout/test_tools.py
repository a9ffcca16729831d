"""The tools in a real sandbox: short observations, whatever the policy asks for."""

import asyncio
import contextlib
from dataclasses import replace

import pytest
import pytest_asyncio

from regreen.common.v1 import CHANGE_KIND_ADD, MODE_ANY_FIX, FileChange
from regreen.dataset import v1 as pb
from regreen.rollout.calls import Call
from regreen.rollout.context import Budget
from regreen.rollout.facts import FactsCache
from regreen.rollout.tools import Workbench
from regreen.rpc.errors import InfraError
from regreen.sandbox import v1 as sandbox_pb
from tests.integration.rollout.world import kill_first_process

FACTS = FactsCache()
pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(world):
    async with world.playing([]) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(world, stack):
    """A workbench that tests may look at and litter."""
    async with opened(world, stack) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="session")
async def bench(world, stack):
    """A workbench of the test's own."""
    async with opened(world, stack) as found:
        yield found


@contextlib.asynccontextmanager
async def opened(world, stack):
    sandbox = await stack.sandbox.create_sandbox(world.task.state_id)
    facts = await FACTS.get(stack, world.task, sandbox.id)
    yield Workbench(stack, world.task, sandbox.id, facts, MODE_ANY_FIX, Budget(tool_s=20.0))
    await stack.sandbox.delete_sandbox(sandbox.id)


async def test_tasks_that_share_a_state_see_their_own_logs(world, stack):
    other = pb.Task()
    other.CopyFrom(world.task)
    other.error_log = "E   ImportError: cannot import name 'bye' from 'wordlib' (/other.py)\n"
    sandbox = await stack.sandbox.create_sandbox(world.task.state_id)
    found = [await FACTS.get(stack, task, sandbox.id) for task in (world.task, other)]
    assert [facts.error.imported for facts in found] == [("wordlib", "hello"), ("wordlib", "bye")]
    assert [FACTS.peek(task) for task in (world.task, other)] == found
    assert await FACTS.get(stack, world.task, "gone") is found[0]
    await stack.sandbox.delete_sandbox(sandbox.id)


async def test_facts_are_what_a_developer_sees(shared):
    facts = shared.facts
    assert (facts.package, facts.version) == ("greet", "1.0")
    assert facts.error is not None
    assert facts.error.imported == ("wordlib", "hello")
    assert facts.suspects(facts.error)[0] == "wordlib"
    assert facts.offered["wordlib"] == ("1.0", "2.0", "2.1")
    assert facts.lock.pins["wordlib"] == "2.0"


async def test_a_command_that_was_stopped_is_no_success(bench):
    bench.budget = replace(bench.budget, tool_s=1.0)
    for script, head, ok in (
        ("true", "exit 0", True),
        ("exit 3", "exit 3", False),
        ("sleep 60", "stopped: timeout", False),
        ("kill -9 $$", "stopped: signal", False),
    ):
        seen = await bench.call(Call("run_sh", "run_sh", {"cmd": script}))
        assert (seen.text, seen.ok) == (head, ok)


async def test_a_sandbox_that_dies_under_a_dependency_action_is_no_conflict(bench):
    slow = (
        "rm -f /work/env/bin/python; printf '#!/bin/sh\\nexec sleep 900\\n' > /work/env/bin/python"
    )
    script = f"{slow}; chmod +x /work/env/bin/python"
    assert (await bench.call(Call("run_sh", "run_sh", {"cmd": script}))).ok
    asked = Call("dependency_upgrade", "dependency_upgrade", {"name": "wordlib", "version": "1.0"})
    action = asyncio.create_task(bench.call(asked))
    await kill_first_process(bench.stack, bench.sandbox_id)
    with pytest.raises(InfraError):
        await action


async def test_feedback_may_stop_where_it_is_decided_and_grading_does_not(bench):
    bench.stop_early = True
    change = {"path": "early.txt", "content": "a diff that nobody has had validated whole"}
    await bench.call(Call("write_file", "write_file", change))
    seen = (await bench.call(Call("validate_and_build", "validate_and_build", {}))).text
    assert "1 failed, stopped there with 2 not run" in seen
    assert bench.last_validation.partial
    changes, _ = await bench.diff()
    whole = await bench.validate(changes)
    assert not whole.partial
    assert (whole.counts["failed"], whole.counts["passed"]) == (2, 1)
    assert whole.outcome == bench.last_validation.outcome


async def test_a_long_observation_of_a_failed_validation_shows_the_log(bench):
    usual = (await bench.call(Call("validate_and_build", "validate_and_build", {}))).text
    assert len(usual) <= bench.budget.observation_chars
    assert "end of the log" not in usual
    bench.budget = replace(bench.budget, observation_chars=4000)
    seen = await bench.call(Call("validate_and_build", "validate_and_build", {}))
    assert seen.text.startswith(usual + "\nend of the log:\n")
    assert len(usual) + 200 < len(seen.text) <= 4000


CASES = [
    ("read_file", {"path": "setup.cfg"}, True, ""),
    ("read_file", {"path": "greet/__init__.py", "start": 4}, True, "lines 4-"),
    ("read_file", {"path": "greet/__init__.py", "start": 999}, False, "the file has"),
    ("read_file", {"path": "nope"}, False, "error"),
    ("read_file", {"path": ""}, False, "give a path"),
    ("read_file", {"path": "a\0b"}, False, "give a path"),
    ("read_file", {"path": "../../../../etc"}, False, "error"),
    ("read_file", {"path": "/work/env/bin/python"}, False, "binary"),
    ("write_file", {"path": "../x", "content": ""}, False, "inside the repository"),
    ("write_file", {"path": "/etc/passwd", "content": "x"}, False, "inside the repository"),
    ("write_file", {"path": "tests", "content": "x"}, False, "error"),
    ("write_file", {"path": "new/deep/a.txt", "content": "é\n"}, True, "wrote 3 bytes"),
    ("find_files", {"glob": "**/*.py"}, True, "greet/__init__.py"),
    ("find_files", {"glob": "*.nothing"}, True, "no file matches"),
    ("find_files_with_text", {"text": "import hello"}, True, "greet/__init__.py:3"),
    ("find_files_with_text", {"text": ""}, False, "error"),
    ("run_sh", {"cmd": "echo out; echo err >&2; exit 3"}, False, "exit 3\nout\nerr"),
    ("run_sh", {"cmd": "yes | head -c 300000"}, True, "exit 0"),
    ("run_sh", {"cmd": "python -c 'import wordlib; print(wordlib.salute())'"}, True, "Hello"),
    ("dependency_upgrade", {"name": "Word_Lib"}, False, "did you mean wordlib"),
    ("dependency_upgrade", {"name": "wordlib"}, True, "installed 2.0; on offer: 1.0 2.0 2.1"),
    ("dependency_upgrade", {"name": "wordlib", "version": "2.0"}, True, "already at 2.0"),
    ("dependency_upgrade", {}, True, "wordlib: installed 2.0; on offer"),
    ("dependency_upgrade", {"version": "2.0"}, True, "wordlib is already at 2.0"),
    ("dependency_upgrade", {"name": "wordlib", "version": "7"}, False, "not on offer"),
    ("dependency_upgrade", {"name": "; rm -rf /", "version": "1"}, False, "unknown"),
    ("remove_dependency", {"name": "nothing"}, False, "unknown"),
    ("upgrade_gradle", {"version": "8.5"}, False, "no Gradle wrapper"),
    ("upgrade_gradle", {"version": "$(x)"}, False, "must look like"),
    ("ask_for_help", {"question": "hello"}, True, "no past fixes are known"),
]


@pytest.mark.parametrize(("key", "arguments", "ok", "told"), CASES)
async def test_observations(shared, key, arguments, ok, told):
    seen = await shared.call(Call(key, key, arguments))
    assert (seen.ok, told in seen.text) == (ok, True), seen.text
    assert len(seen.text) <= shared.budget.observation_chars


async def test_moving_a_package_moves_lock_and_environment_together(bench):
    async def do(key, /, **arguments):
        return await bench.call(Call(key, key, arguments))

    assert (await do("dependency_upgrade", name="wordlib", version="previous")).text.startswith(
        "wordlib 2.0 -> 1.0"
    )
    assert (
        "Hello"
        in (await do("run_sh", cmd="python -c 'import wordlib as w; print(w.hello())'")).text
    )
    changes, unified = await bench.diff()
    assert [c.path for c in changes] == ["requirements.lock"]
    assert "+wordlib==1.0" in unified
    assert (await do("validate_and_build")).ending == "passed"
    assert (await do("remove_dependency", name="wordlib")).ok
    assert not (await do("run_sh", cmd="python -c 'import wordlib'")).ok
    assert "No module named 'wordlib'" in (await do("validate_and_build")).text


async def test_a_lock_broken_by_hand_is_explained(bench):
    async def do(key, /, **arguments):
        return await bench.call(Call(key, key, arguments))

    await do("write_file", path="requirements.lock", content="wordlib>=1\n")
    seen = await do("dependency_upgrade", name="wordlib", version="1.0")
    assert not seen.ok
    assert "is no pin" in seen.text
    assert "rejected" in (await do("validate_and_build")).text
    await do("run_sh", cmd="rm requirements.lock")
    assert "is gone" in (await do("dependency_upgrade", name="wordlib", version="1.0")).text


async def test_rebuilding_without_an_edit_is_counted(bench):
    for expected in (0, 1, 2):
        await bench.call(Call("validate_and_build", "validate_and_build", {}))
        assert bench.rebuilds_without_edit == expected
    await bench.call(Call("write_file", "write_file", {"path": "a.txt", "content": "x"}))
    await bench.call(Call("validate_and_build", "validate_and_build", {}))
    assert bench.rebuilds_without_edit == 2


async def test_by_products_stay_out_of_the_diff(bench):
    command = (
        "mkdir -p greet/__pycache__ .pytest_cache && touch greet/__pycache__/a.pyc .pytest_cache/b"
    )
    await bench.call(Call("run_sh", "run_sh", {"cmd": command}))
    assert (await bench.diff())[0] == []


async def test_a_command_is_stopped_in_time(bench):
    bench.budget = replace(bench.budget, tool_s=1.0)
    seen = await bench.call(Call("run_sh", "run_sh", {"cmd": "sleep 60"}))
    assert "stopped: timeout" in seen.text


async def test_what_no_diff_can_hold_is_told_with_the_verdict(bench):
    await bench.call(Call("run_sh", "run_sh", {"cmd": "ln -s /etc/passwd users; mkfifo p"}))
    seen = (await bench.call(Call("validate_and_build", "validate_and_build", {}))).text
    told = "p (a pipe, a socket or a device), users (a symbolic link)"
    assert f"not applied (a diff has regular files alone): {told}" in seen
    _, unified = await bench.diff()
    assert "root:" not in unified


async def test_files_that_cannot_be_judged_never_stop_a_validation(bench):
    command = "touch \"$(printf 'a\\nb')\" 'c\\d'"
    made = await bench.call(Call("run_sh", "run_sh", {"cmd": command}))
    assert made.ok
    changes, unified = await bench.diff()
    assert changes == []
    assert "left out" in unified
    refused = await bench.validate([FileChange(path="a\nb", kind=CHANGE_KIND_ADD)])
    assert refused.outcome == sandbox_pb.VALIDATION_OUTCOME_REJECTED
    assert "changes[0].path" in refused.summary
