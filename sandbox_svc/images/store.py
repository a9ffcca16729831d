"""Images into a state store and out of it.

- An image is one state: its id is that of its configuration's digest, its layers are directories
  named by what they hold, so that images share them. Importing one again finds the state.
- Everything is checked before anything is visible: an archive is refused whole, or its layers
  appear, and then its state. What a crash leaves is a draft or a layer without a state, and both
  are swept at start.
- An archive lies on disk once while it is read; packed or unpacked it stays below `max_bytes`.
- Once an archive has come whole, it is taken to its end, whether or not the caller still waits;
  only the end of the service cuts that short.
- What cannot be an archive is refused by its first block. Imports and exports have places apart,
  and an archive keeps its place until it is taken (`pace`).
- Blocking work is in threads of its own; none of them waits for a client.
"""

import asyncio
import contextlib
import hashlib
import io
import os
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from regreen.rpc.tenants import charged
from sandbox_svc import pace
from sandbox_svc.backends.base import HOST_BASE, Runtime
from sandbox_svc.backends.fds import writing
from sandbox_svc.backends.tree_archive import Quota
from sandbox_svc.hosts import platform_name
from sandbox_svc.images import manifest
from sandbox_svc.images.archive import Archive
from sandbox_svc.images.manifest import Format, Image
from sandbox_svc.images.pack import image_archive
from sandbox_svc.images.streams import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    Slice,
    TarStream,
    check_start,
    damaged,
    unpacked,
)
from sandbox_svc.images.unpack import NOTES, OPAQUE, LayerUnpacker
from sandbox_svc.pace import IDLE_S, Places
from sandbox_svc.state_records import State, image_action, state_id
from sandbox_svc.states import StateStore
from sandbox_svc.transfer import LayerFiles, layer_files

AT_ONCE = 4
"""Imports, and exports, under way at a time."""
_REFERENCE = re.compile(r"[a-z0-9][a-z0-9._/:-]{0,200}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?")
_VERSION = "1"
"""Of the way layers are unpacked; another one makes other layers."""


def layer_id(diff_id: str) -> str:
    """Name of the layer that an image's layer becomes."""
    return hashlib.sha256(f"regreen-image-layer-{_VERSION}\n{diff_id}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Taken:
    """An image whose layers are all here."""

    image: Image
    layers: tuple[str, ...]
    counts: Mapping[str, Mapping[str, tuple[int, str]]]
    """Per layer, what of it was dropped."""


@dataclass(slots=True)
class _Quota(Quota):
    """A quota that ends early when the service does."""

    stopping: threading.Event = field(default_factory=threading.Event)

    def take_bytes(self, size_bytes: int) -> None:
        """Count bytes alone.

        Raises:
            ResourceExhausted: the archive is over its bound.
            Unavailable: the service stops.
        """
        if self.stopping.is_set():
            raise Unavailable("the service stops; send the archive again")
        Quota.take_bytes(self, size_bytes)


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2 * AT_ONCE, thread_name_prefix="sandbox-images")


@dataclass(frozen=True, slots=True)
class Images:
    """Imports and exports images of one store."""

    states: StateStore
    runtime: Runtime
    max_bytes: int = 16 << 30
    idle_s: float = IDLE_S
    """An import of which nothing came for so long is ended."""
    threads: ThreadPoolExecutor = field(default_factory=_threads)
    imports: Places = field(default_factory=lambda: Places("imports of images", AT_ONCE))
    exports: Places = field(default_factory=lambda: Places("exports of images", AT_ONCE))
    _taking: set["asyncio.Task[State]"] = field(default_factory=set)
    _stopping: threading.Event = field(default_factory=threading.Event)

    async def close(self) -> None:
        """Give up archives that are being unpacked, and wait until nothing is left of them."""
        self._stopping.set()
        await asyncio.gather(*self._taking, return_exceptions=True)
        self.threads.shutdown(wait=False)

    async def import_(
        self,
        chunks: AsyncIterator[bytes],
        *,
        kind: Format = Format.UNKNOWN,
        reference: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> tuple[State, Sequence[str]]:
        """The state of an image, and what of the image does not hold in a sandbox.

        Raises:
            InvalidArgument: a malformed or hostile archive, or no image for this machine.
            FailedPrecondition: the runtime has no layers as directories.
            ResourceExhausted: it is larger than allowed, too many imports are under way, or the
                quota of the caller's tenant is used up.
            DeadlineExceeded: nothing of it came for a while.
        """
        files = layer_files(self.runtime)
        self.states.owners.admit()
        moving = pace.moving(chunks, self.idle_s)
        async with pace.heard(moving), contextlib.AsyncExitStack() as place:
            await place.enter_async_context(self.imports.taken())
            head = await _head(moving)
            with writing():
                spool = files.draft_layer()
            try:
                await self._receive(spool / "sent", head, moving)
            except BaseException:
                await asyncio.shield(self._blocking(files.discard, spool))
                raise
            work = self._take(files, spool, kind, reference, dict(labels or {}), place.pop_all())
        task = asyncio.create_task(work)
        self._taking.add(task)
        task.add_done_callback(self._done)
        state = await asyncio.shield(task)
        return state, notes_of(state)

    def _done(self, task: "asyncio.Task[State]") -> None:
        self._taking.discard(task)
        if not task.cancelled():
            task.exception()

    async def _blocking(self, call: Any, *args: object) -> Any:
        """Run a call in a thread, to its end: what it writes to stays open as long."""
        work = asyncio.get_running_loop().run_in_executor(self.threads, call, *args)
        try:
            return await asyncio.shield(work)
        finally:
            await asyncio.wait([work])

    async def _receive(self, path: Path, head: bytes, chunks: AsyncIterator[bytes]) -> None:
        held, size = [head], len(head)
        total = 0
        with writing(), path.open("xb", buffering=0) as target:
            path.chmod(0o600)
            async for chunk in chunks:
                held.append(chunk)
                size += len(chunk)
                if size < CHUNK_BYTES:
                    continue
                total += size
                await self._blocking(_append, target.fileno(), b"".join(held))
                held, size = [], 0
                if total > self.max_bytes:
                    raise _too_large()
            await self._blocking(_append, target.fileno(), b"".join(held))

    async def _take(
        self,
        files: LayerFiles,
        spool: Path,
        kind: Format,
        reference: str,
        labels: Mapping[str, str],
        place: contextlib.AsyncExitStack,
    ) -> State:
        quota = _Quota(self.max_bytes, stopping=self._stopping)
        try:
            with self.states.growing():
                await self.states.undisturbed()
                taken = await self._blocking(_take_archive, files, spool, kind, reference, quota)
                return await self._recorded(taken, labels)
        except BaseException:
            await self.states.collect()
            raise
        finally:
            async with place:
                await self._blocking(files.discard, spool)

    async def _recorded(self, taken: _Taken, labels: Mapping[str, str]) -> State:
        settings = manifest.settings_of(taken.image)
        action = image_action(taken.image.config_sha256)
        known = self.states.peek(state_id("", action))
        if known is not None and known.layers == taken.layers:
            self.states.owners.admit_share(known)
            return await self.states.owners.share(known)
        counts = dict(self._known_counts(taken.layers)) | dict(taken.counts)
        sizes = [await self.runtime.layer_size(layer) for layer in taken.layers]
        self.states.owners.admit(sum(sizes))
        state = self.states.stamp(
            State(
                id=state_id("", action),
                layers=taken.layers,
                size_bytes=sum(sizes),
                env=settings.env,
                cwd=settings.cwd,
                labels={**settings.labels, **labels},
                host=platform_name(),
                base=f"image:sha256:{taken.image.config_sha256}",
                metadata={"image": {"config": dict(taken.image.config), "counts": counts}},
                tenants=(charged(),),
            )
        )
        return self.states.record(state)

    def _known_counts(self, layers: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """What was dropped of layers that were unpacked for another image."""
        for state in self.states.every():
            for layer, counts in _counts_of(state).items():
                if layer in layers:
                    yield layer, counts

    async def export(self, state_id: str, reference: str = "") -> AsyncGenerator[bytes, None]:
        """A state of an image as an image archive, in pieces.

        Raises:
            NotFound: no such state.
            FailedPrecondition: it stands on the host, or holds what no image can hold.
            InvalidArgument: a malformed reference.
            ResourceExhausted: too many exports are under way; carries a delay.
        """
        state, files = self.states.get(state_id), layer_files(self.runtime)
        if state.base == HOST_BASE:
            raise FailedPrecondition(
                f"state {state_id} stands on the programs of its host; export it with ExportState",
                metadata={"id": state_id},
            )
        if reference and not _REFERENCE.fullmatch(reference):
            raise InvalidArgument(
                "reference", f"{reference[:200]!r} is no name", "give one such as work:latest"
            )
        if reference and ":" not in reference.rpartition("/")[2]:
            reference += ":latest"
        exported = self._exported(state, files, reference)
        async with self.exports.taken(), contextlib.aclosing(exported) as pieces:
            async for piece in pieces:
                yield piece

    async def _exported(
        self, state: State, files: LayerFiles, reference: str
    ) -> AsyncGenerator[bytes, None]:
        state = self.states.known(state.id)  # as it is after the wait
        self.states.hold(state.layers)
        try:
            tops = [files.layer_path(layer) for layer in state.layers]
            pieces = image_archive(tops, _config_of(state), reference, max_bytes=self.max_bytes)
            loop = asyncio.get_running_loop()
            step = loop.run_in_executor(self.threads, _piece, pieces)
            try:
                while piece := await asyncio.shield(step):
                    yield piece
                    step = loop.run_in_executor(self.threads, _piece, pieces)
            finally:
                await asyncio.wait([step])
                pieces.close()
        finally:
            self.states.release(state.layers)


def _piece(pieces: Iterator[bytes]) -> bytes:
    with writing("an archive"):
        return next(pieces, b"")


def notes_of(state: State) -> Sequence[str]:
    """What of an image does not hold in a sandbox, for people."""
    sums: dict[str, tuple[int, str]] = {}
    for layer in state.layers:
        for kind, (count, example) in _counts_of(state).get(layer, {}).items():
            before, first = sums.get(kind, (0, example))
            sums[kind] = before + count, first
    return [
        text.format(count=sums[kind][0], example=sums[kind][1])
        for kind, text in NOTES.items()
        if kind in sums
    ]


def _facts_of(state: State) -> Mapping[str, Any]:
    facts = state.metadata.get("image")
    return facts if isinstance(facts, dict) else {}


def _counts_of(state: State) -> Mapping[str, Any]:
    """Per layer what was dropped; the record may have come from another service."""
    found = _facts_of(state).get("counts")
    if not isinstance(found, dict):
        return {}
    return {
        layer: counts
        for layer, counts in found.items()
        if isinstance(counts, dict) and all(map(_is_count, counts.values()))
    }


def _is_count(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and isinstance(value[0], int)
        and isinstance(value[1], str)
    )


def _config_of(state: State) -> Mapping[str, Any]:
    """The configuration of the image that a state stands on."""
    system, _, machine = state.host.partition("/")
    config = _facts_of(state).get("config")
    found = dict(config) if isinstance(config, dict) else {}
    return {**found, "os": system, "architecture": machine}


def _too_large() -> ResourceExhausted:
    return ResourceExhausted("the archive is larger than this service takes (import_bytes)")


async def _head(chunks: AsyncIterator[bytes]) -> bytes:
    """The beginning of an archive, which may be one.

    Raises:
        InvalidArgument: it cannot.
    """
    head = b""
    while len(head) < BLOCK_BYTES:
        chunk = await anext(chunks, b"")
        if not chunk:
            return head
        head += chunk
    check_start(head)
    return head


def _append(fd: int, data: bytes) -> None:
    view = memoryview(data)
    with writing():
        while view:
            view = view[os.write(fd, view) :]


def _take_archive(
    files: LayerFiles, spool: Path, kind: Format, reference: str, quota: Quota
) -> _Taken:
    """Check an archive, unpack what of it is not here yet, make that visible."""
    drafts: dict[str, Path] = {}
    try:
        with writing(), Archive(_plain(spool, quota.size_bytes)) as archive:
            archive.index(Quota(quota.size_bytes))
            image = manifest.find_image(archive, kind, reference, platform_name())
            found: dict[str, Mapping[str, tuple[int, str]]] = {}
            diffs = []
            for layer in image.layers:
                diff = _unpack(files, archive, layer, quota, drafts, found)
                diffs.append(diff)
            if not image.config:
                config = manifest.root_config(diffs[0], platform_name())
                image = replace(image, config=config, config_sha256=_sha256(config))
            manifest.settings_of(image)
            names = _visible(files, [layer_id(diff) for diff in diffs], drafts)
            for name in set(names).intersection(drafts):
                files.adopt_layer(drafts.pop(name), name)
            return _Taken(image, names, found)
    finally:
        for draft in drafts.values():
            files.discard(draft)


def _sha256(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(manifest.encoded(config)).hexdigest()


def _unpack(
    files: LayerFiles,
    archive: Archive,
    layer: manifest.Layer,
    quota: Quota,
    drafts: dict[str, Path],
    found: dict[str, Mapping[str, tuple[int, str]]],
) -> str:
    """Unpack one layer unless it is here, check its digest in any case; the digest."""
    source = unpacked(archive.open(layer.name)) if layer.name else archive.whole()
    stream = TarStream(source, quota)
    name = layer_id(layer.diff_id) if layer.diff_id else ""
    if name and (name in drafts or files.layer_path(name).is_dir()):
        diff = stream.finish()
    else:
        draft = files.draft_layer()
        drafts[str(draft)] = draft
        with LayerUnpacker(draft, files.owner, quota) as unpacker:
            unpacker.take(stream)
        diff = stream.finish()
        name = layer_id(diff)
        drafts[name] = drafts.pop(str(draft))
        found[name] = unpacker.counts
    if layer.diff_id and diff != layer.diff_id:
        raise damaged(
            f"has a layer {layer.name[:100]!r} whose content is sha256:{diff}, and the "
            f"configuration says sha256:{layer.diff_id}"
        )
    return diff


def _visible(
    files: LayerFiles, names: Sequence[str], drafts: Mapping[str, Path]
) -> tuple[str, ...]:
    """Layers that show: each once, at its last place, and none below one that hides everything."""
    kept: list[str] = []
    for name in reversed(names):
        if name in kept:
            continue
        kept.append(name)
        top = drafts.get(name) or files.layer_path(name)
        if OPAQUE in os.listxattr(top):
            break
    return tuple(reversed(kept))


@dataclass(frozen=True, slots=True)
class _Copied:
    """A stream that is written down as it is read."""

    source: BinaryIO
    target: BinaryIO

    def read(self, size: int) -> bytes:
        """What comes next."""
        data = self.source.read(size)
        self.target.write(data)
        return data


def _plain(spool: Path, max_bytes: int) -> Path:
    """The archive as a plain file: one that was compressed as a whole is unpacked first.

    Raises:
        InvalidArgument: what was compressed is no tar archive, or one of nothing.
    """
    sent = spool / "sent"
    fd = os.open(sent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        source = unpacked(Slice(fd, 0, os.fstat(fd).st_size))
        if isinstance(source, io.BufferedReader):
            return sent
        plain = spool / "plain"
        with plain.open("xb") as target:
            stream = TarStream(_Copied(source, target), Quota(max_bytes))
            if not sum(1 for _ in stream.members()):
                raise damaged("holds nothing")
            stream.finish()
        sent.unlink()
        return plain
    finally:
        os.close(fd)
