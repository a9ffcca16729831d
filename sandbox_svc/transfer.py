"""States as archives: one tar with the record first and the layers after it, lowest first.

- The last entry holds a SHA-256 of all before its content; archives from before it hold nothing
  there, are taken all the same, and the answer says that nothing vouches for them.
- Headers are bounded as those of images are (`TarStream`), and what was unpacked is not held.
- The archive holds layers, not mounts: wheelhouse, tools and interpreters are named relative to
  the service's directories and must be on the host that runs the state.
- An imported record may only mount what this service itself offers to sandboxes, read-only.
- An archive that a tenant sends becomes a state of its own (`tenancy`); who sees everything takes
  states as they are, and whose they are.
- Import is whole or nothing: layers become visible one by one, the state only at the end; on any
  error the layers go again.
- Blocking tar work happens in threads of its own, one per transfer; the event loop holds the other
  end of a pipe and never waits in a thread for it. A thread does wait for its client, so transfers
  have places, exports and imports apart, and one that stands still loses its own (`pace`).
"""

import asyncio
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, TypeVar, cast

from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from regreen.rpc.tenants import charged, own
from sandbox_svc import pace
from sandbox_svc.backends.base import HOST_BASE, Mount, Runtime
from sandbox_svc.backends.fds import writing
from sandbox_svc.backends.tree_archive import Quota, TreeReader, write_tree
from sandbox_svc.images.streams import TarStream
from sandbox_svc.state_records import State, image_action, state_id
from sandbox_svc.states import StateStore
from sandbox_svc.tenancy import labels_of, word_of

_CHUNK_BYTES = 1 << 20
_END = "end"
"""Name of the last entry: an archive without it was cut short."""
_END_BYTES = 1 << 10
_RECORD_BYTES = 16 << 20
_ENTRY_BYTES = 2 << 10
"""Of an archive beside the content of files, for each entry that it may have."""
OWN_WORD = "it is another state than {id}, which it names: that of your tenant's archive"
UNVOUCHED = "the archive holds no digest of its content, it was exported before there were any"
_RESEND = "send one as ExportState gave it"
_T = TypeVar("_T")
_ID = re.compile(r"st_[0-9a-f]{32}")


class LayerFiles(Protocol):
    """What a runtime needs to offer so that its layers can travel."""

    def layer_path(self, layer: str) -> Path:
        """Directory of a layer."""
        ...

    def draft_layer(self) -> Path:
        """A fresh directory to unpack into."""
        ...

    def adopt_layer(self, draft: Path, layer: str = "") -> str:
        """Turn an unpacked directory into a layer, named by its content if so told; its id."""
        ...

    def discard(self, path: Path) -> None:
        """Remove a directory."""
        ...

    @property
    def owner(self) -> int | None:
        """Host id that files of layers must have; None when it is the service's own."""
        ...


def layer_files(runtime: Runtime) -> LayerFiles:
    """The layers of a runtime as directories.

    Raises:
        FailedPrecondition: it has none.
    """
    files = getattr(runtime, "layer_files", None)
    if files is None:
        raise FailedPrecondition(
            f"the {runtime.name} backend cannot export or import states; use the embedded backend"
        )
    found: LayerFiles = files()
    return found


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2 * pace.AT_ONCE, thread_name_prefix="sandbox-transfer")


@dataclass(frozen=True, slots=True)
class Transfer:
    """Exports and imports states of one store."""

    states: StateStore
    runtime: Runtime
    roots: Callable[[], dict[str, Path]]
    """Directories that imported states may mount: name to path."""
    max_bytes: int = 16 << 30
    """Of the files of one archive, either way."""
    idle_s: float = pace.IDLE_S
    """An import of which nothing came for so long is ended."""
    threads: ThreadPoolExecutor = field(default_factory=_threads)
    exports: pace.Places = field(default_factory=lambda: pace.Places("exports"))
    imports: pace.Places = field(default_factory=lambda: pace.Places("imports"))

    async def export(self, state_id: str) -> AsyncGenerator[bytes, None]:
        """The archive of a state, in pieces.

        Raises:
            NotFound: no such state.
            FailedPrecondition: it holds what cannot be exported, or more than `max_bytes`.
            ResourceExhausted: too many exports are under way; carries a delay.
        """
        self.states.get(state_id)
        async with self.exports.taken():
            chunks = self._exported(self.states.get(state_id))
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    yield chunk

    async def _exported(self, state: State) -> AsyncGenerator[bytes, None]:
        files = layer_files(self.runtime)
        self.states.hold(state.layers)
        try:
            record = _portable(state, await self._roots())
            if len(record) > _RECORD_BYTES:
                raise FailedPrecondition(
                    f"the record of state {state.id} has {len(record)} bytes, and an archive "
                    f"takes {_RECORD_BYTES}",
                    metadata={"id": state.id},
                )
            layers = [files.layer_path(layer) for layer in state.layers]
            read_fd, write_fd = _pipe()
            os.set_blocking(read_fd, False)
            writer = self._in_thread(_pack, write_fd, record, layers, self.max_bytes)
            try:
                while chunk := await _receive(read_fd):
                    yield chunk
            finally:
                os.close(read_fd)
                await asyncio.wait([writer])
            try:
                writer.result()
            except FileNotFoundError as error:
                raise FailedPrecondition(
                    f"files of state {state.id} are not on this host; prepare or import it again",
                    metadata={"id": state.id},
                ) from error
        finally:
            self.states.release(state.layers)

    async def _roots(self) -> Mapping[str, Path]:
        """The directories; finding them may start programs."""
        return await asyncio.to_thread(self.roots)

    def _in_thread(self, call: Callable[..., _T], *args: object) -> "asyncio.Future[_T]":
        return asyncio.get_running_loop().run_in_executor(self.threads, call, *args)

    async def import_(self, chunks: AsyncIterator[bytes]) -> tuple[State, Sequence[str]]:
        """Store an archive made by `export`; the state, and what people should know of it.

        Raises:
            InvalidArgument: a malformed or hostile archive.
            ResourceExhausted: it is larger than allowed, too many imports are under way, or the
                quota of the caller's tenant is used up.
            DeadlineExceeded: nothing of it came for a while.
        """
        files, roots = layer_files(self.runtime), await self._roots()
        self.states.owners.admit()
        moving = pace.moving(chunks, self.idle_s)
        async with pace.heard(moving), self.imports.taken():
            return await self._imported(moving, files, roots)

    async def _imported(
        self, chunks: AsyncIterator[bytes], files: LayerFiles, roots: Mapping[str, Path]
    ) -> tuple[State, Sequence[str]]:
        with self.states.growing():
            archive, layers = await self._unpacked(chunks, files)
            try:
                state, notes = self._accept(archive.state, layers, roots), list[str]()
                if own() and not self._is_mine(state.id):
                    sizes = [await self.runtime.layer_size(layer) for layer in layers]
                    self.states.owners.admit(sum(sizes))
                    notes.append(OWN_WORD.format(id=state.id))
                    state = word_of(own(), state, sum(sizes))
                known = self.states.peek(state.id)
                if known is None:
                    self.states.record(state)
            except BaseException:
                await self._drop(layers)
                raise
            if known is not None:
                await self._drop(layers)
                state = await self.states.owners.share(known, state.tenants)
            return state, notes if archive.vouched else [UNVOUCHED, *notes]

    def _is_mine(self, state_id: str) -> bool:
        known = self.states.peek(state_id)
        return known is not None and own() in known.tenants

    async def _unpacked(
        self, chunks: AsyncIterator[bytes], files: LayerFiles
    ) -> "tuple[_Archive, list[str]]":
        """Record and layers of an archive; when the caller goes away they go too."""
        read_fd, write_fd = _pipe()
        os.set_blocking(write_fd, False)
        reader = self._in_thread(_unpack, read_fd, files, Quota(self.max_bytes))
        try:
            try:
                await _feed(write_fd, chunks)
            finally:
                os.close(write_fd)
            return await asyncio.shield(reader)
        except BaseException:
            await asyncio.wait([reader])
            if not reader.exception():
                await self._drop(reader.result()[1])
            raise

    async def _drop(self, layers: Sequence[str]) -> None:
        await asyncio.gather(*(self.runtime.drop_layer(layer) for layer in layers))

    def _accept(self, state: State, layers: Sequence[str], roots: Mapping[str, Path]) -> State:
        if not _ID.fullmatch(state.id) or len(state.layers) != len(layers):
            raise InvalidArgument("archive", "record and layers do not fit together", _RESEND)
        if state.spec_sha256 and state.id != state_id("", state.spec_sha256):
            raise InvalidArgument("archive", "its id is not that of its spec", _RESEND)
        if state.base != HOST_BASE and not state.parent_id:
            action = image_action(state.base.removeprefix("image:sha256:"))
            if state.id != state_id("", action):
                raise InvalidArgument("archive", "its id is not that of its image", _RESEND)
        mounts = tuple(_local(mount, roots) for mount in state.mounts)
        fresh = self.states.stamp(state)
        tenants = (charged(),) if charged() else state.tenants or ("",)
        return replace(fresh, mounts=mounts, layers=tuple(layers), tenants=tenants)


def _portable(state: State, roots: Mapping[str, Path]) -> bytes:
    mounts = []
    for mount in state.mounts:
        named = next(
            (
                Path("@" + name) / mount.source.relative_to(root)
                for name, root in roots.items()
                if mount.source.is_relative_to(root)
            ),
            mount.source,
        )
        mounts.append(replace(mount, source=named))
    tenants = () if own() else state.tenants
    portable = replace(state, mounts=tuple(mounts), durable=False, boot="", tenants=tenants)
    return replace(portable, labels=labels_of(state)).encode()


def _local(mount: Mount, roots: Mapping[str, Path]) -> Mount:
    first, *rest = mount.source.parts or ("",)
    source = mount.source
    if first.startswith("@") and first[1:] in roots:
        source = roots[first[1:]].joinpath(*rest)
    resolved = Path(os.path.realpath(source))
    inside = any(resolved.is_relative_to(os.path.realpath(root)) for root in roots.values())
    if not mount.read_only or ".." in source.parts or not inside:
        raise InvalidArgument(
            "archive", f"its record mounts {mount.source}, which is not ours", _RESEND
        )
    return Mount(source, mount.target)


def _pipe() -> tuple[int, int]:
    with writing("an archive"):
        read_fd, write_fd = os.pipe()
    with contextlib.suppress(OSError):  # the user's allowance of large pipes may be used up
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
    return read_fd, write_fd


@dataclass(slots=True)
class _Hashed:
    """Where an archive is written to, with the digest of what was."""

    target: BinaryIO
    sha256: Any = field(default_factory=hashlib.sha256)
    size_bytes: int = 0

    def write(self, data: bytes) -> int:
        """Pass bytes on."""
        self.sha256.update(data)
        self.size_bytes += len(data)
        return self.target.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes


def _pack(write_fd: int, record: bytes, layers: Sequence[Path], max_bytes: int) -> None:
    pipe = os.fdopen(write_fd, "wb")
    with writing("an archive"), contextlib.suppress(BrokenPipeError), pipe:
        hashed = _Hashed(pipe)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            member = tarfile.TarInfo("state.json")
            member.size = len(record)
            archive.addfile(member, io.BytesIO(record))
            for number, layer in enumerate(layers):
                top = tarfile.TarInfo(f"layers/{number}")
                top.type, top.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(top)
                max_bytes -= write_tree(archive, layer, f"layers/{number}", max_bytes)
            end = tarfile.TarInfo(_END)
            end.size = len(_vouching(hashed))
            archive.addfile(end, cast(IO[bytes], _LateEnd(hashed)))


def _vouching(hashed: _Hashed) -> bytes:
    return json.dumps({"sha256": hashed.sha256.hexdigest()}).encode()


@dataclass(frozen=True, slots=True)
class _LateEnd:
    """The content of the last entry, made once its header is written."""

    hashed: _Hashed

    def read(self, size: int) -> bytes:
        """All of it."""
        return _vouching(self.hashed)


async def _feed(write_fd: int, chunks: AsyncIterator[bytes]) -> None:
    """Write chunks into the reader's pipe; a reader that stops early is not an error here."""
    with contextlib.suppress(BrokenPipeError):
        async for chunk in chunks:
            view = memoryview(chunk)
            while view:
                try:
                    view = view[os.write(write_fd, view) :]
                except BlockingIOError:
                    await _ready(write_fd, writing=True)


async def _receive(read_fd: int) -> bytes:
    while True:
        try:
            return os.read(read_fd, _CHUNK_BYTES)
        except BlockingIOError:
            await _ready(read_fd, writing=False)


async def _ready(fd: int, *, writing: bool) -> None:
    """Wait until a pipe can be read or written."""
    loop = asyncio.get_running_loop()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    )
    ready: asyncio.Future[None] = loop.create_future()
    add(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        remove(fd)


@dataclass(frozen=True, slots=True)
class _Archive:
    """What an archive says beside its layers."""

    state: State
    vouched: bool
    """Whether it holds a digest of its content."""


def _unpack(read_fd: int, files: LayerFiles, quota: Quota) -> tuple[_Archive, list[str]]:
    drafts: list[Path] = []
    room = Quota(2 * quota.size_bytes + quota.entries * _ENTRY_BYTES, quota.entries + 1)
    try:
        with writing(), os.fdopen(read_fd, "rb") as pipe:
            stream = TarStream(pipe, room)
            try:
                found = _unpack_members(stream, files, quota, drafts)
            except (ValueError, OverflowError) as error:
                raise InvalidArgument("archive", f"is damaged: {error}", _RESEND) from None
            stream.finish()
        return found, [files.adopt_layer(draft) for draft in drafts]
    except BaseException:
        for draft in drafts:
            files.discard(draft)
        raise


def _unpack_members(
    stream: TarStream, files: LayerFiles, quota: Quota, drafts: list[Path]
) -> _Archive:
    state: State | None = None
    complete = vouched = False
    with contextlib.ExitStack() as opened:
        reader: TreeReader | None = None
        for member in stream.members():
            prefix, _, below = member.name.partition("/")
            number, _, path = below.partition("/")
            if complete:
                raise InvalidArgument("archive", "goes on after its end", _RESEND)
            if state is None:
                state = _record(stream, member)
            elif member.name == _END:
                vouched, complete = _is_vouched(stream, member), True
            elif prefix == "layers" and number == str(len(drafts)) and not path and member.isdir():
                if reader is not None:
                    reader.finish()
                opened.close()
                drafts.append(files.draft_layer())
                reader = opened.enter_context(TreeReader(drafts[-1], files.owner, quota))
            elif prefix == "layers" and reader and number == str(len(drafts) - 1) and path:
                reader.add(member, path, stream.content(member.size))
            else:
                raise InvalidArgument(
                    "archive", f"has an entry out of place: {member.name[:120]!r}", _RESEND
                )
        if state is None or not complete:
            raise InvalidArgument("archive", "is cut short", _RESEND)
        if reader is not None:
            reader.finish()
    return _Archive(state, vouched)


def _record(stream: TarStream, member: tarfile.TarInfo) -> State:
    if member.name != "state.json" or not member.isreg() or member.size > _RECORD_BYTES:
        raise InvalidArgument("archive", "does not begin with a state record", _RESEND)
    try:
        return State.decode(b"".join(stream.content(member.size)))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("archive", f"its record is malformed: {error}", _RESEND) from None


def _is_vouched(stream: TarStream, member: tarfile.TarInfo) -> bool:
    """Whether the last entry holds the digest of all before its content.

    Raises:
        InvalidArgument: it holds another, or something else.
    """
    if not member.size:
        return False
    here, said = stream.digest(), None
    if member.isreg() and member.size <= _END_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(b"".join(stream.content(member.size)))
    if not isinstance(said, dict) or said.get("sha256") != here:
        raise InvalidArgument(
            "archive", "is damaged: its end holds another digest than that of its content", _RESEND
        )
    return True
