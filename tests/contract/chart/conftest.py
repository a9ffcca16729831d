"""The chart's tools, once for all of its tests."""

import pytest

from tests.fixtures import chart


@pytest.fixture(scope="session")
def chart_tools() -> None:
    """Helm's SDK, schemas and the checks; skips where they cannot be had."""
    chart.tools()


@pytest.fixture(scope="session")
def rendered(chart_tools: None) -> dict[str, list[dict]]:
    """Objects by set of values."""
    names = ("small", "full", "sandbox")
    answers = chart.tried([{"values": chart.values(name)} for name in names])
    for name, answer in zip(names, answers, strict=True):
        assert not answer["refused"], (name, answer["refused"])
        assert answer["schema"] == [], name
        assert answer["policy"] == [], name
    return {name: answer["objects"] for name, answer in zip(names, answers, strict=True)}
