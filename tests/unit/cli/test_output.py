"""What commands print: one honest estimate, text as it is."""

import io

import pytest
from rich.console import Console

from regreen.cli import output
from regreen.cli.listen import listener
from regreen.train.progress import Progress


@pytest.fixture
def printed(monkeypatch):
    found = io.StringIO()
    monkeypatch.setattr(output, "STDERR", Console(file=found, width=200))
    monkeypatch.setattr(output, "STDOUT", Console(file=found, width=200))
    return lambda: found.getvalue().splitlines()


def test_alternating_stages_keep_their_own_clock_and_estimate(printed):
    now = [0.0]
    show = output.ProgressPrinter(every_s=0.0, clock=lambda: now[0])
    for done in range(3):
        show("sft", done, 4)
        now[0] += 10.0
        show("checkpoint", done, 4)
    last = printed()[-2:]
    assert last[0].endswith("sft 2/4 (20 s, about 20 s left)")
    assert last[1].endswith("checkpoint 2/4 (20 s, about 20 s left)")


def test_resumed_work_does_not_make_the_estimate_look_good(printed):
    now = [0.0]
    show = output.ProgressPrinter(every_s=0.0, clock=lambda: now[0])
    show("gate", 90, 100)
    now[0] = 10.0
    show("gate", 91, 100)
    assert printed()[-1].endswith("gate 91/100 (10 s, about 90 s left)")


def test_the_next_round_of_a_stage_starts_anew(printed):
    now = [0.0]
    show = output.ProgressPrinter(every_s=0.0, clock=lambda: now[0])
    show("rollouts", 0, 2)
    now[0] = 50.0
    show("rollouts", 2, 2)
    show("rollouts", 0, 2)
    now[0] = 55.0
    show("rollouts", 1, 2)
    assert printed()[-1].endswith("rollouts 1/2 (5 s, about 5 s left)")


def test_a_drivers_own_estimate_is_the_one_that_is_shown(printed):
    listen = listener(output.ProgressPrinter(every_s=0.0))
    listen(Progress("sft", 1, 4, 42.0, "loss 0.5"))
    assert printed()[-1].endswith("about 42 s left)  loss 0.5")


def test_brackets_are_text_not_markup(printed):
    output.print_table("t", ["id"], [["test_x[a/b] [/tmp] [red]"]])
    output.ProgressPrinter()("[/tmp]", 0, 1, "[foo]")
    text = "\n".join(printed())
    assert "test_x[a/b] [/tmp] [red]" in text
    assert "[foo]" in text
