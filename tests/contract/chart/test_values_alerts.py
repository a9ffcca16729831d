"""What the chart has Prometheus miss is what its values run, for as long as they do."""

import shutil
import subprocess

import pytest
import yaml

from tests.fixtures import chart

GONE = "RegreenServiceGone"
_MINUTES = 36 * 60
"""Longer than Prometheus remembers by itself that a service was there."""


def rules(objects: list[dict]) -> dict:
    """The rules as a file of Prometheus has them."""
    (found,) = [one["spec"] for one in objects if one["kind"] == "PrometheusRule"]
    return found


def expected(objects: list[dict]) -> set[str]:
    """Components that are to be there."""
    return {
        rule["labels"]["component"]
        for group in rules(objects)["groups"]
        for rule in group["rules"]
        if rule.get("record") == "regreen_component_expected"
    }


def up(component: str, values: str) -> dict:
    """Samples of a target of a component."""
    series = f'up{{job="regreen", component="{component}", instance="{component}:1"}}'
    return {"series": series, "values": values}


def missed(component: str) -> dict:
    """The alert for a component."""
    return {
        "exp_labels": {"component": component, "severity": "critical"},
        "exp_annotations": {
            "runbook": f"docs/operations/alerts.md#{GONE.lower()}",
            "summary": f"no {component} is left to ask",
        },
    }


def test_what_is_scraped_is_expected(rendered):
    for objects in rendered.values():
        if not any(one["kind"] == "PrometheusRule" for one in objects):
            continue
        scraped = {
            label["replacement"]
            for one in objects
            if one["kind"] in ("ServiceMonitor", "PodMonitor")
            for end in one["spec"].get("endpoints") or one["spec"]["podMetricsEndpoints"]
            for label in end["relabelings"]
            if label["targetLabel"] == "component"
        }
        # How many workers a front has is the front's affair, and may be none.
        assert expected(objects) == scraped - {"worker"}
    assert "learner" in expected(rendered["full"])


def test_runbooks_are_where_the_values_say(chart_tools, rendered):
    base = "https://git.example/regreen/blob/main"
    values = chart.over(chart.values("full"), "monitoring.runbooks", f"{base}/")
    (answer,) = chart.tried([{"values": values}])
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])
    plain, given = (annotations(objects) for objects in (rendered["full"], answer["objects"]))
    assert len(plain) > 10
    assert [one["runbook_url"] for one in given] == [f"{base}/{one['runbook']}" for one in plain]
    assert not any("runbook" in one for one in given)


def annotations(objects: list[dict]) -> list[dict]:
    """Of every alert."""
    (rule,) = [one for one in objects if one["kind"] == "PrometheusRule"]
    rules_ = [one for group in rule["spec"]["groups"] for one in group["rules"]]
    return [one["annotations"] for one in rules_ if "alert" in one]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("expr", "sum((", "parse error"),
        ("expr", "rate(up)", "expected type range vector"),
        ("annotations", {"summary": "{{ $labels.x"}, "template"),
    ],
)
def test_a_rule_that_prometheus_does_not_read_is_found(chart_tools, field, value, says):
    if shutil.which("promtool") is None:
        pytest.skip("no program `promtool` here: Debian's package `prometheus` has it")
    change = ["PrometheusRule/regreen-alerts", f"spec.groups.0.rules.0.{field}", value]
    (answer,) = chart.tried([{"values": chart.values("full"), "mutate": [change]}])
    (line, *_) = answer["policy"]
    assert line.startswith("PrometheusRule/regreen-alerts: spec.groups: ")
    assert says in " ".join(answer["policy"])


@pytest.mark.parametrize("gone", ["learner", "judge", "sglang"])
def test_a_part_is_missed_for_as_long_as_it_is_gone_and_no_other(rendered, tmp_path, gone):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no program `promtool` here: Debian's package `prometheus` has it")
    objects = rendered["full"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules(objects)))
    series = [
        up(one, f"1x20 _x{_MINUTES}" if one == gone else f"1x{_MINUTES}")
        for one in sorted(expected(objects))
    ]
    asked = {0: [], 20: [], **{60 * hour: [missed(gone)] for hour in (1, 5, 7, 24, 35)}}
    test = {
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [
            {"alertname": GONE, "eval_time": f"{minute}m", "exp_alerts": alerts}
            for minute, alerts in asked.items()
        ],
    }
    file = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(file))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
