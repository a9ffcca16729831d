"""`python -m dataset_svc.export`: trajectories as files that other tools read.

- `jsonl`: one trajectory per line, whole, with token arrays.
- `sft`: one chat per line (`messages` of role and content), only of solved rollouts without a
  flagged hack: what fine-tuning may learn from.
- `parquet`: one row per trajectory, lists for tokens; needs pyarrow.
- A file appears whole under its name or not at all. Rows come in order of insertion.
"""

import argparse
import asyncio
import importlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from dataset_svc.database import Database
from dataset_svc.records import Document, TrajectoryQuery, TrajectoryRecord, canonical
from dataset_svc.store import TrajectoryStore
from regreen.blobs import open_blobs
from regreen.rpc.errors import MissingDependency, RegreenError

FORMATS = ("jsonl", "sft", "parquet")
_CHAT_ROLES = {"prompt": "user", "policy": "assistant", "tool": "user"}
_PARQUET_ROWS = 256


def trajectory_row(record: TrajectoryRecord) -> Document:
    """The whole trajectory as plain JSON values."""
    skipped = ("stream", "turns", "reward", "wire_bytes")
    row = {name: getattr(record, name) for name in record.__slots__ if name not in skipped}
    row["turns"] = [_plain(turn) for turn in record.turns]
    row["reward"] = record.reward and _plain(record.reward) | {
        "parts": [_plain(part) for part in record.reward.parts]
    }
    if record.stream is not None:
        row["token_ids"] = record.stream.token_ids.tolist()
        row["loss_mask"] = record.stream.loss_mask.tolist()
        row["logprobs"] = [float(value) for value in record.stream.logprobs]
        row["versions"] = [list(span) for span in record.stream.versions]
    return row


def sft_row(record: TrajectoryRecord) -> Document | None:
    """The trajectory as one chat; None if it is nothing to learn from."""
    reward = record.reward
    if reward is None or not reward.solved or reward.hacks:
        return None
    messages: list[dict[str, str]] = []
    for turn in record.turns:
        role = _CHAT_ROLES.get(turn.role)
        if role is None:
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + turn.text
        else:
            messages.append({"role": role, "content": turn.text})
    if not any(message["role"] == "assistant" for message in messages):
        return None
    return {
        "id": record.id,
        "task_id": record.task_id,
        "actor": record.actor,
        "pipeline": record.pipeline,
        "mode": record.mode,
        "messages": messages,
    }


async def write(records: AsyncIterator[TrajectoryRecord], path: Path, format: str) -> int:
    """Write records to `path`; how many rows that made.

    Raises:
        MissingDependency: `parquet` without pyarrow.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        if format == "parquet":
            count = await _write_parquet(records, partial)
        else:
            row = sft_row if format == "sft" else trajectory_row
            count = await _write_lines(records, partial, row)
        await asyncio.to_thread(_into_place, partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


async def _write_lines(
    records: AsyncIterator[TrajectoryRecord],
    path: Path,
    row: Callable[[TrajectoryRecord], Document | None],
) -> int:
    count = 0
    with path.open("wb") as target:
        async for record in records:
            content = row(record)
            if content is not None:
                await asyncio.to_thread(target.write, canonical(content) + b"\n")
                count += 1
    return count


async def _write_parquet(records: AsyncIterator[TrajectoryRecord], path: Path) -> int:
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependency("Parquet needs pyarrow: pip install pyarrow") from error
    schema = _parquet_schema(arrow)
    count, batch = 0, []
    with parquet.ParquetWriter(path, schema) as writer:
        async for record in records:
            batch.append(_flat_row(record))
            if len(batch) == _PARQUET_ROWS:
                writer.write_table(arrow.Table.from_pylist(batch, schema))
                batch = []
            count += 1
        if batch:
            writer.write_table(arrow.Table.from_pylist(batch, schema))
    return count


def _parquet_schema(arrow: Any) -> Any:
    texts = ["id", "task_id", "run_id", "group_id", "pipeline", "mode", "grader", "end", "actor"]
    texts += ["policy", "state_id", "document"]
    fields = [(name, arrow.string()) for name in texts]
    fields += [("group_index", arrow.int32()), ("attempt", arrow.int32()), ("seed", arrow.uint64())]
    fields += [("reward", arrow.float64()), ("solved", arrow.bool_())]
    fields += [("hacks", arrow.list_(arrow.string())), ("token_ids", arrow.list_(arrow.int32()))]
    fields += [
        ("loss_mask", arrow.list_(arrow.uint8())),
        ("logprobs", arrow.list_(arrow.float32())),
    ]
    return arrow.schema(fields)


def _flat_row(record: TrajectoryRecord) -> Document:
    row = trajectory_row(record)
    tokens = {name: row.pop(name, []) for name in ("token_ids", "loss_mask", "logprobs")}
    reward = record.reward
    return {
        **{name: value for name, value in row.items() if name != "reward"},
        **tokens,
        "reward": reward.value if reward else None,
        "solved": bool(reward and reward.solved),
        "hacks": list(reward.hacks) if reward else [],
        "document": canonical(row).decode(),
    }


def _into_place(partial: Path, path: Path) -> None:
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


def _plain(record: Any) -> Document:
    return {name: getattr(record, name) for name in record.__slots__}


def main(argv: list[str] | None = None) -> int:
    """Export from a database by URL; the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m dataset_svc.export", description=__doc__
    )
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--blobs", required=True, help="directory, or s3://bucket/prefix")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    parser.add_argument("--run-id", default="")
    parser.add_argument("--actor", default="")
    parser.add_argument("--policy", default="")
    parser.add_argument("--solved-only", action="store_true")
    parser.add_argument("out", type=Path)
    given = parser.parse_args(argv)
    query = TrajectoryQuery(
        run_id=given.run_id,
        actor=given.actor,
        policy=given.policy,
        solved_only=given.solved_only or given.format == "sft",
    )

    async def export() -> int:
        database = Database(given.database_url, pool_size=2)
        try:
            store = TrajectoryStore(database, open_blobs(given.blobs))
            return await write(store.export(query), given.out, given.format)
        finally:
            await database.close()

    try:
        count = asyncio.run(export())
    except RegreenError as error:
        sys.stderr.write(f"export: {error}\n")
        return 1
    sys.stdout.write(json.dumps({"rows": count, "path": str(given.out)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
