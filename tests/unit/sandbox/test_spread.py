"""Directories that come and go do not make the making of the next ones slower."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from sandbox_svc.backends.spread import spread

_TIMES = 1500


def made_and_removed(below: Path, count: int) -> float:
    """Processor seconds of making some directories; each goes again."""
    spent = 0.0
    for number in range(count):
        here = below / str(number)
        began = time.thread_time()
        here.mkdir()
        for part in "uwx":
            (here / part).mkdir()
        spent += time.thread_time() - began
        for part in "uwx":
            (here / part).rmdir()
        here.rmdir()
    return spent / count


def test_a_directory_is_marked_where_directories_that_went_cost_the_next_ones(tmp_path):
    if not spread(tmp_path):
        made_and_removed(tmp_path, 10)
        assert "T" not in flags(tmp_path)
        return
    assert "T" in flags(tmp_path)
    (tmp_path / "below").mkdir()
    assert "T" not in flags(tmp_path / "below")
    apart = tmp_path / "apart"
    apart.mkdir()
    assert spread(apart)
    first = made_and_removed(apart, 50)
    made_and_removed(apart, _TIMES)
    assert made_and_removed(apart, 50) < 4 * first


def flags(directory: Path) -> str:
    listed = subprocess.run(["lsattr", "-d", str(directory)], capture_output=True, text=True)
    return listed.stdout.split(" ")[0] if listed.returncode == 0 else ""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory to look at")
def test_where_there_is_no_such_flag_nothing_is_marked(tmp_path):
    assert not spread(Path("/dev/shm"))
    assert not spread(tmp_path / "absent")
