"""Bytes by content: stores whose only keys are SHA-256 digests.

- A key names exactly one content; `put` of present content writes nothing (create if absent).
- A blob is either whole under its key or absent: a writer killed at any moment leaves no part.
- Bytes that are read are hashed before they are believed: damage is a `DataLoss`, never an answer.
- A damaged blob is healed by the next `put` of its content, because `put` compares lengths.
- A name stands for one blob; whoever names first wins, unless told to replace.
- With a local directory, `put` returns after the bytes and their name have reached the disk.
"""

import asyncio
import ctypes
import errno
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import zstandard
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, MemoryStore, ObjectStore

from regreen.bucket import open_bucket
from regreen.rpc.errors import (
    DataLoss,
    DiskFull,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from regreen.rpc.logging import get

CHUNK_BYTES = 4 << 20
"""Size of the pieces in which blobs are streamed."""

T = TypeVar("T")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PUTS = 64
"""Contents of one `put_many` that are written at once."""
_COMPRESSORS = threading.local()
"""One for each level and thread: making one takes as long as a small content does."""
_FIRST_S = 10.0
"""How long the start of a service waits for the first answer of a bucket."""
_REFUSALS = (PermissionDeniedError, UnauthenticatedError)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The name of a sequence of bytes: lower-case hexadecimal SHA-256 and length."""

    sha256: str
    size_bytes: int

    def __str__(self) -> str:
        return f"sha256:{self.sha256}/{self.size_bytes}"


def digest_of(content: bytes) -> Digest:
    """The digest of `content`."""
    return Digest(hashlib.sha256(content).hexdigest(), len(content))


def check_digest(digest: Digest, field: str = "digest") -> Digest:
    """`digest` if it is well formed.

    Raises:
        InvalidArgument: it is not; names `field`.
    """
    if not _SHA256.fullmatch(digest.sha256):
        raise InvalidArgument(
            f"{field}.sha256",
            "is not 64 lower-case hexadecimal digits",
            "give the SHA-256 of the bytes in hex",
        )
    if digest.size_bytes < 0:
        raise InvalidArgument(f"{field}.size_bytes", "is negative", "give the number of bytes")
    return digest


class BlobStore(Protocol):
    """Where bytes live by digest."""

    async def put(self, content: bytes) -> Digest:
        """Store `content` unless it is there already, and give its digest."""
        ...

    async def put_many(self, contents: Sequence[bytes]) -> list[Digest]:
        """Store several contents; with a local directory, one wait for the disk is for all."""
        ...

    async def put_file(self, path: Path) -> Digest:
        """Store a file's content without holding it in memory.

        Raises:
            DataLoss: the file changed while it was read.
        """
        ...

    async def put_stream(self, chunks: AsyncIterable[bytes]) -> Digest:
        """Store the concatenation of `chunks` without holding it in memory."""
        ...

    async def get(self, digest: Digest) -> bytes:
        """The verified content.

        Raises:
            NotFound: no such blob.
            DataLoss: the stored bytes do not match the digest.
        """
        ...

    def stream(self, digest: Digest) -> AsyncIterator[bytes]:
        """The content in pieces of about `CHUNK_BYTES`.

        The last piece is held back until the whole has been verified, so that a reader that
        reaches the end has read true bytes.

        Raises:
            NotFound: no such blob.
            DataLoss: the stored bytes do not match the digest.
        """
        ...

    async def get_file(self, digest: Digest, path: Path) -> None:
        """Write the verified content to `path`, which appears whole or not at all."""
        ...

    async def exists(self, digest: Digest) -> bool:
        """Whether a blob of this digest and length is stored."""
        ...

    async def delete(self, digest: Digest) -> None:
        """Remove a blob; an absent one is ignored."""
        ...


def open_blobs(url: str | Path, *, fsync: bool = True) -> "ObjectBlobs":
    """The store at `url`: a directory path, `file:///dir`, `memory://` or `s3://bucket/prefix`.

    S3 credentials, region and endpoint come from the folder that `?secrets=/folder` names, one a
    file, from the usual `AWS_*` environment variables, or from the machine's identity (`bucket`).

    Raises:
        InvalidArgument: the scheme is not one of these, or the folder cannot be used.
    """
    text = str(url)
    parts = urlsplit(text)
    if isinstance(url, Path) or not parts.scheme:
        return _local(Path(text), fsync)
    if parts.scheme == "file":
        return _local(Path(unquote(parts.path)), fsync)
    if parts.scheme == "memory":
        return ObjectBlobs(MemoryStore())
    if parts.scheme == "s3":
        return ObjectBlobs(open_bucket(text))
    raise InvalidArgument(
        "blobs.url",
        f"has the unknown scheme {parts.scheme!r}",
        "use a path, file://, memory:// or s3://",
    )


async def ready_blobs(url: str | Path, *, fsync: bool = True) -> "ObjectBlobs":
    """The store at `url` for a service that starts; a bucket has let it write an empty blob.

    A bucket that does not answer now is waited for by the calls that need it.

    Raises:
        InvalidArgument: as `open_blobs`.
        FailedPrecondition: the bucket refuses the credentials, or there is none of that name.
    """
    blobs = open_blobs(url, fsync=fsync)
    if urlsplit(str(url)).scheme != "s3":
        return blobs
    try:
        async with asyncio.timeout(_FIRST_S):
            await blobs.put(b"")
    except (NotFound, Unavailable, TimeoutError) as error:
        cause = error.__cause__
        if isinstance(error, NotFound) or isinstance(cause, _REFUSALS):
            bucket = urlsplit(str(url))._replace(query="").geturl()
            raise FailedPrecondition(
                f"blobs: {bucket} cannot be written: {_first_line(cause)}; give the name of a "
                "bucket that is there, and keys that may read, write and list it"
            ) from error
        get().warning("the bucket does not answer yet", problem=str(error) or "no answer in time")
    return blobs


def _local(root: Path, fsync: bool) -> "ObjectBlobs":
    root.mkdir(parents=True, exist_ok=True)
    return ObjectBlobs(LocalStore(root.resolve()), sync_root=root.resolve() if fsync else None)


class ObjectBlobs:
    """A `BlobStore` over any obstore object store; the key is `<first two digits>/<sha256>`."""

    def __init__(self, store: ObjectStore, *, sync_root: Path | None = None) -> None:
        self._store = store
        self._sync_root = sync_root

    async def put(self, content: bytes) -> Digest:
        digest = digest_of(content)
        while await self._written(digest, content):
            if await self._sync(digest):
                break
        return digest

    async def put_many(self, contents: Sequence[bytes]) -> list[Digest]:
        digests = [digest_of(content) for content in contents]
        for start in range(0, len(contents), _PUTS):
            part = slice(start, start + _PUTS)
            await asyncio.gather(
                *(self._written(*pair) for pair in zip(digests[part], contents[part], strict=True))
            )
        if self._sync_root is not None:
            await asyncio.to_thread(sync_file_system, self._sync_root)
        return digests

    async def _written(self, digest: Digest, content: bytes) -> bool:
        """Whether the content had to be written; it may not have reached the disk yet."""
        try:
            await self._store.put_async(_key(digest), content, mode="create", use_multipart=False)
        except AlreadyExistsError:
            if await self.exists(digest):
                return False
            await _translated(self._store.put_async(_key(digest), content), digest)
        except (BaseError, OSError) as error:
            raise _error(error, digest) from error
        return True

    async def put_file(self, path: Path) -> Digest:
        digest = await asyncio.to_thread(digest_of_file, path)
        while not await self.exists(digest):
            await _translated(self._store.put_async(_key(digest), path), digest)
            if await asyncio.to_thread(digest_of_file, path) != digest:
                await self.delete(digest)
                raise DataLoss(f"{path} changed while it was stored")
            if await self._sync(digest):
                break
        return digest

    async def put_stream(self, chunks: AsyncIterable[bytes]) -> Digest:
        with tempfile.NamedTemporaryFile(prefix="regreen-blob-", dir=self._sync_root) as spool:
            async for chunk in chunks:
                await asyncio.to_thread(spool.write, chunk)
            await asyncio.to_thread(spool.flush)
            return await self.put_file(Path(spool.name))

    async def get(self, digest: Digest) -> bytes:
        result = await _translated(self._store.get_async(_key(check_digest(digest))), digest)
        content = bytes(await _translated(result.bytes_async(), digest))
        if digest_of(content) != digest:
            raise DataLoss(
                f"blob {digest} is damaged: {digest_of(content)} is stored under its name"
            )
        return content

    async def stream(self, digest: Digest) -> AsyncIterator[bytes]:
        result = await _translated(self._store.get_async(_key(check_digest(digest))), digest)
        hasher, size_bytes, held = hashlib.sha256(), 0, b""
        try:
            async for piece in result.stream(min_chunk_size=CHUNK_BYTES):
                if held:
                    yield held
                held = bytes(piece)
                hasher.update(held)
                size_bytes += len(held)
        except BaseError as error:
            raise _error(error, digest) from error
        if Digest(hasher.hexdigest(), size_bytes) != digest:
            raise DataLoss(f"blob {digest} is damaged")
        if held:
            yield held

    async def get_file(self, digest: Digest, path: Path) -> None:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as target:
                async for chunk in self.stream(digest):
                    await asyncio.to_thread(target.write, chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    async def exists(self, digest: Digest) -> bool:
        try:
            meta = await self._store.head_async(_key(check_digest(digest)))
        except (NotFoundError, FileNotFoundError):
            return False
        except BaseError as error:
            raise _error(error, digest) from error
        return bool(meta["size"] == digest.size_bytes)

    async def delete(self, digest: Digest) -> None:
        try:
            await self._store.delete_async(_key(check_digest(digest)))
        except (NotFoundError, FileNotFoundError):
            return
        except BaseError as error:
            raise _error(error, digest) from error

    async def name(self, name: str, digest: Digest, *, replace: bool = False) -> Digest:
        """Have `name` stand for a blob, unless it stands for one already; what it stands for now.

        Raises:
            InvalidArgument: a name that is no plain word.
        """
        key = _name_key(name)
        text = f"{digest.sha256} {digest.size_bytes}".encode()
        mode: Literal["create", "overwrite"] = "overwrite" if replace else "create"
        try:
            await self._store.put_async(key, text, mode=mode, use_multipart=False)
        except AlreadyExistsError:
            return await self.named(name) or await self.name(name, digest, replace=True)
        except BaseError as error:
            raise _error(error, digest) from error
        return digest

    async def named(self, name: str) -> Digest | None:
        """The blob that a name stands for; None if none, or if its entry is damaged."""
        try:
            result = await self._store.get_async(_name_key(name))
            sha256, _, size = bytes(await result.bytes_async()).decode("ascii").partition(" ")
            return check_digest(Digest(sha256, int(size)))
        except (NotFoundError, FileNotFoundError, ValueError, InvalidArgument):
            return None
        except BaseError as error:
            raise _unavailable(error) from error

    async def unname(self, name: str) -> None:
        """Have a name stand for nothing; the blob stays."""
        try:
            await self._store.delete_async(_name_key(name))
        except (NotFoundError, FileNotFoundError):
            return
        except BaseError as error:
            raise _unavailable(error) from error

    async def _sync(self, digest: Digest) -> bool:
        """Whether it is on the disk; a collector may take away at once what nobody names yet."""
        if self._sync_root is not None:
            try:
                await asyncio.to_thread(_sync_file, self._sync_root / _key(digest))
            except FileNotFoundError:
                return False
        return True


def compress(content: bytes, level: int = 6) -> bytes:
    """`content` as one zstd frame that records its length and a checksum."""
    made: dict[int, zstandard.ZstdCompressor] = vars(_COMPRESSORS).setdefault("made", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level, write_checksum=True)
    return made[level].compress(content)


def decompress(frame: bytes, max_bytes: int) -> bytes:
    """The content of a frame made by `compress`.

    Raises:
        DataLoss: the frame is damaged, or would unpack to more than `max_bytes`.
    """
    try:
        size_bytes = zstandard.frame_content_size(frame)
        if not 0 <= size_bytes <= max_bytes:
            raise DataLoss(f"compressed blob would unpack to {size_bytes} bytes, over {max_bytes}")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=max(size_bytes, 1))
    except zstandard.ZstdError as error:
        raise DataLoss(f"compressed blob is damaged: {error}") from error


def _key(digest: Digest) -> str:
    return f"{digest.sha256[:2]}/{digest.sha256}"


def digest_of_file(path: Path) -> Digest:
    """Digest and size of a file's bytes."""
    with path.open("rb") as source:
        hashed = hashlib.file_digest(source, "sha256")
        return Digest(hashed.hexdigest(), source.tell())


def _name_key(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidArgument("name", f"{name[:80]!r} is no plain word", "use a-z, 0-9, _ and -")
    return f"names/{name}"


def _sync_file(path: Path) -> None:
    sync_path(path)
    sync_path(path.parent)


def sync_file_system(path: Path) -> None:
    """Have everything written to the file system of `path` survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if _LIBC.syncfs(handle) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(handle)


def sync_path(path: Path) -> None:
    """Have a file's bytes, or a directory's names, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def _translated(call: Awaitable[T], digest: Digest) -> T:
    try:
        return await call
    except (BaseError, OSError) as error:
        raise _error(error, digest) from error


def _error(error: Exception, digest: Digest) -> Exception:
    if isinstance(error, (NotFoundError, FileNotFoundError)):
        return NotFound(f"blob {digest} is not stored")
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
        return DiskFull(f"no space left to store blob {digest}", retry_after_s=30.0)
    return _unavailable(error)


def _unavailable(error: Exception) -> Unavailable:
    """Refused keys are an outage, too: work waits until somebody renews them."""
    refused = "refuses the credentials: " if isinstance(error, _REFUSALS) else ""
    return Unavailable(f"blob store: {refused}{_first_line(error)}", retry_after_s=1.0)


def _first_line(error: object) -> str:
    """What obstore says of an error, without the program's structures that follow."""
    return str(error).partition("\n")[0]
