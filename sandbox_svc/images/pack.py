"""States as image archives: layers as tar streams, and the documents around them.

- The archive is an OCI image layout, and names its content in `manifest.json` too, so that older
  engines load it.
- A layer's stream depends on the layer alone: it is made twice, once for its digest and once to be
  sent, so that nothing is kept on disk and a reader that waits holds no thread.
- Whiteouts and opaque marks become `.wh.` entries; entries belong to root.
- Directories are opened from the layer's descriptor and nothing is followed.
"""

import hashlib
import os
import stat
import tarfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regreen.rpc.errors import FailedPrecondition, InfraError
from sandbox_svc.backends import linux
from sandbox_svc.backends.tree_archive import OVER_BOUND
from sandbox_svc.images.manifest import encoded
from sandbox_svc.images.streams import CHUNK_BYTES
from sandbox_svc.images.unpack import OPAQUE, OPAQUE_ENTRY, WHITEOUT

_BLOCK = 512
_PATH_BYTES = 4000
_END = bytes(2 * _BLOCK)
_OCI = "application/vnd.oci.image"


def image_archive(
    tops: Sequence[Path], config: Mapping[str, Any], reference: str, *, max_bytes: int
) -> Generator[bytes, None, None]:
    """The archive of an image with these layers, lowest first.

    Raises:
        FailedPrecondition: a layer has an entry that an image cannot hold, or all of them, with
            holes filled, are over `max_bytes`.
    """
    yield from _coalesced(_archive(tops, config, reference, max_bytes))


def _archive(
    tops: Sequence[Path], config: Mapping[str, Any], reference: str, max_bytes: int
) -> Iterator[bytes]:
    layers: list[tuple[str, int]] = []
    for top in tops:
        digest, size = hashlib.sha256(), 0
        for piece in layer_tar(top, max_bytes):  # of which lower layers took their part
            digest.update(piece)
            size += len(piece)
        name = digest.hexdigest()
        if (name, size) not in layers:
            yield _header(f"blobs/sha256/{name}", size=size)
            yield from _checked(layer_tar(top, max_bytes), size)
        layers.append((name, size))
        max_bytes -= size
    diffs = [f"sha256:{name}" for name, _ in layers]
    history = [{"created_by": "regreen"} for _ in layers]
    image = {**config, "rootfs": {"type": "layers", "diff_ids": diffs}, "history": history}
    configuration = encoded(image)
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": _descriptor(f"{_OCI}.config.v1+json", configuration),
        "layers": [
            {"mediaType": f"{_OCI}.layer.v1.tar", "digest": f"sha256:{name}", "size": size}
            for name, size in layers
        ],
    }
    entry = _descriptor(f"{_OCI}.manifest.v1+json", encoded(manifest))
    entry["platform"] = {key: config.get(key, "") for key in ("architecture", "os")}
    if reference:
        entry["annotations"] = {
            "io.containerd.image.name": _domain(reference),
            "org.opencontainers.image.ref.name": reference,
        }
    docker = {
        "Config": _place(configuration),
        "RepoTags": [reference] if reference else None,
        "Layers": [f"blobs/sha256/{name}" for name, _ in layers],
    }
    index = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": [entry]}
    yield from _document(_place(configuration), configuration)
    yield from _document(_place(encoded(manifest)), encoded(manifest))
    yield from _document("index.json", encoded(index))
    yield from _document("manifest.json", b"[" + encoded(docker) + b"]")
    yield from _document("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    yield _END


def _domain(reference: str) -> str:
    """The reference as containerd writes it."""
    first, slash, _ = reference.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return reference
    return f"docker.io/{reference}" if slash else f"docker.io/library/{reference}"


def _descriptor(kind: str, document: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(document).hexdigest()
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(document)}


def _place(document: bytes) -> str:
    return f"blobs/sha256/{hashlib.sha256(document).hexdigest()}"


def _document(name: str, content: bytes) -> Iterator[bytes]:
    yield _header(name, size=len(content))
    yield content
    yield _padding(len(content))


def _checked(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    seen = 0
    for piece in pieces:
        seen += len(piece)
        yield piece
    if seen != size:
        raise InfraError("a layer changed while it was read")
    yield _padding(size)


def _coalesced(pieces: Iterator[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _header(name: str, *, size: int = 0, **fields: Any) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def layer_tar(top: Path, max_bytes: int) -> Iterator[bytes]:
    """A layer as the tar stream of an image's layer.

    Raises:
        FailedPrecondition: it has an entry that an image cannot hold, or that cannot be read, or
            its files, with holes filled, are over `max_bytes`.
    """
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from _Packer(fd, max_bytes).pieces()
    finally:
        os.close(fd)


class _Packer:
    def __init__(self, top_fd: int, max_bytes: int) -> None:
        self._top, self._max_bytes, self._bytes = top_fd, max_bytes, 0
        self._linked: dict[int, str] = {}

    def pieces(self) -> Iterator[bytes]:
        """Directories before what is in them, names in order."""
        yield self._directory("", os.fstat(self._top))
        stack = [""]
        while stack:
            here = stack.pop()
            fd = self._open(here, os.O_DIRECTORY)
            try:
                if _attribute(fd, OPAQUE) == b"y" and here:
                    yield _header(_join(here, OPAQUE_ENTRY))
                below = []
                for name in sorted(os.listdir(fd)):
                    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    path = _join(here, name)
                    if name.startswith(WHITEOUT):
                        raise _unfit(path, "an image would take it for a deletion")
                    if stat.S_ISDIR(info.st_mode):
                        yield self._directory(path, info)
                        below.append(path)
                    else:
                        yield from self._entry(fd, here, name, info)
                stack += reversed(below)
            finally:
                os.close(fd)
        yield _END

    def _open(self, relative: str, flags: int) -> int:
        if len(os.fsencode(relative)) > _PATH_BYTES:
            raise _unfit(relative[:200], "its path is too long")
        resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
        try:
            return linux.openat2(self._top, relative or ".", os.O_RDONLY | flags, resolve)
        except PermissionError:
            raise _unfit(relative, "the service may not read it") from None

    def _directory(self, path: str, info: os.stat_result) -> bytes:
        fd = self._open(path, os.O_DIRECTORY)
        try:
            headers = _attributes(fd)
        finally:
            os.close(fd)
        common = _common(info)
        common["pax_headers"] |= headers
        return _header(path or ".", **common, type=tarfile.DIRTYPE)

    def _entry(self, fd: int, here: str, name: str, info: os.stat_result) -> Iterator[bytes]:
        path = _join(here, name)
        common = _common(info)
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            yield _header(_join(here, WHITEOUT + name), mtime=common["mtime"])
        elif info.st_nlink > 1 and info.st_ino in self._linked:
            linkname = self._linked[info.st_ino]
            yield _header(path, **common, type=tarfile.LNKTYPE, linkname=linkname)
        elif stat.S_ISLNK(info.st_mode):
            self._remember(info, path)
            linkname = os.readlink(name, dir_fd=fd)
            yield _header(path, **common, type=tarfile.SYMTYPE, linkname=linkname)
        elif stat.S_ISREG(info.st_mode):
            self._remember(info, path)
            yield from self._file(path, common)

    def _remember(self, info: os.stat_result, path: str) -> None:
        if info.st_nlink > 1:
            self._linked[info.st_ino] = path

    def _file(self, path: str, common: dict[str, Any]) -> Iterator[bytes]:
        fd = self._open(path, os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            self._bytes += size
            if self._bytes > self._max_bytes:
                raise _unfit(path, OVER_BOUND.format("image") + "; remove it and take a snapshot")
            common["pax_headers"] |= _attributes(fd)
            yield _header(path, **common, size=size)
            left = size
            while left:
                piece = os.read(fd, min(left, CHUNK_BYTES))
                if not piece:
                    raise InfraError(f"a layer changed while it was read: {path}")
                left -= len(piece)
                yield piece
            yield _padding(size)
        finally:
            os.close(fd)


def _join(here: str, name: str) -> str:
    return f"{here}/{name}" if here else name


def _common(info: os.stat_result) -> dict[str, Any]:
    seconds, rest = divmod(info.st_mtime_ns, 10**9)
    exact = {"mtime": f"{seconds}.{rest:09d}"} if rest else {}
    return {
        "mode": stat.S_IMODE(info.st_mode) & 0o1777,
        "mtime": seconds,
        "pax_headers": exact,
    }


def _attribute(fd: int, name: str) -> bytes:
    try:
        return os.getxattr(fd, name)
    except OSError:
        return b""


def _attributes(fd: int) -> dict[str, str]:
    """What an image keeps of extended attributes."""
    return {
        f"SCHILY.xattr.{name}": _attribute(fd, name).decode("utf-8", "surrogateescape")
        for name in sorted(os.listxattr(fd))
        if name.startswith("user.") and not name.startswith("user.overlay.")
    }


def _unfit(path: str, problem: str) -> FailedPrecondition:
    shown = path.encode("utf-8", "replace").decode()
    return FailedPrecondition(
        f"the state cannot be an image because of {shown!r}: {problem}", metadata={"path": shown}
    )
