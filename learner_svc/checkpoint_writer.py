"""Writes a checkpoint, and reads its tensors back; `checkpoint` says what one is.

- What is written is hashed in the same pass, one tensor in memory at a time.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from learner_svc.checkpoint import (
    MANIFEST,
    FileEntry,
    Manifest,
    Saved,
    disk_errors,
    entry_of,
    free_directory,
)
from regreen.blobs import sync_path
from regreen.rpc.errors import InfraError

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor, by name, in the order in which they will be written."""


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

    def add_tensors(self, name: str, tensors: Iterable[tuple[str, Tensor]], sizes: Sizes) -> None:
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
        self._files[name] = entry_of(path)

    def commit(self, manifest: Manifest) -> Saved:
        """Flush everything and give the checkpoint its name."""
        complete = replace(manifest, files=dict(self._files))
        with disk_errors(self.directory):
            target = self.directory / MANIFEST
            target.write_text(json.dumps(asdict(complete), indent=1, sort_keys=True))
            sync_path(target)
            sync_path(self.directory)
            final = free_directory(self._root, self._step)
            self.directory.rename(final)
            sync_path(final.parent)
        return Saved(final, complete)


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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt") as source:
        return {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
