"""A pytest plugin that writes the outcome of every test as one JSON object."""

from __future__ import annotations

import json
import os
from typing import Any

_SEEN: dict[str, str] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """Passed in its call, failed in any phase, else skipped."""
    if report.failed:
        _SEEN[report.nodeid] = "failed"
    elif report.when == "call" or report.skipped:
        _SEEN.setdefault(report.nodeid, "passed" if report.passed else "skipped")


def pytest_collectreport(report: Any) -> None:
    """A module that cannot be imported has failed."""
    if report.failed:
        _SEEN[report.nodeid] = "failed"


def pytest_sessionfinish() -> None:
    """Write what was seen."""
    with open(os.environ["REGREEN_REPORT"], "w") as target:
        json.dump(_SEEN, target)
