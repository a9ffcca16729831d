"""Writes a checkpoint, and reads its tensors back; `checkpoint` says what one is.

- One tensor is in memory at a time.
- Files are flushed to the disk and hashed beside each other, and while the next one is written: of
  a checkpoint's time that is most.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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


_THREADS = 4

Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor, by name, in the order in which they will be written."""


class CheckpointWriter:
    """Writes one checkpoint into a directory of its own; `commit` gives it its name."""

    def __init__(self, root: Path, step: int) -> None:
        self._root, self._step = root, step
        self.directory = root / f".partial-{step:08d}"
        self._pool = ThreadPoolExecutor(_THREADS, "checkpoint")
        self._entries: dict[str, Future[FileEntry]] = {}
        self._synced: list[Future[None]] = []

    def __enter__(self) -> "CheckpointWriter":
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def add_tensors(self, name: str, tensors: Iterable[tuple[str, Tensor]], sizes: Sizes) -> None:
        """Write a safetensors file, one tensor in memory at a time."""
        with disk_errors(self.directory):
            write_safetensors(self.directory / name, tensors, sizes)
            self._note(self.directory / name)

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
        """Take up a file that is written."""
        name = path.relative_to(self.directory).as_posix()
        self._synced.append(self._pool.submit(sync_path, path))
        self._entries[name] = self._pool.submit(entry_of, path)

    def commit(self, manifest: Manifest) -> Saved:
        """Flush everything and give the checkpoint its name."""
        with disk_errors(self.directory):
            for synced in self._synced:
                synced.result()
            files = {name: entry.result() for name, entry in self._entries.items()}
            complete = replace(manifest, files=files)
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


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]], sizes: Sizes) -> None:
    """Write tensors as they arrive, which is in the order of `sizes`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        names = iter(sizes)
        for name, tensor in tensors:
            expected = next(names, None)
            if name != expected or tensor.shape != sizes[name][1]:
                raise InfraError(f"tensor {name} came where {expected} was announced")
            raw = tensor.detach().to("cpu", sizes[name][0]).contiguous().reshape(-1)
            data = memoryview(raw.view(torch.uint8).numpy())  # type: ignore[arg-type]
            target.write(data)
            written += len(data)
        if written != end:
            raise InfraError(f"{path.name}: {written} of {end} bytes of tensors came")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt") as source:
        return {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
