"""Client of the image service: archives and directories as states, states as archives.

- Each method is one RPC. Archives are streamed; nothing is held that is not being sent.
- A directory is sent as the root of a file system, or as the image layout that it holds: as it is,
  links are not followed, and what is neither file, directory nor link goes as a pipe, which the
  service leaves out and counts.
"""

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path

import grpc

from regreen.client.channel import Caller, call_metadata, new_request_id, stream
from regreen.sandbox import v1 as pb

CHUNK_BYTES = 1 << 20
_TRANSFER_S = 3600.0


class ImageClient(Caller):
    """`regreen.sandbox.v1.ImageService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.ImageServiceStub(channel)

    async def import_image(
        self,
        chunks: Iterable[bytes],
        *,
        format: "pb.ImageFormat.ValueType" = pb.IMAGE_FORMAT_UNSPECIFIED,
        reference: str = "",
        labels: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> pb.ImportImageResponse:
        """Make a state of an image archive."""
        options = pb.ImageOptions(
            request_id=request_id or new_request_id(),
            format=format,
            reference=reference,
            labels=labels or {},
        )

        unreadable: list[OSError] = []

        async def requests() -> AsyncIterator[pb.ImportImageRequest]:
            yield pb.ImportImageRequest(options=options)
            try:
                for chunk in chunks:
                    yield pb.ImportImageRequest(chunk=chunk)
            except OSError as error:
                unreadable.append(error)
                raise

        async with stream(
            self._stub.ImportImage(requests(), timeout=_TRANSFER_S, metadata=call_metadata())
        ) as call:
            try:
                response: pb.ImportImageResponse = await call  # type: ignore[misc]
            except asyncio.CancelledError:  # so a call ends whose requests cannot be made
                if unreadable:
                    raise unreadable[0] from None
                raise
        return response

    async def export_image(self, state_id: str, *, reference: str = "") -> AsyncIterator[bytes]:
        """A state of an image as an archive, in pieces."""
        request = pb.ExportImageRequest(state_id=state_id, reference=reference)
        call = self._stub.ExportImage(request, timeout=_TRANSFER_S, metadata=call_metadata())
        async with stream(call) as events:
            async for event in events:
                yield event.chunk


def file_chunks(path: Path) -> Iterator[bytes]:
    """A file in pieces."""
    with path.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk


def directory_chunks(top: Path) -> Iterator[bytes]:
    """A directory as a tar archive, in pieces."""
    linked: dict[tuple[int, int], str] = {}
    stack = [""]
    while stack:
        here = stack.pop()
        for name in sorted(os.listdir(top / here)):
            relative = f"{here}/{name}" if here else name
            info = (top / relative).lstat()
            yield from _member(top / relative, relative, info, linked)
            if stat.S_ISDIR(info.st_mode):
                stack.append(relative)
    yield bytes(1024)


def _member(
    path: Path, relative: str, info: os.stat_result, linked: dict[tuple[int, int], str]
) -> Iterator[bytes]:
    member = tarfile.TarInfo(relative)
    member.mode, member.mtime = stat.S_IMODE(info.st_mode), int(info.st_mtime)
    member.uid, member.gid = info.st_uid, info.st_gid
    inode = info.st_dev, info.st_ino
    if stat.S_ISDIR(info.st_mode):
        member.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(info.st_mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif not stat.S_ISREG(info.st_mode):
        member.type = tarfile.FIFOTYPE
    elif inode in linked:
        member.type, member.linkname = tarfile.LNKTYPE, linked[inode]
    else:
        if info.st_nlink > 1:
            linked[inode] = relative
        yield from _file(path, member)
        return
    yield member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _file(path: Path, member: tarfile.TarInfo) -> Iterator[bytes]:
    """A file's header and as many bytes as it says, whatever happens to the file meanwhile."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as source:
        left = member.size = os.fstat(source.fileno()).st_size
        yield member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        while left:
            chunk = source.read(min(left, CHUNK_BYTES)) or bytes(min(left, CHUNK_BYTES))
            left -= len(chunk)
            yield chunk
        yield bytes(-member.size % 512)
