"""Exports where something is in the way: there whole, or not at all, and said by name."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.exchange import export_chats, new_directory


def quiet(stage: str, done: float, total: float, text: str) -> None:
    """Nobody looks."""


async def solved(count: int) -> AsyncIterator[pb.Trajectory]:
    for number in range(count):
        found = pb.Trajectory(id=f"trj_{number}", task_id="a", actor="policy")
        found.reward.solved = True
        found.turns.add(role=pb.TURN_ROLE_POLICY, text="x" * 1000)
        yield found


async def test_a_target_that_is_taken_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(InvalidArgument, match=f"out: .*{name} is not empty; name a directory"):
            await export_chats(solved(1), {"a"}, tmp_path / name, quiet)
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]
    with pytest.raises(InvalidArgument, match=r"out: .* cannot be written: File exists"):
        await export_chats(solved(1), {"a"}, tmp_path / "file/below", quiet)


async def test_an_empty_directory_is_filled_by_whatever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, out in (("a", "."), ("b", "../b/"), ("c", "x/.."), ("d", "long" * 60)):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        done = await export_chats(solved(2), {"a"}, Path(out), quiet)
        target = Path(os.path.abspath(tmp_path / place / out))
        assert len((target / "sft.jsonl").read_text().splitlines()) == done.count == 2
        assert target.stat().st_mode & 0o777 == 0o777 & ~mask()


def mask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


async def test_of_two_exports_at_once_one_is_there_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [export_chats(solved(n), {"a"}, out, quiet) for n in (200, 300)]
    ended = await asyncio.gather(*both, return_exceptions=True)
    good = [one for one in ended if not isinstance(one, BaseException)]
    bad = [one for one in ended if isinstance(one, BaseException)]
    assert len(good) == 1
    assert isinstance(bad[0], InvalidArgument)
    assert len((out / "sft.jsonl").read_text().splitlines()) == good[0].count
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FULL = """
import asyncio, resource, sys
from pathlib import Path
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.exchange import export_chats
from tests.unit.tasks.test_export_faults import quiet, solved

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    asyncio.run(export_chats(solved(1000), {"a"}, Path(sys.argv[1]) / "out", quiet))
except InvalidArgument as error:
    print(error.message)
"""


def test_a_disk_that_is_full_half_way_leaves_nothing(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large; name a directory" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_directory(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
