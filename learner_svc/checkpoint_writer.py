"""Writes a checkpoint, and reads its tensors back; `checkpoint` says what one is.

- One tensor is in memory at a time, two while one is hashed.
- A tensor is hashed while it is written, and files are flushed to the disk while the next one is
  written: of a checkpoint's time that is most.
- The threads of a checkpoint give way to others: beside it a policy builds what will serve.
- Weights that were published are not written again: their file gets one more name.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from learner_svc.checkpoint import (
    MANIFEST,
    FileEntry,
    Manifest,
    Saved,
    copies_of,
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
_NICE = 10

Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor, by name, in the order in which they will be written."""


class CheckpointWriter:
    """Writes one checkpoint into a directory of its own; `commit` gives it its name."""

    def __init__(self, root: Path, step: int) -> None:
        self._root, self._step = root, step
        self.directory = root / f".partial-{step:08d}"
        self._pool = ThreadPoolExecutor(_THREADS, "checkpoint", _give_way)
        self._entries: dict[str, Future[FileEntry]] = {}
        self._synced: list[Future[None]] = []

    def __enter__(self) -> "CheckpointWriter":
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def add_tensors(
        self,
        name: str,
        tensors: Iterable[tuple[str, Tensor]],
        sizes: Sizes,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write a safetensors file, one tensor in memory at a time."""
        with disk_errors(self.directory):
            path = self.directory / name
            written = self._pool.submit(write_safetensors, path, tensors, sizes, notes, _give_way)
            self._note(path, written.result())

    def add_link(self, name: str, source: Path, entry: FileEntry) -> None:
        """Take up a file that is written, under one more name; a copy where there are no links."""
        with disk_errors(self.directory):
            try:
                os.link(source, self.directory / name)
                self._note(self.directory / name, entry)
            except OSError:
                shutil.copyfile(source, self.directory / name)
                self._note(self.directory / name)

    def add_copies(self, source: Path) -> None:
        """Copy the small files of a model folder (configuration, tokenizer)."""
        with disk_errors(self.directory):
            for path in copies_of(source):
                shutil.copyfile(path, self.directory / path.name)
                self._note(self.directory / path.name)

    def add_directory(self, name: str, write: Callable[[Path], object]) -> None:
        """Let an engine write a sub-directory."""
        with disk_errors(self.directory):
            write(self.directory / name)
            for path in sorted((self.directory / name).rglob("*")):
                if path.is_file():
                    self._note(path)

    def _note(self, path: Path, entry: FileEntry | None = None) -> None:
        """Take up a file that is written; it is hashed where its entry is not known."""
        name = path.relative_to(self.directory).as_posix()
        self._synced.append(self._pool.submit(sync_path, path))
        known = (lambda: entry) if entry is not None else (lambda: entry_of(path))
        self._entries[name] = self._pool.submit(known)

    def entry(self, name: str) -> FileEntry:
        """Size and digest of a file that was taken up."""
        return self._entries[name].result()

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


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    sizes: Sizes,
    notes: Mapping[str, str] | None = None,
    begin: Callable[[], None] = lambda: None,
) -> FileEntry:
    """Write tensors as they arrive, which is in the order of `sizes`; size and digest.

    `notes` stand in the file's metadata; the thread that hashes calls `begin` first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(notes or {})}}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target, _Hashing(target, begin) as hashing:
        hashing.write(len(text).to_bytes(8, "little") + text)
        names = iter(sizes)
        for name, tensor in tensors:
            expected = next(names, None)
            if name != expected or tensor.shape != sizes[name][1]:
                raise InfraError(f"tensor {name} came where {expected} was announced")
            raw = tensor.detach().to("cpu", sizes[name][0]).contiguous().reshape(-1)
            hashing.write(memoryview(raw.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        written = hashing.size_bytes - len(text) - 8
        if written != end:
            raise InfraError(f"{path.name}: {written} of {end} bytes of tensors came")
        return hashing.entry()


def _give_way() -> None:
    """Have this thread run when others need not."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class _Hashing:
    """Writes a file and hashes, in a thread of its own, what is written."""

    def __init__(self, target: BinaryIO, begin: Callable[[], None]) -> None:
        self._target, self._digest = target, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "hash", begin)
        self._last: Future[None] | None = None
        self.size_bytes = 0

    def __enter__(self) -> "_Hashing":
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()

    def write(self, data: bytes | memoryview) -> None:
        """Write, while the bytes before these may still be hashed."""
        before, self._last = self._last, self._thread.submit(self._digest.update, data)
        self._target.write(data)
        self.size_bytes += len(data)
        if before is not None:
            before.result()

    def entry(self) -> FileEntry:
        """Size and digest of what was written."""
        if self._last is not None:
            self._last.result()
        return FileEntry(self._digest.hexdigest(), self.size_bytes)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as source:
            self._names: list[str] = [*source.keys()]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as source:
            tensor: Tensor = source.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
