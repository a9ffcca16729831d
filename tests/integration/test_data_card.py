"""The data card: counted from a real database, equal to the page, and stale when a record is."""

import json
import sys
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.dataset import TaskClient
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.tasks.card import card, difficulty, spread
from regreen.tasks.jsonl import shipped_distributions, shipped_tasks
from regreen.tasks.messages import task_message
from tests.integration import dataset_samples as samples
from tests.integration.test_traj_commands import regreen

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "infra" / "scripts"))
import data_card


def shown() -> dict[str, str]:
    """The rows of the page."""
    text = data_card.PAGE.read_text()
    rows = text.partition(data_card.START)[2].partition(data_card.END)[0].strip().splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows[2:]]
    return {cell[0]: cell[1] for cell in cells}


async def test_the_database_gives_the_tables_of_the_page(dataset_address: str, tmp_path: Path):
    releases = shipped_distributions()
    shipped = [task_message(record, releases) for record in shipped_tasks()]
    report = samples.report(shipped[0].id)
    for check in report.checks:
        if check.name == "pinned":
            check.duration.FromSeconds(7 if check.repeat == 1 else 2)
    async with connect(dataset_address) as channel:
        client = TaskClient(channel)
        await client.import_tasks(shipped)
        await client.record_gate(report, validation_time_s=2.5)
    home = tmp_path / "stack"
    (home / "run").mkdir(parents=True)
    (home / "run" / "stack.json").write_text(
        json.dumps({"endpoints": {"dataset": dataset_address}})
    )
    code, out, told = await regreen(home, "tasks", "stats", "--json")
    assert code == 0, told
    found = json.loads(out)
    page = shown()
    assert found["total"] == int(page["tasks"]) == len(shipped)
    assert found["counts"]["status"] == {"admitted": 1, "new": len(shipped) - 1}
    rows = dict(card(shipped).lines())
    for name in ("kind", "category", "blame", "difficulty", "mode", "split", "python", "licence",
                 "culprit", "package"):  # fmt: skip
        assert rows[name] == page[name]
        assert found["counts"][name] == dict(card(shipped).counts[name])
    prepared = {"tasks": 1, "median_s": 9.0, "p90_s": 9.0, "most_s": 9.0, "sum_s": 9.0}
    assert found["seconds"]["prepare"] == prepared
    assert found["seconds"]["validate"]["sum_s"] == 2.5
    _, table, _ = await regreen(home, "tasks", "stats", "--status", "admitted")
    assert "1 tasks" in table
    assert "seconds to prepare" in table
    code, _, told = await regreen(home, "tasks", "stats", "--status", "great")
    assert code != 0
    assert "status" in told


def test_a_record_that_changed_makes_the_page_stale(tmp_path: Path, monkeypatch):
    page = tmp_path / "tasks.md"
    page.write_text(data_card.PAGE.read_text())
    monkeypatch.setattr(data_card, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["data_card.py", "--check"])
    assert data_card.main() == 0
    fewer = shipped_tasks()[1:]
    monkeypatch.setattr(data_card, "shipped_tasks", lambda: fewer)
    assert data_card.main() == 1
    assert page.read_text() == Path(data_card.ROOT / "docs" / "tasks.md").read_text()
    monkeypatch.setattr(sys, "argv", ["data_card.py"])
    assert data_card.main() == 0
    assert f"| tasks | {len(fewer)} |" in page.read_text()


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"moved": {"a": "1 2"}}, "one pin"),
        ({"moved": {"a": "1 2", "b": "1 2"}}, "several pins"),
        ({}, "source"),
        ({"moved": {"a": "1 2"}, "modes": [common_pb.MODE_KEEP_NEW]}, "source"),
        ({"moved": {"a": "1 2"}, "labels": {"control": "true"}}, "control"),
    ],
)
def test_difficulty_is_what_the_easiest_repair_has_to_do(fields, wanted):
    assert difficulty(pb.Task(**({"modes": [common_pb.MODE_ANY_FIX]} | fields))) == wanted


def test_a_spread_names_samples():
    found = spread([float(n) for n in range(10, 0, -1)])
    assert (found.tasks, found.median_s, found.p90_s, found.most_s, found.sum_s) == (
        10, 5.0, 9.0, 10.0, 55.0,
    )  # fmt: skip
