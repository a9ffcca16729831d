"""Training under kills of any process, the short form of `tests.load.train`."""

import pytest

from tests.load.train import Plan, storm
from tests.load.train_party import KINDS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_are_bit_equal_whatever_is_killed() -> None:
    told: list[str] = []
    report = storm(Plan(kills=6, steps=4, seed=3, modes=("sync",)), told.append)["sync"]
    assert report["faults"] == [], "\n".join(told)
    assert report["sha256"] == report["undisturbed_sha256"] != ""
    assert report["optimizer_steps"] == report["steps"] == 4
    assert sum(report["killed"].values()) == report["kills"] == 6
    assert set(report["killed"]) <= set(KINDS)
