"""SWE-bench: one row an instance, as JSON Lines, JSON or the columns of Parquet.

- Ids of tests may be lists or, as in the published sets, the JSON text of lists.
- An instance of a repository on a forge is kept with what it needs: the image that holds the
  repository at its commit, or the repository itself.
- A task of ours has one gold patch here: source changes before moved pins. The whole task travels
  in the field `regreen`.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
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

name = "swe-bench"
FILE = "swe-bench.jsonl"
START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
"""Marks between which the harness of SWE-bench reads test results."""


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
    commit = placed.name("base_commit")
    placed.text("problem_statement")
    for field in ("patch", "test_patch"):
        placed.text(field, required=False)
    version, image, _ = (
        placed.name(field, required=False) for field in ("version", "image", "created_at")
    )
    if "patch" not in placed.row:
        problem = "is missing"
        remedy = "give the gold patch; an empty text where it is held back"
        raise InvalidArgument(f"{placed.where} field patch", problem, remedy)
    image = image or image_of(id)
    return Foreign(
        format=name,
        id=task_id(id, placed.where),
        package=repo,
        version=version or commit[:12],
        document=placed.document(),
        needs=(f"image {image}", f"git https://github.com/{repo} at {commit}"),
        kind="issue",
        fail_to_pass=failing,
        pass_to_pass_count=len(set(passing)),
    )


def image_of(id: str) -> str:
    """The image under which SWE-bench publishes an instance."""
    return f"swebench/sweb.eval.x86_64.{id.replace('__', '_1776_')}:latest".lower()


def write(items: Sequence[Item], out: Path) -> Written:
    """Write the tasks that have a known fix as one file of instances."""
    return write_rows(items, out / FILE, row)


def row(item: Item) -> dict[str, Any]:
    """A task as an instance.

    Raises:
        LeftOut: it cannot be one.
    """
    task = item.task
    if task.HasField("foreign"):
        return own_document(task, name)
    spec = task.environment
    return {
        "repo": repository(task),
        "instance_id": task.id,
        "base_commit": source_digest(task),
        "patch": gold_patch(item),
        "test_patch": "",
        "problem_statement": statement(task),
        "hints_text": "",
        "created_at": task.create_time.ToJsonString() if task.HasField("create_time") else "",
        "version": spec.version,
        "FAIL_TO_PASS": json.dumps(list(task.fail_to_pass)),
        "PASS_TO_PASS": json.dumps(sorted(item.pass_to_pass)),
        "environment_setup_commit": source_digest(task),
        "image": image_name(task),
        "eval_script": eval_script(task),
        "log_parser": "parse_log_pytest",
        "eval_type": "pass_and_fail",
        KEY: encode(item),
    }


def image_name(task: pb.Task) -> str:
    """The name under which the image of an exported task is expected."""
    return f"regreen/{task.id.lower()}:latest"


def eval_script(task: pb.Task) -> str:
    """How the harness of SWE-bench runs the tests inside the image."""
    words = ["/work/env/bin/python", "-m", "pytest", "-rA", "-p", "no:cacheprovider"]
    command = shlex.join([*words, *task.environment.test.arguments])
    return "\n".join(
        [
            "#!/bin/bash",
            "set -uxo pipefail",
            "cd /work/repo",
            f": '{START}'",
            command,
            f": '{END}'",
            "",
        ]
    )
