"""The scripted baselines: what they say, turn by turn, to what the tools answer."""

import pytest

from regreen.dataset import v1 as pb
from regreen.lockfile import lock_of, parse_lock
from regreen.rollout.actors import View
from regreen.rollout.baselines import NAMES, baseline
from regreen.rollout.calls import Call, parse_call
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.facts import Facts
from regreen.rollout.tools import Observation
from regreen.rollout.toolset import load_toolset
from regreen.rpc.errors import InvalidArgument

TASK = pb.Task(
    culprit="Work_Zeug",
    culprit_version="3.0",
    moved={"Work_Zeug": "2.0 3.0", "jinja2": "2.11 3.1", "newcomer": "None 1.0"},
)
FACTS = Facts(
    "mine",
    "1",
    "3.11",
    "",
    None,
    lock=lock_of({"work-zeug": "3.0", "jinja2": "3.1", "newcomer": "1.0"}),
    offered={"work-zeug": ("2.0", "3.0", "4.0"), "jinja2": ("2.11", "3.1", "3.2")},
)
TOOLS = load_toolset()
DONE = Observation("done")
RED = Observation("NOT GREEN (failed): 1 failed")
HELD = Observation(
    "NOT GREEN (rejected)\nwork-zeug must stay at 3.0 in this task, the lock has 4.0"
)
MOVED = Observation("work-zeug 3.0 -> 2.0")
OLDEST = Observation("error: nothing older than 2.0", ok=False)


async def calls(name: str, *answers: Observation, task: pb.Task = TASK) -> list[Call]:
    """The calls of a baseline that hears these answers, and its next one."""
    script = baseline(name, task)
    history: list[tuple[Call, Observation]] = []
    for answer in (*answers, DONE):
        turn = len(history)
        view = View((), 100, turn, "trj", EpisodeSpec(), TOOLS, FACTS, None, history)
        history.append((parse_call(await script.decide(view), TOOLS), answer))
    return [call for call, _ in history]


def pins(call: Call) -> dict[str, str]:
    assert (call.key, call.text("path")) == ("write_file", "requirements.lock")
    return dict(parse_lock(call.text("content")).pins)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("newest", {"work-zeug": "4.0", "jinja2": "3.2", "newcomer": "1.0"}),
        ("pin-back", {"work-zeug": "2.0", "jinja2": "2.11"}),
    ],
)
async def test_a_lock_is_written_once_and_again_without_what_is_held(name, wanted):
    first, validate, end = await calls(name, DONE, RED)
    assert pins(first) == wanted
    assert (validate.key, end.key) == ("validate_and_build", "give_up")
    first, _, second, validate, end = await calls(name, DONE, HELD, DONE, RED)
    assert (pins(first), pins(second)) == (wanted, {**wanted, "work-zeug": "3.0"})
    assert (validate.key, end.key) == ("validate_and_build", "give_up")


async def test_previous_moves_what_is_looked_at_first_until_nothing_moves():
    said = await calls("previous", MOVED, RED, MOVED, RED, OLDEST)
    keys = ["dependency_upgrade", "validate_and_build"] * 2 + ["dependency_upgrade", "give_up"]
    assert [call.key for call in said] == keys
    assert said[0].arguments == said[2].arguments == {"version": "previous"}


async def test_noop_only_validates():
    assert [call.key for call in await calls("noop", RED)] == ["validate_and_build", "give_up"]


@pytest.mark.parametrize("name", ["noop", "newest", "previous"])
async def test_only_pin_back_reads_the_record(name):
    answers = (DONE, HELD, DONE, RED)
    assert await calls(name, *answers) == await calls(name, *answers, task=pb.Task())


def test_an_unknown_baseline_is_refused_with_those_there_are():
    with pytest.raises(InvalidArgument, match="use one of " + ", ".join(NAMES)):
        baseline("oldest", TASK)
