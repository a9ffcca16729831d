"""The chart's tools, once for all of its tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.chart.reading import Reader
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


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reader:
    """Reads settings as a container's process would."""
    return Reader(tmp_path, monkeypatch)


@pytest.fixture
def settings_of(rendered: dict[str, list[dict]], reader: Reader) -> Callable[[dict], Any]:
    """Settings of the service in a container of `rendered`."""

    def read(container: dict[str, Any]) -> Any:
        (objects,) = [
            objects
            for objects in rendered.values()
            if any(one is container for one in chart.containers(objects))
        ]
        return reader.settings(objects, container)

    return read
