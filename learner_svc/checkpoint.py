"""Checkpoints: a directory from which a run continues exactly, and which the policy can load.

Layout: `config.json`, tokenizer files and `model.safetensors` (all weights, f32) at the top,
`trainer.safetensors` (AdamW moments, random state) or `engine/` (an engine's own format), and
`manifest.json`, which names every file with size and SHA-256, and the run's position.

- A checkpoint exists whole under its name or not at all: written beside it, flushed, renamed.
- Nothing of a checkpoint is believed before its bytes match the manifest.
- Disk full leaves the previous checkpoint as it was, and nothing half-written behind.
- Retention removes the oldest, never the newest, and never before the newer one is on disk.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from regreen.blobs import digest_of_file, sync_path
from regreen.rpc.errors import DataLoss, DiskFull, InfraError, NotFound

FORMAT = "regreen-checkpoint-1"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
TRAINER = "trainer.safetensors"
ENGINE = "engine"
SHARDS = ".shards-"
"""Beginning of the name of the directory in which ranks gather their shards."""
_NAME = re.compile(r"step-(\d{8})(?:\.(\d+))?")
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


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


class CheckpointWriter:
    """Writes one checkpoint into a directory of its own; `commit` gives it its name."""

    def __init__(self, root: Path, step: int) -> None:
        self._root, self._step = root, step
        self.directory = root / f".partial-{step:08d}"
        self._files: dict[str, FileEntry] = {}

    def __enter__(self) -> "CheckpointWriter":
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True)
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def add_tensors(self, name: str, tensors: Iterable[tuple[str, Tensor]], sizes: "Sizes") -> None:
        """Write a safetensors file, one tensor in memory at a time."""
        with disk_errors(self.directory):
            self._files[name] = write_safetensors(self.directory / name, tensors, sizes)

    def add_copies(self, source: Path) -> None:
        """Copy the small files of a model folder (configuration, tokenizer)."""
        with disk_errors(self.directory):
            for path in sorted(source.iterdir()):
                if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model"):
                    if path.name in (MANIFEST, "MANIFEST.json") or "index.json" in path.name:
                        continue
                    if path.name.startswith("gguf_header"):
                        continue
                    shutil.copyfile(path, self.directory / path.name)
                    self._note(self.directory / path.name)

    def add_directory(self, name: str, write: Callable[[Path], None]) -> None:
        """Let an engine write a sub-directory."""
        with disk_errors(self.directory):
            write(self.directory / name)
            for path in sorted((self.directory / name).rglob("*")):
                if path.is_file():
                    self._note(path)

    def _note(self, path: Path) -> None:
        sync_path(path)
        name = path.relative_to(self.directory).as_posix()
        self._files[name] = _entry(path)

    def commit(self, manifest: Manifest) -> Saved:
        """Flush everything and give the checkpoint its name."""
        complete = Manifest(**{**_fields(manifest), "files": dict(self._files)})
        with disk_errors(self.directory):
            target = self.directory / MANIFEST
            target.write_text(json.dumps(asdict(complete), indent=1, sort_keys=True))
            sync_path(target)
            sync_path(self.directory)
            final = self._free_name()
            self.directory.rename(final)
            sync_path(final.parent)
        return Saved(final, complete)

    def _free_name(self) -> Path:
        """A second checkpoint of one step gets a suffix: nothing whole is ever overwritten."""
        final = self._root / f"step-{self._step:08d}"
        again = 1
        while final.exists():
            again += 1
            final = self._root / f"step-{self._step:08d}.{again}"
        return final


Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor, by name, in the order in which they will be written."""


def sizes_of(tensors: dict[str, Tensor]) -> Sizes:
    """Types and shapes of tensors at hand."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]], sizes: Sizes) -> FileEntry:
    """Write and hash in one pass; tensors arrive in the order of `sizes`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hasher = hashlib.sha256()
    written = 0
    with path.open("wb") as target:
        for chunk in (len(text).to_bytes(8, "little"), text):
            target.write(chunk)
            hasher.update(chunk)
        names = iter(sizes)
        for name, tensor in tensors:
            expected = next(names, None)
            if name != expected or tensor.shape != sizes[name][1]:
                raise InfraError(f"tensor {name} came where {expected} was announced")
            raw = tensor.detach().to("cpu", sizes[name][0]).contiguous().reshape(-1)
            data = memoryview(raw.view(torch.uint8).numpy())  # type: ignore[arg-type]
            target.write(data)
            hasher.update(data)
            written += len(data)
        if written != end:
            raise InfraError(f"{path.name}: {written} of {end} bytes of tensors came")
        target.flush()
        os.fsync(target.fileno())
    return FileEntry(hasher.hexdigest(), 8 + len(text) + end)


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
            if file.stat().st_size != expected.size_bytes or _entry(file) != expected:
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt") as source:
        return {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118


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


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}


def _entry(path: Path) -> FileEntry:
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
