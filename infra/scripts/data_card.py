"""Writes the data card's table in docs/tasks.md from the shipped records: `--check` compares.

- The tables are those of `regreen tasks stats` over the same records; `seconds` are the record's.
"""

import sys
from pathlib import Path

from made import keep

from regreen.dataset import v1 as pb
from regreen.tasks.card import card
from regreen.tasks.jsonl import shipped_distributions, shipped_tasks
from regreen.tasks.messages import STATUSES, task_message

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tasks.md"
START, END = (
    "<!-- data card: made by infra/scripts/data_card.py -->",
    "<!-- end of data card -->",
)


def tasks() -> list[pb.Task]:
    """The shipped records as tasks, with the status and the seconds that they record."""
    releases = shipped_distributions()
    made = []
    for record in shipped_tasks():
        message = task_message(record, releases)
        message.status = STATUSES[record.status]
        message.validation_time.FromNanoseconds(int(record.seconds * 1e9))
        made.append(message)
    return made


def table() -> str:
    """The table, between its marks."""
    found = card(tasks())
    rows = [("tasks", str(found.total)), *found.lines()]
    lines = [f"| {name} | {told} |" for name, told in rows]
    return "\n".join([START, "| what | how many |", "| --- | --- |", *lines, END])


def main() -> int:
    """Write or check the page; the exit code."""
    head, _, rest = PAGE.read_text().partition(START)
    return keep({PAGE: head + table() + rest.partition(END)[2]}, "data_card")


if __name__ == "__main__":
    sys.exit(main())
