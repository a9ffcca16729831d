"""Every panel and alert finds its data over a stack that trains, and every trajectory its trace."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.load.observe import SKIPPED

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_prometheus_finds_what_every_panel_and_alert_asks_for() -> None:
    command = [sys.executable, "-m", "tests.load.observe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == SKIPPED:
        pytest.skip(last)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert last.startswith("observe: run done; ")
    assert last.endswith("; 0 without what they must have")
