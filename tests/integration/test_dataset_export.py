"""Exports: whole lines, chats that are worth learning from, Parquet where pyarrow is."""

import importlib.util
import json
from pathlib import Path

import pytest

from dataset_svc import export
from regreen.client.channel import connect
from regreen.client.dataset import TaskClient, TrajectoryClient
from tests.integration import dataset_samples as samples


@pytest.fixture
async def actor(dataset_address: str) -> str:
    """Name of an actor with three trajectories: solved, unsolved, and solved by a hack."""
    name = samples.fresh("actor")
    async with connect(dataset_address) as channel:
        task = samples.task()
        await TaskClient(channel).import_tasks([task])
        client = TrajectoryClient(channel)
        for reward, hacks in ((1.0, []), (0.0, []), (1.0, ["test-deleted"])):
            sent = samples.trajectory(task.id, reward=reward)
            sent.actor = name
            sent.reward.hacks.extend(hacks)
            await client.commit_trajectory(sent)
    return name


async def run(database_url: str, blobs: Path, actor: str, format: str, out: Path) -> int:
    from asyncio import to_thread

    flags = [f"--database-url={database_url}", f"--blobs={blobs}", f"--actor={actor}"]
    return await to_thread(export.main, [*flags, f"--format={format}", str(out)])


async def test_jsonl_holds_everything(database_url: str, actor: str, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    assert await run(database_url, tmp_path / "blobs", actor, "jsonl", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3
    sent = samples.trajectory("x")
    assert rows[0]["token_ids"] == list(sent.token_ids)
    assert bytes(rows[0]["loss_mask"]) == sent.loss_mask
    assert rows[0]["turns"][2]["text"] == sent.turns[2].text
    assert rows[0]["reward"]["parts"][0]["name"] == "validation"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.jsonl"]


async def test_chats_come_from_honest_successes_alone(
    database_url: str, actor: str, tmp_path: Path
):
    out = tmp_path / "out.jsonl"
    assert await run(database_url, tmp_path / "blobs", actor, "sft", out) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]


async def test_parquet_or_a_hint(database_url: str, actor: str, tmp_path: Path, capsys):
    out = tmp_path / "out.parquet"
    code = await run(database_url, tmp_path / "blobs", actor, "parquet", out)
    if importlib.util.find_spec("pyarrow") is None:
        assert code == 1
        assert "pip install pyarrow" in capsys.readouterr().err
        assert not out.exists()
    else:
        assert code == 0
        assert out.stat().st_size > 0
