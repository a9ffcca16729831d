"""Image archives made by hand: layers, OCI layouts, and what `docker save` writes."""

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from sandbox_svc.hosts import platform_name
from sandbox_svc.images.unpack import OPAQUE

MACHINE = platform_name().partition("/")[2]
OTHER = "s390x"
Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"", **fields: Any) -> Entry:
    """A member of a layer; `fields` are those of `TarInfo`."""
    member = tarfile.TarInfo(name)
    member.mode, member.mtime, member.size = 0o644, 1_700_000_000, len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def folder(name: str, mode: int = 0o755) -> Entry:
    return entry(name, type=tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> Entry:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str) -> Entry:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def tar(*entries: Entry) -> bytes:
    """A tar archive of entries, in order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in entries:
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def files(**contents: bytes) -> bytes:
    """A tar archive of plain files; in names, two underscores are a slash."""
    return tar(*(entry(name.replace("__", "/"), data) for name, data in contents.items()))


def programs(*names: str) -> list[Entry]:
    """Programs of this host with the libraries that they need, as a system of their own."""
    found: dict[str, bytes] = {}
    for name in names:
        path = Path(str(shutil.which(name, path="/usr/bin:/bin"))).resolve()
        found[f"bin/{name}"] = path.read_bytes()
        said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
        for word in said.split():
            if word.startswith("/"):
                found[word.lstrip("/")] = Path(word).read_bytes()
    return [entry(name, content, mode=0o755) for name, content in sorted(found.items())]


def system() -> bytes:
    """The layer of a tiny system with a shell."""
    return tar(folder("etc"), folder("bin"), *programs("sh", "cat", "ls", "ln", "rm", "mkdir"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def configuration(layers: Sequence[bytes], machine: str = MACHINE, **config: Any) -> bytes:
    """The configuration of an image with these layers, unpacked."""
    diffs = [f"sha256:{sha256(layer)}" for layer in layers]
    document = {
        "architecture": machine,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": diffs},
    }
    return json.dumps(document).encode()


@dataclass
class Layout:
    """An OCI image layout in the making."""

    blobs: dict[str, bytes]
    manifests: list[dict[str, Any]]

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        self.blobs[sha256(data)] = data
        return {"mediaType": kind, "digest": f"sha256:{sha256(data)}", "size": len(data)}

    def add(
        self,
        layers: Sequence[bytes],
        packed: Sequence[bytes] | None = None,
        *,
        name: str = "",
        machine: str = MACHINE,
        config: bytes | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Add an image; its descriptor."""
        kind = "application/vnd.oci.image"
        document = config or configuration(layers, machine, **settings)
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": self.blob(document, f"{kind}.config.v1+json"),
            "layers": [self.blob(data, f"{kind}.layer.v1.tar") for data in packed or layers],
        }
        found = self.blob(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json")
        found["platform"] = {"os": "linux", "architecture": machine}
        if name:
            found["annotations"] = {"org.opencontainers.image.ref.name": name}
        self.manifests.append(found)
        return found

    def members(self) -> Iterator[Entry]:
        yield entry("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        index = {"schemaVersion": 2, "manifests": self.manifests}
        yield entry("index.json", json.dumps(index).encode())
        for digest, data in self.blobs.items():
            yield entry(f"blobs/sha256/{digest}", data)

    def tar(self) -> bytes:
        return tar(*self.members())


def layout() -> Layout:
    return Layout({}, [])


def oci(*layers: bytes, **settings: Any) -> bytes:
    """An OCI image layout with one image."""
    made = layout()
    made.add(layers, **settings)
    return made.tar()


def docker_save(*layers: bytes, tag: str = "work:latest", **settings: Any) -> bytes:
    """What `docker save` wrote until version 24: a layer that repeats is a link."""
    config = configuration(layers, **settings)
    members, names, seen = [], [], {}
    for number, layer in enumerate(layers):
        name = f"{number:064x}/layer.tar"
        names.append(name)
        if layer in seen:
            members.append(symlink(name, f"../{seen[layer]}"))
            continue
        seen[layer] = name
        members.append(entry(name, layer))
    manifest = [{"Config": f"{sha256(config)}.json", "RepoTags": [tag], "Layers": names}]
    return tar(
        *members,
        entry(f"{sha256(config)}.json", config),
        entry("manifest.json", json.dumps(manifest).encode()),
        entry("repositories", b"{}"),
    )


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def zstd(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    half = len(data) // 2
    pack = zstandard.ZstdCompressor(level=1).compress
    return pack(data[:half]) + pack(data[half:])


def pieces(data: bytes, size: int = 200_000) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    """What a directory holds: types, modes, times, contents, links, attributes, whiteouts."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = Path(directory, name)
            info = path.lstat()
            content: object = os.readlink(path) if path.is_symlink() else ""
            if path.is_file() and not path.is_symlink():
                content = sha256(path.read_bytes())
            marks = [
                (mark, os.getxattr(path, mark, follow_symlinks=False))
                for mark in os.listxattr(path, follow_symlinks=False)
                if not mark.startswith("user.overlay.") or mark == OPAQUE
            ]
            if stat.S_ISCHR(info.st_mode):  # a whiteout: only its being there counts
                found[str(path.relative_to(top))] = ("whiteout", info.st_rdev)
                continue
            links = info.st_nlink if not path.is_dir() else 0
            key = str(path.relative_to(top))
            found[key] = (oct(info.st_mode), info.st_mtime, content, marks, links)
    return found


def check_layout(archive: bytes, name: str) -> None:
    """An image layout by its specification, and `manifest.json` that says the same."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        content = {m.name: found.extractfile(m).read() for m in found.getmembers()}

    def blob(descriptor: dict) -> bytes:
        data = content["blobs/" + descriptor["digest"].replace(":", "/")]
        assert sha256(data) == descriptor["digest"].removeprefix("sha256:")
        assert len(data) == descriptor["size"]
        return data

    kind = "application/vnd.oci.image"
    assert json.loads(content["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads(content["index.json"])
    (entry,) = index["manifests"]
    assert (index["schemaVersion"], entry["mediaType"]) == (2, f"{kind}.manifest.v1+json")
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == name
    manifest = json.loads(blob(entry))
    assert manifest["config"]["mediaType"] == f"{kind}.config.v1+json"
    config = json.loads(blob(manifest["config"]))
    assert config["os"], config["architecture"]
    assert {layer["mediaType"] for layer in manifest["layers"]} == {f"{kind}.layer.v1.tar"}
    digests = [f"sha256:{sha256(blob(layer))}" for layer in manifest["layers"]]
    assert config["rootfs"] == {"type": "layers", "diff_ids": digests}
    assert len(config["history"]) == len(digests)
    (docker,) = json.loads(content["manifest.json"])
    assert docker["RepoTags"] == [name]
    assert docker["Config"].endswith(sha256(blob(manifest["config"])))
    assert [f"sha256:{p.rpartition('/')[2]}" for p in docker["Layers"]] == digests
