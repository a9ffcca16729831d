"""The scripted baselines: what they write, and what the mode forbids them to move."""

import json

import pytest

from regreen.common.v1 import MODE_ANY_FIX, MODE_KEEP_NEW
from regreen.dataset import v1 as pb
from regreen.lockfile import lock_of, parse_lock
from regreen.rollout.actors import View
from regreen.rollout.baselines import baseline
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.facts import Facts
from regreen.rollout.toolset import load_toolset

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


async def written(name: str, mode: int) -> dict[str, str]:
    """The pins that a baseline writes in its first turn."""
    spec = EpisodeSpec(mode=mode)
    view = View((), 100, 0, "trj", spec, load_toolset(), FACTS, None)
    text = await baseline(name, TASK).decide(view)
    tools = load_toolset()
    body = json.loads(text.removeprefix(tools.call_open).removesuffix(tools.call_close))
    return dict(parse_lock(body["arguments"]["content"].encode()).pins)


@pytest.mark.parametrize(
    ("name", "mode", "pins"),
    [
        ("pin-back", MODE_ANY_FIX, {"work-zeug": "2.0", "jinja2": "2.11"}),
        ("pin-back", MODE_KEEP_NEW, {"work-zeug": "3.0", "jinja2": "2.11"}),
        ("newest", MODE_ANY_FIX, {"work-zeug": "4.0", "jinja2": "3.2", "newcomer": "1.0"}),
        ("newest", MODE_KEEP_NEW, {"work-zeug": "3.0", "jinja2": "3.2", "newcomer": "1.0"}),
    ],
)
async def test_a_held_pin_is_never_moved(name, mode, pins):
    assert await written(name, mode) == pins
