"""SWE-smith: instances whose patch makes the bug, so that the fix is its reverse.

- What SWE-bench would call the gold patch is not stored: it is the patch turned around.
- A task of ours whose fix changes source only is written with its fix turned around; the whole
  task travels in the field `regreen`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.formats.diffs import reversed_diff
from regreen.tasks.formats.extension import KEY, decode, encode
from regreen.tasks.formats.items import (
    Foreign,
    Item,
    Native,
    Written,
    gold_patch,
    own_document,
    repository,
    source_digest,
    statement,
    task_id,
    write_rows,
)
from regreen.tasks.formats.rows import Placed, read_rows
from regreen.tasks.formats.swebench import image_name

name = "swe-smith"
FILE = "swe-smith.jsonl"


def read(path: Path) -> list[Foreign | Native]:
    """Instances of a file.

    Raises:
        InvalidArgument: names the row, the field and the remedy.
    """
    return [instance(placed) for placed in read_rows(path)]


def instance(placed: Placed) -> Foreign | Native:
    """One instance."""
    id, repo = placed.name("instance_id"), placed.name("repo")
    failing, passing = placed.ids("FAIL_TO_PASS"), placed.ids("PASS_TO_PASS")
    if placed.row.get(KEY):
        return decode(placed.text(KEY), placed.where, id=id, fail_to_pass=failing)
    image = placed.name("image_name")
    bug = placed.text("patch")
    reversed_diff(bug, f"{placed.where} field patch")
    if not failing:
        remedy = "give the tests that the bug breaks"
        raise InvalidArgument(f"{placed.where} field FAIL_TO_PASS", "is empty", remedy)
    commit = placed.name("base_commit", required=False)
    placed.text("problem_statement", required=False)
    return Foreign(
        format=name,
        id=task_id(id, placed.where),
        package=repo,
        version=commit[:12] or repo.rpartition(".")[2],
        document=placed.document(),
        needs=(f"image {image}", f"git https://github.com/{repo} at branch {id}"),
        kind="injected-bug",
        fail_to_pass=failing,
        pass_to_pass_count=len(set(passing)),
        split="train",
    )


def write(items: Sequence[Item], out: Path) -> Written:
    """Write the tasks whose fix is a change of source as one file of instances."""
    return write_rows(items, out / FILE, row)


def row(item: Item) -> dict[str, Any]:
    """A task as an instance.

    Raises:
        LeftOut: it cannot be one.
    """
    task = item.task
    if task.HasField("foreign"):
        return own_document(task, name)
    return {
        "instance_id": task.id,
        "repo": repository(task),
        "patch": reversed_diff(gold_patch(item)),
        "FAIL_TO_PASS": list(task.fail_to_pass),
        "PASS_TO_PASS": sorted(item.pass_to_pass),
        "created_at": task.create_time.ToJsonString() if task.HasField("create_time") else "",
        "image_name": image_name(task),
        "base_commit": source_digest(task),
        "problem_statement": statement(task),
        KEY: encode(item),
    }
