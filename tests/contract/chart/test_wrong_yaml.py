"""YAML that its readers take in more than one way, and what the tools say of it."""

import os
import subprocess

from tests.fixtures import chart

PARSE = "import sys; from chart.render import parse; print(parse(sys.stdin.read(), 'a.yaml'))"


def parsed(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(chart.ROOT / "build/chart/venv/bin/python"), "-c", PARSE],
        input=text,
        env=os.environ | {"PYTHONPATH": str(chart.ROOT / "infra/scripts")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_key_that_is_there_twice_is_refused(chart_tools):
    twice = parsed(
        "metadata:\n  labels: {a: x, b: y}\n---\nmetadata:\n  labels: {a: x, b: y, a: z}\n"
    )
    assert "Refused: a.yaml: a is there twice" in twice.stderr
    assert "line 4" in twice.stderr
    once = parsed("a: {a: {a: 1}}\nb: [{a: 1}, {a: 2}]\n")
    assert once.stdout.strip() == "[{'a': {'a': {'a': 1}}, 'b': [{'a': 1}, {'a': 2}]}]"
