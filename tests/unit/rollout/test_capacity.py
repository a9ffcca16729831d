"""The simulated queueing network against results that are known exactly."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regreen.cli.main import make_app
from regreen.rollout.capacity import (
    PROGRAMS,
    Demand,
    Fleet,
    first_full,
    fleet_for,
    needed,
    simulate,
)
from regreen.rollout.capacity_fit import capacity, markdown

ONE = Demand(1, {}, {"driver": 0.1}, 1.0)


def repairmen(users: int, servers: int, work_s: float, think_s: float) -> float:
    """Throughput of the finite-source queue M/M/c//N, from its birth-death equations."""
    weights = [1.0]
    for n in range(1, users + 1):
        weights.append(weights[-1] * (users - n + 1) / think_s * work_s / min(n, servers))
    return sum(w * min(n, servers) / work_s for n, w in enumerate(weights)) / sum(weights)


@pytest.mark.parametrize("users", [2, 12, 40])
@pytest.mark.parametrize("servers", [1, 3])
def test_throughput_is_that_of_the_finite_source_queue(users: int, servers: int) -> None:
    # Its law holds whatever the thinking time is drawn from, for PS and exponential FCFS alike.
    demand = Demand(1, {}, {"builds": 0.2}, 1.0)
    fleet = Fleet(servers)
    rates = [simulate(demand, fleet, users, 3000, seed).episodes_per_s for seed in range(2)]
    assert sum(rates) / 2 == pytest.approx(repairmen(users, servers, 0.2, 1.0), rel=0.04)


def test_a_process_fills_one_core_however_many_there_are() -> None:
    found = simulate(ONE, Fleet(16), 400)
    assert found.episodes_per_s == pytest.approx(10.0, rel=0.1)
    assert found.bottleneck == "driver"
    more = simulate(ONE, Fleet(16, {"driver": 4}), 400)
    assert more.episodes_per_s == pytest.approx(40.0, rel=0.1)


def test_cores_are_named_where_all_are_full() -> None:
    demand = Demand(2, {"driver": 0.05, "sandbox": 0.05, "policy": 0.05}, {}, 1.0)
    assert simulate(demand, Fleet(2), 200).bottleneck == "cores"
    assert first_full(demand, Fleet(2))[0] == "cores"
    assert first_full(demand, Fleet(8))[0] in ("driver", "sandbox", "policy")


def test_an_engine_with_few_places_is_the_bottleneck() -> None:
    found = simulate(ONE, Fleet(8, {"driver": 8}, samples=5), 100)
    assert found.bottleneck == "engine"
    assert found.episodes_per_s == pytest.approx(5.0, rel=0.05)


def test_what_is_needed_is_enough_and_half_of_it_is_not() -> None:
    demand = Demand(4, {"driver": 0.01, "policy": 0.02}, {"dataset": 0.05}, 0.5)
    fleet = fleet_for(demand, 300)
    enough = simulate(demand, fleet, 300)
    assert enough.bottleneck == ""
    assert enough.episode_s["p50"] < 1.3 * demand.alone_s
    half = {name: max(1, math.ceil(n / 2)) for name, n in fleet.replicas.items()}
    assert simulate(demand, Fleet(fleet.cores // 2, half), 300).bottleneck
    assert needed(demand, 600)["cores"] == pytest.approx(2 * fleet.cores, abs=1)


def test_others_on_the_machine_take_their_share() -> None:
    demand = Demand(1, {}, {"driver": 0.1, "policy": 0.1}, 0.1)
    alone, beside = (simulate(demand, Fleet(2, others=o), 50).episodes_per_s for o in (0.0, 1.0))
    assert beside == pytest.approx(alone / 2, rel=0.15)


def report() -> dict:
    """A load run on a machine that is itself a simulated one."""
    truth = Demand(8, {"driver": 0.006, "policy": 0.008}, {"sandbox": 0.04}, 0.4, 0.05, 0.3)

    def row(at_once: int, turns: int) -> dict:
        demand = Demand(turns, truth.turn_s, truth.episode_s, 0.4, 0.05, 0.3)
        found = simulate(demand, Fleet(2), at_once, at_once, seed=9)
        return {
            "at_once": at_once, "episodes": at_once, "turns": at_once * turns,
            "engine_ms": 400.0, "episode_s": found.episode_s,
            "episodes_per_s": found.episodes_per_s,
            "cores": {"all": 1.0, **dict.fromkeys(PROGRAMS, 0.1)}, "mean_busy_cores": 1.0,
            "episodes_per_s_per_core": found.episodes_per_s / 2, "where_s": {"engine": 0.4 * turns},
            "memory_mb": {"driver": 100.0},
        }  # fmt: skip

    lines = {
        name: {
            "turn_ms": 1e3 * truth.turn_s.get(name, 0.0),
            "episode_ms": 1e3 * truth.episode_s.get(name, 0.0),
        }
        for name in PROGRAMS
    }
    return {
        "bench": "load", "cpus": 2, "plan": {"turns": 8}, "lines": lines, "builds": {},
        "lengths": {str(turns): row(16, turns) for turns in (1, 4, 16)},
        "levels": {str(n): row(n, 8) for n in (1, 64, 200)},
    }  # fmt: skip


def test_a_fit_foretells_what_it_has_not_seen() -> None:
    found = capacity(report(), [400])
    assert not any(row["fitted"] for row in found["fit"])
    for row in found["fit"]:
        assert abs(row["episodes_per_s"]["error"]) < 0.1
        assert abs(row["p95_s"]["error"]) < 0.15
    assert found["first_full"]["station"] == "cores"
    assert found["projection"][0]["bottleneck"] == "cores"
    assert found["projection"][0]["with_needed"]["bottleneck"] == ""


def test_what_others_kept_busy_is_not_taken_from_what_is_predicted() -> None:
    """A level in which somebody else was busy is mispredicted, and seen to be."""
    plain, disturbed = report(), report()
    disturbed["levels"]["200"]["mean_busy_cores"] = 2.0
    assert capacity(disturbed, [400])["fit"] == capacity(plain, [400])["fit"]


def test_a_prediction_shows_how_far_its_draws_lie_apart() -> None:
    """Ten draws of one short level differ; in a table the deviation stands beside their mean."""
    found = capacity(report(), [400])
    row = found["fit"][0]["p50_s"]
    assert 0 < row["deviation"] < row["predicted"]
    assert f"{row['predicted']:.4g} ± {row['deviation']:.2g}" in markdown(found)


def test_servers_are_as_busy_as_what_they_are_asked_for() -> None:
    """Utilisation law: of a fleet that has run for long, without the time in which it filled."""
    demand = Demand(8, {"driver": 0.006, "policy": 0.008}, {"sandbox": 0.04}, 0.4, 0.05, 0.3)
    found = simulate(demand, Fleet(4), 60)
    for name in ("driver", "policy", "sandbox"):
        assert found.busy[name] == pytest.approx(found.episodes_per_s * demand.of(name), rel=0.1)


def test_the_command_reads_a_report_and_a_fleet(tmp_path: Path) -> None:
    path, fleet = tmp_path / "load.json", tmp_path / "fleet.toml"
    path.write_text(json.dumps(report()))
    fleet.write_text("cores = 8\n[replicas]\npolicy = 1\ndriver = 2\n")
    app = make_app(["capacity"])
    words = ["capacity", "--from", str(path), "--episodes", "300", "--fleet", str(fleet)]
    ended = CliRunner().invoke(app, [*words, "--json"])
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found["fleet"]["replicas"] == {"policy": 1, "driver": 2}
    assert found["projection"][0]["bottleneck"] == "policy"
    told = CliRunner().invoke(app, words).stdout
    assert "| 300 |" in told
    assert "driver 100 | 1.00 of 2 |" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cpus = 8", "cpus"),
        ("cores = 0", "cores"),
        ("cores = 2\n[replicas]\nx = 1", "'x'"),
        ("cores = 2\nreplicas = 3", "give a table"),
        ("cores = 2\nsamples = -1", "samples"),
        ("cores = 2\nothers = -1", "others"),
        ("cores = 2\nothers = nan", "others"),
        ("cores = 2\nothers = 2", "others"),
    ],
)
def test_a_fleet_that_is_none_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path, fleet = tmp_path / "load.json", tmp_path / "fleet.toml"
    path.write_text(json.dumps(report()))
    fleet.write_text(text)
    ended = CliRunner().invoke(
        make_app(["capacity"]), ["capacity", "--from", str(path), "--fleet", str(fleet)]
    )
    assert ended.exit_code != 0
    assert told in ended.output + ended.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench", "rl", "--builds", "real"], "only load has it"),
        (["bench", "load", "--builds", "some"], "none or real"),
        (["bench", "load", "--levels", "1,0"], "whole numbers"),
    ],
)
def test_flags_of_the_load_run_are_checked_before_it(words: list[str], told: str) -> None:
    ended = CliRunner().invoke(make_app(["bench"]), words)
    assert ended.exit_code != 0
    assert told in ended.output + ended.stderr


@pytest.mark.parametrize(
    ("report_of", "words", "told"),
    [
        ({"bench": "load"}, [], "whole report"),
        ({"bench": "rl"}, [], "is no report"),
        ({"cpus": 0}, [], "whole report"),
        (None, ["--episodes", "1000000000"], "1,000,000"),
        (None, ["--builds", "real"], "--builds real"),
        ({"builds": {"2": {}}, "counts_builds": False}, ["--builds", "real"], "had ended"),
    ],
)
def test_a_report_that_does_not_say_it_is_refused(
    tmp_path: Path, report_of: dict | None, words: list[str], told: str
) -> None:
    path = tmp_path / "load.json"
    whole = report_of is None or "bench" not in report_of
    path.write_text(json.dumps({**report(), **(report_of or {})} if whole else report_of))
    ended = CliRunner().invoke(make_app(["capacity"]), ["capacity", "--from", str(path), *words])
    assert ended.exit_code != 0
    assert told in ended.output + ended.stderr
