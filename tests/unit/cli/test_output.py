"""What commands print: one honest estimate, text as it is."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from regreen.cli import bench, output
from regreen.cli.listen import listener
from regreen.cli.rollout import one_line, rollout_lines
from regreen.rollout.progress import TurnProgress, show_turns
from regreen.rollout.worker import RolloutProgress
from regreen.train.progress import Meter, Progress, stage


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


def test_of_a_stage_without_a_pace_no_time_is_promised(printed):
    now = [0.0]
    show = output.ProgressPrinter(every_s=0.0, clock=lambda: now[0])
    for done in (0, 1, 19):  # services were up and tasks gated: nothing took any time
        show("demo", done, 100, "percent", paced=False)
        now[0] += 30.0
        show.tick()
    assert len(printed()) == 6
    assert not any("left" in line for line in printed())


def test_an_estimate_that_has_run_out_is_not_repeated(printed):
    now = [0.0]
    show = output.ProgressPrinter(clock=lambda: now[0])
    show("sft", 1, 2, left_s=10.0)
    now[0] += 60.0
    show.tick()
    assert [line.partition("(")[2] for line in printed()] == ["0 s, about 10 s left)", "60 s)"]


def test_resumed_work_does_not_make_the_estimate_look_good(printed):
    now = [0.0]
    show = output.ProgressPrinter(every_s=0.0, clock=lambda: now[0])
    show("gate", 90, 100)
    now[0] = 10.0
    show("gate", 91, 100)
    assert printed()[-1].endswith("gate 91/100 (10 s, about 90 s left)")


def test_long_work_is_never_quiet_for_long(printed):
    now = [0.0]
    show = output.ProgressPrinter(clock=lambda: now[0])
    show.tick()
    show("learn", 1, 4, "step 1", left_s=60.0)
    now[0] = 9.0
    show.tick()
    assert len(printed()) == 1
    for now[0] in (10.0, 15.0, 25.0):
        show.tick()
    assert [line[10:] for line in printed()[1:]] == [
        "learn 1/4 (10 s, about 50 s left)  step 1",
        "learn 1/4 (25 s, about 35 s left)  step 1",
    ]
    show("learn", 4, 4)
    now[0] = 45.0
    show.tick()
    assert printed()[-1].endswith("done 20 s ago; going on")


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


def test_every_step_is_shown_with_what_it_learned_however_quick(printed):
    now = [0.0]
    meter = Meter(
        listener(output.ProgressPrinter(clock=lambda: now[0])), "sft", 3, clock=lambda: now[0]
    )
    meter.report()
    for step in (1, 2):
        now[0] += 1.0
        meter.report(detail=f"step {step}: half of the tokens")  # too soon after the last line
        now[0] += 1.0
        meter.report(step, f"step {step}: loss 0.{9 - step}", due=True)
    assert [line[10:] for line in printed()] == [
        "sft 0/3 (0 s)",
        "sft 1/3 (2 s, about 4 s left)  step 1: loss 0.8",
        "sft 2/3 (4 s, about 2 s left)  step 2: loss 0.7",
    ]


def test_a_stage_is_closed_with_its_seconds_each_time(printed):
    now = [0.0]
    listen = listener(output.ProgressPrinter(clock=lambda: now[0]))
    for step in (1, 2):
        with stage(listen, "checkpoint", f"step {step}"):
            now[0] += 12.0
    closed = [line for line in printed() if "checkpoint 1/1" in line]
    assert [line[10:] for line in closed] == [
        "checkpoint 1/1 (12 s)  step 1",
        "checkpoint 1/1 (12 s)  step 2",
    ]


def test_waiting_for_a_service_shows_no_time_left(printed):
    now = [0.0]
    listen = listener(output.ProgressPrinter(every_s=0.0, clock=lambda: now[0]))
    for waited in (0, 5):
        now[0] = waited
        listen(Progress("recover", waited, 0, None, f"waiting, gives up in {120 - waited} s: away"))
    assert printed()[-1].endswith("recover (5 s)  waiting, gives up in 115 s: away")


def test_turns_are_shown_and_every_verdict_whatever_the_interval(printed):
    now = [0.0]
    show = output.ProgressPrinter(every_s=60.0, clock=lambda: now[0])
    listen = show_turns(show, "repair", 1, 4, "attempt 2 of 4")
    listen(TurnProgress(3, 24, "generate"))
    listen(TurnProgress(3, 24, "run_sh"))  # too soon after the last line
    for found in ("NOT GREEN (failed): 2 failed", "PASSED"):
        listen(TurnProgress(4, 24, "validate_and_build"))
        now[0] += 30.0
        listen(TurnProgress(4, 24, "validate_and_build", found))
    listen(TurnProgress(4, 24, "grade"))
    where = "attempt 2 of 4, turn 4 of 24: validate_and_build"
    assert [line[10:] for line in printed()] == [
        "repair 1/4 (0 s)  attempt 2 of 4, turn 3 of 24: generate",
        f"validate 0/1 (0 s)  {where}",
        f"validate 1/1 (30 s)  {where}: NOT GREEN (failed): 2 failed",
        f"validate 0/1 (0 s)  {where}",
        f"validate 1/1 (30 s)  {where}: PASSED",
        "grade 0/1 (0 s)  attempt 2 of 4, turn 4 of 24: grade",
    ]


def test_many_episodes_share_one_line(printed):
    now = [0.0]
    show = output.ProgressPrinter(every_s=0.0, clock=lambda: now[0])
    meter = Meter(listener(show), "episodes", 3, clock=lambda: now[0])
    listen = one_line(meter, "task-a")
    listen(TurnProgress(1, 8, "generate"))
    now[0] = 20.0
    meter.advance(detail="task-a: solved")
    now[0] = 25.0
    listen(TurnProgress(1, 8, "run_sh"))
    assert [line[10:] for line in printed()] == [
        "episodes 0/3 (0 s)  task-a, turn 1 of 8: generate",
        "episodes 1/3 (20 s, about 40 s left)  task-a: solved",
        "episodes 1/3 (25 s, about 35 s left)  task-a, turn 1 of 8: run_sh",
    ]


def test_a_worker_prints_each_rollout_that_comes_and_goes(printed):
    now = [0.0]
    listen = rollout_lines(lambda: now[0])
    listen(RolloutProgress("leased", "task-a", "rol_1"))
    now[0] = 9.0
    listen(RolloutProgress("committed", "task-a", "rol_1", "solved  reward +1.00  5 turns"))
    assert printed() == [
        "[   0.0s] leased task-a rol_1",
        "[   9.0s] committed task-a rol_1: solved  reward +1.00  5 turns",
    ]


def test_what_a_benchmark_tells_is_passed_on(tmp_path: Path, monkeypatch, capfd):
    (tmp_path / "quick_svc").mkdir()
    (tmp_path / "quick_svc" / "bench.py").write_text(
        "import sys\nsys.stderr.write('round 1/2\\n')\nsys.stdout.write('hello\\n{\"a\": 1}\\n')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert bench._run("quick_svc.bench") == {"a": 1}
    assert "round 1/2" in capfd.readouterr().err


def test_brackets_are_text_not_markup(printed):
    output.print_table("t", ["id"], [["test_x[a/b] [/tmp] [red]"]])
    output.ProgressPrinter()("[/tmp]", 0, 1, "[foo]")
    text = "\n".join(printed())
    assert "test_x[a/b] [/tmp] [red]" in text
    assert "[foo]" in text


def test_words_between_colons_are_no_pictures():
    with output.STDOUT.capture() as told:
        output.print_table("t", ["id"], [["dependency-upgrade:icecream:2025-02-28"]])
    assert "dependency-upgrade:icecream:2025-02-28" in told.get()
    with output.STDERR.capture() as told:
        output.ProgressPrinter()("mine", 0, 1, "dependency-upgrade:icecream:2025-02-28: at base")
    assert ":icecream:" in told.get()
