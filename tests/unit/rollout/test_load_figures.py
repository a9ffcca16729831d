"""What the load run makes of its rows."""

import statistics
from types import SimpleNamespace

import pytest

from regreen.rollout.bench import _Episodes, main, script
from regreen.rollout.bench_report import (
    QUICK,
    Measured,
    Plan,
    Turn,
    knee_of,
    lines_of,
    report_of,
    row_of,
    table,
    where_of,
)
from regreen.rollout.calls import parse_call
from regreen.rollout.toolset import load_toolset
from regreen.rollout.worker import RolloutProgress

PLAN = Plan(tokens_per_s=10.0)


def measured(at_once: int, turns: int, each_ms: float, over_ms: float = 20.0) -> Measured:
    """Episodes whose every turn has 5 tokens and costs so much."""
    rows = [Turn(k, 5, 0.5 + over_ms / 1e3) for _ in range(at_once) for k in range(turns)]
    cpu = at_once * (0.030 + turns * each_ms / 1e3)
    half = {"driver": cpu / 2, "policy": cpu / 2}
    return Measured(at_once, at_once, 2.0, half, rows, 100_000_000, 100_000_000 + at_once * 50_000)


def test_a_row_is_what_its_turns_say() -> None:
    turns = [Turn(0, 5, 0.5 + over / 1e3) for over in range(1, 101)]
    cpu, busy = {"driver": 0.3, "policy": 0.1}, (2.0, 0.5, 1.0, 1.5)
    row = row_of(Measured(4, 10, 8.0, cpu, turns, 1000, 9000, busy, 3), PLAN)
    assert (row["busy_cores"], row["given_back"]) == (1.5, 3)
    assert (row["turns"], row["tokens"], row["turns_per_s"]) == (100, 500, 12.5)
    assert row["cpu_ms_per_turn"] == {"driver": 3.0, "policy": 1.0, "all": 4.0}
    assert row["cpu_us_per_token"] == {"driver": 600.0, "policy": 200.0, "all": 800.0}
    assert row["cores"] == {"driver": 0.037, "policy": 0.013, "all": 0.05}
    assert row["overhead_ms"] == pytest.approx({"p50": 50.0, "p95": 95.0, "p99": 99.0})
    assert row["engine_ms"] == 500.0
    assert row["turn_over_engine"]["p50"] == pytest.approx(1.1)
    assert row["driver_kb_per_episode"] == 2.0


def test_a_line_splits_an_episode_from_its_turns() -> None:
    lines = lines_of([measured(8, turns, 4.0) for turns in (1, 4, 16)])
    assert lines["all"]["turn_ms"] == pytest.approx(4.0)
    assert lines["all"]["episode_ms"] == pytest.approx(30.0)
    assert lines["driver"]["turn_ms"] == pytest.approx(2.0)
    assert lines["all"]["bend"] == pytest.approx(0.0, abs=1e-3)


def test_turns_that_grow_dearer_bend_the_line() -> None:
    lines = lines_of([measured(8, turns, 4.0 * turns) for turns in (1, 4, 16)])
    assert lines["all"]["bend"] > 0.5


def levels(*over_ms: float, cores: float = 0.1) -> dict:
    rows = {}
    for number, over in enumerate(over_ms):
        row = row_of(measured(2**number, 4, 4.0, over), PLAN)
        busy = {"driver": cores, "policy": 0.05, "all": cores + 0.05}
        rows[str(2**number)] = row | {"cores": busy, "busy_cores": cores + 0.1}
    return rows


def test_the_knee_is_where_the_flat_part_ends() -> None:
    knee = knee_of(levels(10, 12, 11, 45, 300, cores=0.97), 2)
    assert (knee["flat_to"], knee["beyond"]) == ("4", "8")
    assert knee["full"] == "a core, by the driver process"


@pytest.mark.parametrize(
    ("cores", "full"), [(0.8, "all 1 cores, most by the driver process"), (0.1, "no core")]
)
def test_what_is_full_beyond_the_knee_is_named(cores: float, full: str) -> None:
    found = knee_of(levels(10, 50, cores=cores), 1)["full"]
    assert found.startswith(full)


def test_a_sweep_without_a_knee_says_so() -> None:
    knee = knee_of(levels(10, 12, 14), 2)
    assert (knee["beyond"], knee["flat_to"], knee["full"]) == ("", "4", "nothing")


def test_the_report_says_everything_in_lines() -> None:
    sweep = [measured(n, 4, 4.0, over) for n, over in ((1, 10), (8, 12), (64, 90))]
    lengths = [measured(8, turns, 4.0) for turns in (1, 4, 16)]
    report = report_of(PLAN, sweep, lengths, {"driver": 0.0002, "policy": 0.0003})
    assert report["turn_floor_cpu_ms"] == pytest.approx(1.5)
    assert report["ratios"]["cpu of a turn over as many empty calls"] == pytest.approx(2.67)
    assert report["ratios"]["cpu of a turn, most at once over fewest flat"] == 1.0
    assert report["ratios"]["median overhead of the last turn over the first"] == 1.0
    text = table(report)
    assert "knee: " in text
    assert all(f"\n{level:>8} " in text for level in (1, 8, 64))


@pytest.mark.parametrize("plan", [Plan(), QUICK])
def test_every_turn_of_the_script_is_a_call_of_its_own(plan: Plan) -> None:
    responses = [found for found in script(plan)["responses"] if "text" in found]
    calls = [parse_call(found["text"], load_toolset()) for found in responses]
    assert len({call.arguments_json for call in calls}) == len(calls)
    assert len(calls) >= max(plan.turns, *plan.lengths)
    assert statistics.mean(found["delay_s"] for found in responses) == 1 / plan.tokens_per_s


def test_time_and_calls_are_told_by_part() -> None:
    turns = [Turn(0, 5, 0.9, 0.3), Turn(1, 5, 0.7, 0.1)]
    calls = {"A/B": [0.001 * n for n in range(1, 101)]}
    one = Measured(1, 2, 4.0, {"driver": 2.0}, turns, episode_s=(1.0, 2.0), calls_s=calls)
    assert where_of(one, PLAN) == {"engine": 0.5, "policy": 0.1, "tools": 0.2, "around": 0.7}
    row = row_of(one, PLAN)
    assert row["calls_ms"] == {"A/B": {"count": 100, "p50": 50.0, "p95": 95.0, "p99": 99.0}}
    assert (row["episodes_per_s"], row["episodes_per_core_s"]) == (0.5, 1.0)


def test_every_change_of_a_building_script_is_another_one() -> None:
    first, *rest = script(QUICK)["responses"]
    tools = load_toolset()
    calls = {parse_call(text, tools).arguments_json for text in first["texts"]}
    assert len(calls) == len(first["texts"])
    assert first["rotate"]
    assert [found["turn"] for found in rest] == list(range(len(rest)))


def test_a_median_of_clocks_is_no_flat_part() -> None:
    assert knee_of(levels(-0.2, 0.4, 2.0), 2)["beyond"] == ""


def test_a_rollout_that_is_tried_again_took_all_its_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((10.0, 14.0, 15.0))
    monkeypatch.setattr(
        "regreen.rollout.bench.time", SimpleNamespace(perf_counter=lambda: next(now))
    )
    episodes = _Episodes()
    for what in ("leased", "given back", "leased", "committed"):
        episodes(RolloutProgress(what, "task", "rol_1"))
    assert episodes.took_s == [5.0]


@pytest.mark.parametrize("given", [["--builds", "none"], ["--turns", "8"], ["--levels", "1"]])
def test_a_quick_run_takes_no_other_shape(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", *given])
    assert f"leave {given[0]} out" in capsys.readouterr().err
