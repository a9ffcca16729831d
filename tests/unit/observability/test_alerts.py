"""Alerts and dashboards: what they ask for is measured, what they say is documented and tested."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.load.expressions import ALERTS, DASHBOARDS, alerts, metrics_of, panels, selectors

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "infra" / "observability"
NAMES = [name for name, _ in alerts()]
SHOW = """
import prometheus_client, sys
for name in sys.argv[1:]:
    __import__(name)
print(prometheus_client.generate_latest().decode())
"""
MODULES = (
    *("regreen.rpc.metrics", "dataset_svc.measures", "sandbox_svc.metrics", "policy_svc.metrics"),
    *("judge_svc.metrics", "learner_svc.metrics"),
)
EXPECTED = "regreen_component_expected"
"""Recorded by rules of who installs Regreen, as the chart does."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@pytest.fixture(scope="module")
def measured() -> set[str]:
    """Names of all series that the services' code defines."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *MODULES], capture_output=True, text=True, check=True, cwd=ROOT
    )
    kinds = re.findall(r"^# TYPE (\w+) (\w+)$", done.stdout, re.MULTILINE)
    found = {"up", EXPECTED}
    for name, kind in kinds:
        found |= {name.removesuffix("_total") + suffix for suffix in SUFFIXES[kind]}
    return found


def test_every_expression_asks_for_what_is_measured(measured: set[str]) -> None:
    asked = {
        f"{place}: {name}"
        for place, expr in [*alerts(), *((where, expr) for where, expr in panels())]
        for name in metrics_of(expr)
        if name not in measured
    }
    assert not asked
    assert all(metrics_of(expr) for _, expr in [*alerts(), *panels()])


def test_a_wrong_name_is_found(measured: set[str]) -> None:
    assert metrics_of('sum(rate(regreen_no_such_total{job="regreen"}[5m])) > 0') == {
        "regreen_no_such_total"
    }
    assert "regreen_no_such_total" not in measured


def test_every_selector_names_the_job() -> None:
    for where, expr in [*alerts(), *panels()]:
        assert selectors(expr), where
        for name in metrics_of(expr):
            assert re.search(rf'\b{name}\{{job="regreen"', expr), (where, name)


def test_every_alert_has_a_section_that_it_names() -> None:
    text = (ROOT / "docs" / "operations" / "alerts.md").read_text()
    assert re.findall(r"^### (\w+)$", text, re.MULTILINE) == NAMES
    rules = [r for g in yaml.safe_load(ALERTS.read_text())["groups"] for r in g["rules"]]
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["runbook"] == (
            f"docs/operations/alerts.md#{rule['alert'].lower()}"
        )


def test_every_alert_has_a_unit_test_in_which_it_is_silent_and_fires() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    for name, test in zip(NAMES, tests, strict=True):
        silent, *fires = test["alert_rule_test"]
        assert {one["alertname"] for one in (silent, *fires)} == {name}
        assert silent["exp_alerts"] == []
        assert fires
        assert all(len(one["exp_alerts"]) == 1 for one in fires)


def test_promtool_agrees() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no program `promtool` here: Debian's package `prometheus` has it")
    for words in (
        ("test", "rules", "alerts_test.yml"),
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
    ):
        done = subprocess.run([promtool, *words], cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_are_those_that_were_asked_for() -> None:
    assert {path.stem for path in DASHBOARDS.glob("*.json")} == {
        *("fleet", "rollouts", "learning", "sandboxes", "cost")
    }
    for path in DASHBOARDS.glob("*.json"):
        made = json.loads(path.read_text())
        assert made["uid"] == f"regreen-{path.stem}"
        assert len({panel["title"] for panel in made["panels"]}) == len(made["panels"]) > 5


def test_files_are_as_they_are_made() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="the extra `dev` is not installed")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
