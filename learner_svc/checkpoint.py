"""Checkpoints: a directory from which a run continues exactly, and which the policy can load.

Layout: `config.json`, tokenizer files and `model.safetensors` (all weights, f32) at the top,
`trainer.state` (AdamW moments, random state) or `engine/` (an engine's own format), of a run with
adapters `adapter/` (they alone, in PEFT's format; the weights are whole nevertheless), and
`manifest.json`, which names every file with size and SHA-256, and the run's position.

- A checkpoint exists whole under its name or not at all: written beside it, flushed, renamed.
- Nothing of a checkpoint is believed before its bytes match the manifest.
- Disk full leaves the previous checkpoint as it was, and nothing half-written behind.
- Retention removes the oldest, never the newest, and never before the newer one is on disk.
"""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regreen.blobs import digest_of_file
from regreen.rpc.errors import DataLoss, DiskFull, NotFound

FORMAT = "regreen-checkpoint-1"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
TRAINER = "trainer.state"
"""In the format of the weights, by a name that no server takes for weights: SGLang and others load
every `*.safetensors` of a folder."""
OLD_TRAINER = "trainer.safetensors"
"""As releases before named it."""
ENGINE = "engine"
ADAPTER = "adapter"
"""Directory of the adapters, in PEFT's format."""
SHARDS = ".shards-"
"""Beginning of the name of the directory in which ranks gather their shards."""
_NAME = re.compile(r"step-(\d{8})(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds and where the run stood."""

    run_id: str
    step: int
    updates: int
    policy_version: int
    created: str
    """ISO 8601, UTC."""
    spec: dict[str, Any]
    state_format: str
    group_ids: tuple[str, ...]
    """Groups consumed since the previous checkpoint."""
    consumed_groups: int
    """Groups consumed since the run began."""
    driver_step: int = 0
    """Step of the driver; 0 if it did not say, or before it could."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: str = FORMAT

    @property
    def weights(self) -> FileEntry:
        """The weights file."""
        return self.files[WEIGHTS]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on disk."""

    path: Path
    manifest: Manifest


def load_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        NotFound: no checkpoint at `path`.
        DataLoss: the manifest is damaged or of another format.
    """
    try:
        raw = json.loads((path / MANIFEST).read_text())
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        groups = tuple(raw.pop("group_ids"))
        manifest = Manifest(**raw, files=files, group_ids=groups)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"no checkpoint at {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"{path / MANIFEST} is damaged: {error}") from error
    if manifest.format != FORMAT or WEIGHTS not in manifest.files:
        raise DataLoss(f"{path} is a checkpoint of format {manifest.format!r}, not {FORMAT}")
    return manifest


def verify(path: Path, manifest: Manifest) -> None:
    """Hash every file.

    Raises:
        DataLoss: a file is missing, cut short or changed; names it.
    """
    for name, expected in manifest.files.items():
        file = path / name
        try:
            if file.stat().st_size != expected.size_bytes or entry_of(file) != expected:
                raise DataLoss(f"{file} does not match its digest; resume from another checkpoint")
        except OSError as error:
            raise DataLoss(f"{file} cannot be read: {error}") from error


def checkpoints(root: Path) -> list[Saved]:
    """Whole checkpoints under `root`, oldest first; damaged manifests are left out."""
    found: list[Saved] = []
    for path in sorted(root.glob("step-*"), key=_order) if root.is_dir() else []:
        if _NAME.fullmatch(path.name):
            try:
                found.append(Saved(path, load_manifest(path)))
            except (DataLoss, NotFound):
                continue
    return found


def free_directory(root: Path, step: int) -> Path:
    """Where a new checkpoint of a step belongs: a second one gets a suffix, and replaces nothing.

    The suffix is above all that are there: one that became free again would make the newest
    checkpoint look like the oldest, and `retain` would remove it.
    """
    name = f"step-{step:08d}"
    there = [_order(path)[1] for path in root.glob(f"{name}*") if _NAME.fullmatch(path.name)]
    return root / (f"{name}.{max(there) + 1}" if there else name)


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def retain(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for saved in checkpoints(root)[: -max(keep, 1)]:
        shutil.rmtree(saved.path, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what dead writers left behind; the caller is the only writer under `root`."""
    for pattern in (".partial-*", f"{SHARDS}*"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def need_space(root: Path, size_bytes: int) -> None:
    """Refuse early what cannot fit.

    Raises:
        DiskFull: fewer than `size_bytes` are free.
    """
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < size_bytes:
        raise DiskFull(
            f"a checkpoint takes {size_bytes >> 20} MiB, but {root} has {free >> 20} MiB free; "
            "the previous checkpoint is intact"
        )


def now() -> str:
    """The time as the manifest writes it."""
    return datetime.now(UTC).isoformat()


def copies_of(source: Path) -> list[Path]:
    """The small files of a model folder (configuration, tokenizer) that go with weights."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix in (".json", ".jinja", ".txt", ".model")
        and path.name not in (MANIFEST, "MANIFEST.json", "weights.json")
        and "index.json" not in path.name
    ]


def entry_of(path: Path) -> FileEntry:
    """Size and digest of a file as it is."""
    found = digest_of_file(path)
    return FileEntry(found.sha256, found.size_bytes)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn a full disk into `DiskFull`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(directory) from error
    except RuntimeError as error:
        # DeepSpeed saves through torch, which reports a full disk as a failed write.
        if "file write failed" not in str(error):
            raise
        raise _disk_full(directory) from error


def _disk_full(directory: Path) -> DiskFull:
    return DiskFull(
        f"no space left under {directory.parent}; the previous checkpoint is intact",
        retry_after_s=30.0,
    )
