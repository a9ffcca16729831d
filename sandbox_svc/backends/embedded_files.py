"""The files of an embedded sandbox: reading and writing them, and what its upper says of them.

- File operations run in the sandbox's own first process; the service reads from descriptors that
  it has checked to be regular files.
- Freezing and file operations exclude each other: no descriptor may pin the old mounts.
- Walking the upper from outside pins nothing and may take long, so it excludes nobody: a walk that
  the files were taken from under is asked to come again, and never answered in part.
"""

import abc
import asyncio
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regreen.rpc.errors import InfraError, InvalidArgument, RegreenError
from sandbox_svc.backends import jobs, uppers, wire
from sandbox_svc.backends.base import FileStat, Limits, NotAFile, Odd, read_whole
from sandbox_svc.backends.commands import absolute
from sandbox_svc.backends.fds import exhausted, not_opened, read_upto, write_all, writing
from sandbox_svc.backends.link import Link, LinkClosed

if TYPE_CHECKING:
    from sandbox_svc.backends.embedded import EmbeddedRuntime

_INLINE_READ_BYTES = 1 << 20


class _Refused(Exception):
    """The first process opened nothing."""

    def __init__(self, code: int | None, problem: str) -> None:
        super().__init__(problem)
        self.code, self.problem = code, problem


class BoxFiles(abc.ABC):
    """What `backends.base.Box` says of files; the life of the box is `EmbeddedBox`'s."""

    def __init__(self, runtime: "EmbeddedRuntime", box: str, limits: Limits) -> None:
        self.id, self.limits = box, limits
        self.place = ""
        """Name of the directories that hold the upper; empty between a freeze and a new start."""
        self._runtime = runtime
        self._base_layers: list[str] = []
        self._own_layers: list[str] = []
        self._files = asyncio.Lock()
        self._deleted = self._freezing = False

    @abc.abstractmethod
    def _require(self) -> Link:
        """The way to the first process; raises where there is none."""

    @abc.abstractmethod
    def _lost(self) -> RegreenError:
        """What it means that there is no first process."""

    @abc.abstractmethod
    async def _admit(self, path: str, size_bytes: int) -> None:
        """Count a file that is about to be written; raises where it is too much."""

    @property
    def layers(self) -> list[str]:
        """All layers below the upper, lowest first."""
        return [*self._base_layers, *self._own_layers]

    @property
    def upper_path(self) -> str:
        """Host path of the upper directory."""
        return str(self._runtime.layout.box(self.place) / "u")

    async def measure(self) -> uppers.Usage:
        """Bytes and inodes in the upper."""
        return await self._runtime.blocking(uppers.usage, Path(self.upper_path))

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file, resolved inside the sandbox's root; links never leave it."""
        return await read_whole(self, path, max_bytes)

    async def read_range(
        self, path: str, *, offset: int = 0, max_bytes: int, follow: bool = True
    ) -> tuple[bytes, FileStat]:
        """Read part of a regular file; the stat tells the size of the whole."""
        async with self._files:
            try:
                _, fd = await self._open("open", absolute(path), int(follow))
            except _Refused as refusal:
                raise await self._meant(refusal, path, follow=follow) from None
            try:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode):
                    raise InvalidArgument(
                        "path", f"not a regular file: {path}", "name a regular file"
                    )
                wanted = max(0, min(max_bytes, info.st_size - offset))
                if wanted <= _INLINE_READ_BYTES:
                    content = read_upto(fd, offset, wanted)
                else:
                    content = await self._runtime.blocking(read_upto, fd, offset, wanted)
            finally:
                os.close(fd)
            return content, FileStat(info.st_size, stat.S_IMODE(info.st_mode))

    async def write_file(
        self, path: str, content: bytes, mode: int = 0o644, *, follow: bool = True
    ) -> None:
        """Write a regular file, creating parent directories.

        Raises:
            ResourceExhausted: with it the sandbox would be over a limit of its disk.
        """
        if self.limits.disk_bytes and len(content) > self.limits.disk_bytes:
            raise InvalidArgument(
                "content", "is larger than the sandbox's disk limit", "give it more disk_bytes"
            )
        async with self._files:
            await self._admit(absolute(path), len(content))
            try:
                _, fd = await self._open("create", absolute(path), mode, int(follow))
            except _Refused as refusal:
                raise not_opened(refusal.code, absolute(path), refusal.problem) from None
            with os.fdopen(fd, "wb", buffering=0):
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise InvalidArgument(
                        "path", f"not a regular file: {path}", "name a regular file"
                    )
                with writing():
                    os.ftruncate(fd, 0)
                    if len(content) <= _INLINE_READ_BYTES:
                        write_all(fd, content)
                    else:
                        await self._runtime.blocking(write_all, fd, content)

    async def _open(self, what: str, path: str, *fields: int) -> tuple[wire.Message, int]:
        try:
            reply, fds = await self._require().request(what, path, *fields)
        except (LinkClosed, TimeoutError) as error:
            raise self._lost() from error
        if fds:
            return reply, fds[0]
        if "error" not in reply:  # it was opened, and could not be received
            raise exhausted(f"a file of the sandbox, {path}")
        raise _Refused(reply.get("errno"), str(reply.get("error", "refused")))

    async def _meant(self, refusal: "_Refused", path: str, *, follow: bool) -> RegreenError:
        """What it means that there is no regular file to read at a path."""
        if follow:
            return not_opened(refusal.code, absolute(path), refusal.problem)
        match refusal.code:
            case errno.ELOOP:
                try:
                    _, fd = await self._open("link", absolute(path))
                except _Refused:
                    return not_opened(errno.ENOENT, absolute(path), refusal.problem)
                try:
                    return _held(path, fd)
                finally:
                    os.close(fd)
            case errno.EISDIR:
                return NotAFile(path, Odd.DIRECTORY)
            case errno.EINVAL | errno.ENXIO | errno.ENODEV:
                return NotAFile(path, Odd.OTHER)
        return not_opened(refusal.code, absolute(path), refusal.problem)

    async def changed_paths(self, under: str, *, since: int | None = None) -> Sequence[str]:
        """Absolute paths touched since creation, or above the first `since` layers, sorted.

        Raises:
            Unavailable: the files were frozen, merged or removed meanwhile.
        """
        layout, layers, place = self._runtime.layout, self.layers, self.place
        anew = self._freezing  # the next first process may not have made its upper yet
        split = len(self._base_layers) if since is None else since
        lowers = [layout.layer(layer) for layer in layers[:split]]
        tops = [layout.layer(layer) for layer in layers[split:]]
        tops.append(Path(self.upper_path))
        try:
            found = await self._runtime.blocking(uppers.changed, tops, lowers, absolute(under))
        except (FileNotFoundError, NotADirectoryError) as error:
            if place and place == self.place and self._stands_on(layers) and not anew:
                raise InfraError(f"the sandbox has lost its files: {error}") from error
            raise jobs.lost(None, passing=True) from error
        if not self._stands_on(layers):  # what vanished during the walk is no error to it
            raise jobs.lost(None, passing=True)
        return sorted(found)

    def _stands_on(self, layers: Sequence[str]) -> bool:
        """Whether nobody has taken these layers, or the upper above them, out of their place.

        A freeze adds the upper to them: who has opened it before looks at the same files.
        """
        return not self._deleted and self.layers[: len(layers)] == layers


def _held(path: str, fd: int) -> NotAFile:
    """What a descriptor holds of a path that was a link a moment ago: its processes go on."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISLNK(mode):
        return NotAFile(path, Odd.LINK, os.readlink("", dir_fd=fd))
    if stat.S_ISDIR(mode):
        return NotAFile(path, Odd.DIRECTORY)
    return NotAFile(path, Odd.LINK if stat.S_ISREG(mode) else Odd.OTHER)
