"""Published weights: what a policy serves before the checkpoint that will hold them is whole.

Layout of `weights/` of a run: a folder for each publication, with the weights file, configuration
tokenizer and adapters, and `weights.json`, which names it; and `given.jsonl`.

- A folder is whole under its name or not there: written beside it, renamed. It is no checkpoint: it
  has no manifest, nothing goes on from it, and it lies where no checkpoint is looked for.
- A version number names one set of weights for ever. `given.jsonl` says, flushed, which digest each
  number was given to; it outlives the folders. Weights that a step gives again, bit for bit, have
  the number and the folder that they had; others have the next number that is free.
- Weights are not flushed: who loads them checks the digest. The checkpoint that shares their file
  flushes it.
- The newest few stay; their files are those of checkpoints, and take no room beside them.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from learner_svc.checkpoint import WEIGHTS, FileEntry, copies_of, disk_errors, now
from regreen.blobs import sync_path
from regreen.rpc.errors import NotFound

FORMAT = "regreen-weights-1"
_FOLDER = "weights"
KEPT = 2
"""What is served, and what is about to be."""
_ABOUT = "weights.json"
_GIVEN = "given.jsonl"


@dataclass(frozen=True, slots=True)
class Position:
    """Which weights of a run they are."""

    run_id: str
    step: int
    policy_version: int
    driver_step: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """Weights on disk."""

    path: Path
    position: Position
    entry: FileEntry
    created: str
    """ISO 8601, UTC; of weights that were published again, the last time."""

    @property
    def file(self) -> Path:
        """The weights file."""
        return self.path / WEIGHTS


def beside(checkpoints: Path) -> Path:
    """Where a run publishes whose checkpoints lie there."""
    return checkpoints.parent / _FOLDER


def publish(
    root: Path,
    position: Position,
    source: Path,
    write: Callable[[Path], FileEntry],
) -> Published:
    """Have the weights file written, and put the small files of the model folder `source` by it.

    Raises:
        DiskFull: no space; what was published before is intact.
    """
    partial = root / f".partial-{position.step:08d}"
    try:
        with disk_errors(partial):
            partial.mkdir(parents=True)
            entry = write(partial / WEIGHTS)
            for path in copies_of(source):
                shutil.copyfile(path, partial / path.name)
            version = give(root, position.policy_version, entry)
            given = replace(position, policy_version=version)
            path = root / f"v{version:08d}-{entry.sha256[:16]}"
            found = Published(path, given, entry, now())
            (partial / _ABOUT).write_text(_about(found))
            _put(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _retain(root, found)
    return found


def _put(partial: Path, path: Path) -> None:
    """Give a folder its name; where it is there, a policy may have it open, so only its files are
    replaced: what lies there may have been cut short by a loss of power."""
    if _read(path) is None:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        return
    files = [file for file in partial.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == _ABOUT):
        file.replace(path / file.relative_to(partial))


def give(root: Path, wanted: int, entry: FileEntry) -> int:
    """The version number of weights: `wanted`, or the next one that names no others; written down.

    Raises:
        DiskFull: it could not be written down.
    """
    given = _given(root)
    version = version_for(given, wanted, entry.sha256)
    if version not in given:
        with disk_errors(root / _GIVEN), (root / _GIVEN).open("a") as target:
            # On a line of its own: the one before may have been cut short.
            target.write("\n" + json.dumps({"version": version, "sha256": entry.sha256}) + "\n")
            target.flush()
            os.fsync(target.fileno())
        sync_path(root)
    return version


def named(root: Path, wanted: int, entry: FileEntry) -> int:
    """As `give`, of weights that are not published; nothing is written down."""
    return version_for(_given(root), wanted, entry.sha256)


def version_for(given: Mapping[int, str], wanted: int, sha256: str) -> int:
    """`wanted`, or the next number above it that was given to these weights or to none."""
    version = wanted
    while given.get(version, sha256) != sha256:
        version += 1
    return version


def at(path: Path) -> Published:
    """What a folder holds.

    Raises:
        NotFound: it is not there, or not whole.
    """
    found = _read(path)
    if found is None:
        raise NotFound(f"no weights at {path}")
    return found


def newest(checkpoints: Path) -> Published | None:
    """What the run whose checkpoints lie there published last, if it is still there."""
    found = _published(beside(checkpoints))
    return found[-1] if found else None


def _given(root: Path) -> dict[int, str]:
    try:
        lines = (root / _GIVEN).read_text().splitlines()
    except FileNotFoundError:
        return {}
    found: dict[int, str] = {}
    for line in lines:
        try:
            raw = json.loads(line)
            found[int(raw["version"])] = str(raw["sha256"])
        except (ValueError, KeyError, TypeError):
            continue  # cut short: its number was not answered
    return found


def _about(published: Published) -> str:
    raw = {"format": FORMAT, "created": published.created, "entry": asdict(published.entry)}
    return json.dumps(asdict(published.position) | raw, indent=1)


def _read(path: Path) -> Published | None:
    """What a folder holds; None if it is not whole."""
    try:
        raw: dict[str, Any] = json.loads((path / _ABOUT).read_text())
        if raw.pop("format") != FORMAT:
            return None
        entry, created = FileEntry(**raw.pop("entry")), str(raw.pop("created"))
        found = Published(path, Position(**raw), entry, created)
        return found if found.file.stat().st_size == entry.size_bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _published(root: Path) -> list[Published]:
    """Oldest first."""
    found = [one for path in root.glob("v*") if (one := _read(path)) is not None]
    return sorted(found, key=lambda one: (one.created, one.position.policy_version))


def _retain(root: Path, latest: Published) -> None:
    kept = {one.path for one in _published(root)[-KEPT:]} | {latest.path}
    for path in root.glob("v*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
