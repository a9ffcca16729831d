"""BUMP: one JSON file a breaking dependency update of a Maven project.

- The project and its dependencies live in an image that the file names; Java and Maven build it.
  It is kept with that need and never counted as prepared or verified.
- The file does not name tests: what must pass again is the build.
- Only tasks that came from BUMP are written as BUMP.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.formats.items import Foreign, Item, Native, Written, task_id
from regreen.tasks.formats.rows import Placed, read_rows

name = "bump"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_IMAGE = re.compile(r"docker run (?:--?\S+ )*([A-Za-z0-9][A-Za-z0-9./_:@-]*)$")
CATEGORIES = {
    "COMPILATION_FAILURE": "compile-error",
    "TEST_FAILURE": "test-failure",
    "ENFORCER_FAILURE": "enforcer",
    "DEPENDENCY_LOCK_FAILURE": "dependency-lock",
    "DEPENDENCY_RESOLUTION_FAILURE": "resolution-conflict",
    "WERROR_FAILURE": "warnings-as-errors",
}
"""Failure categories of BUMP, and ours."""


def read(path: Path) -> list[Foreign | Native]:
    """Updates of a file, or of every JSON file of a directory.

    Raises:
        InvalidArgument: names the file, the field and the remedy.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InvalidArgument(str(path), "has no JSON file", "name BUMP's data/benchmark folder")
    return [update(placed) for file in files for placed in read_rows(file)]


def update(placed: Placed) -> Foreign:
    """One update."""
    commit, project = placed.name("breakingCommit"), placed.name("project")
    if not _COMMIT.fullmatch(commit):
        problem = f"is {commit[:50]!r}, no commit"
        remedy = "give 40 hexadecimal digits"
        raise InvalidArgument(f"{placed.where} field breakingCommit", problem, remedy)
    inner = placed.row.get("updatedDependency")
    if not isinstance(inner, dict):
        field = f"{placed.where} field updatedDependency"
        raise InvalidArgument(field, "is missing or no object", "give the dependency that moved")
    moved = Placed(f"{placed.where} field updatedDependency", inner)
    group, artifact = moved.name("dependencyGroupID"), moved.name("dependencyArtifactID")
    category = placed.text("failureCategory")
    if category not in CATEGORIES:
        known = ", ".join(sorted(CATEGORIES))
        problem = f"{category!r} is not known"
        raise InvalidArgument(f"{placed.where} field failureCategory", problem, f"give {known}")
    command = placed.text("breakingUpdateReproductionCommand")
    image = _IMAGE.search(command.strip())
    if image is None:
        field = f"{placed.where} field breakingUpdateReproductionCommand"
        problem = f"{command[:80]!r} names no image"
        raise InvalidArgument(field, problem, "give `docker run IMAGE`")
    java = placed.name("javaVersionUsedForReproduction")
    licence = placed.name("licenseInfo", required=False)
    return Foreign(
        format=name,
        id=task_id(f"{project}-{commit}", placed.where),
        package=f"{placed.name('projectOrganisation')}/{project}",
        version=commit[:12],
        document=placed.document(),
        needs=(f"image {image[1]}", f"a builder for Maven with Java {java}"),
        kind="dependency-upgrade",
        category=CATEGORIES[category],
        keep_new=True,
        culprit=(f"{group}:{artifact}", moved.name("previousVersion"), moved.name("newVersion")),
        licence="" if licence in ("NOASSERTION", "No license found") else licence,
    )


def write(items: Sequence[Item], out: Path) -> Written:
    """Write the tasks that came from BUMP, one file each."""
    written = Written()
    for item in items:
        foreign = item.task.foreign
        if foreign.format != name:
            written.left_out[item.task.id] = "is no Maven build of BUMP"
            continue
        document = json.loads(foreign.document_json)
        update(Placed(f"task {item.task.id}", document))  # what names the file is a commit
        path = out / f"{document['breakingCommit']}.json"
        if path in written.paths:
            written.left_out[item.task.id] = "has the breaking commit of another task"
            continue
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
        written.paths.append(path)
        written.count += 1
    return written
