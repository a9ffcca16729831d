"""Which image an archive holds for this machine, and what its documents say of it.

- Read are OCI image layouts, and what `docker save` writes in its old and its OCI-compatible form.
- An image is chosen by reference and platform; if that is not exactly one, the refusal names what
  there is.
- Digests of documents and of compressed layers are checked here, those of unpacked layers where
  they are unpacked. Nothing of a document is used that was not checked for its type.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.images.archive import Archive, parsed
from sandbox_svc.images.streams import damaged

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_LAYOUT, _INDEX, _DOCKER = "oci-layout", "index.json", "manifest.json"
_NESTED, _MANIFESTS = 4, 1000
MAX_LAYERS = 64
"""What still fits into the options of a mount, with room for snapshots on top."""
_CONFIG_BYTES = 512 << 10
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STATEMENT = "vnd.docker.reference.type"
_Json = Mapping[str, Any]


class Format(Enum):
    """What an archive is."""

    UNKNOWN = "unknown"
    OCI = "oci"
    DOCKER = "docker"
    ROOT = "root"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer in an archive."""

    name: str
    """File of the archive; empty: the archive itself is the layer."""
    diff_id: str = ""
    """SHA-256 that it must have unpacked; empty: whatever it has."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image in an archive."""

    layers: Sequence[Layer]
    config: _Json = field(default_factory=dict)
    config_sha256: str = ""
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an image asks of whoever runs it."""

    env: Mapping[str, str]
    cwd: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Candidate:
    names: tuple[str, ...]
    platform: str
    manifest: str
    """File of the archive."""


def find_image(archive: Archive, kind: Format, reference: str, platform: str) -> Image:
    """The image for this machine.

    Raises:
        InvalidArgument: there is none, there are several, or a document is malformed.
    """
    if kind is Format.UNKNOWN:
        kind = _kind_of(archive)
    if kind is Format.ROOT:
        if reference:
            raise InvalidArgument(
                "reference", "names an image, and the archive is a directory", "leave it out"
            )
        return Image((Layer(""),))
    found = (
        _from_layout(archive, reference, platform)
        if kind is Format.OCI
        else _from_docker(archive, reference)
    )
    has = f"{_text(found.config, 'os')}/{_text(found.config, 'architecture')}"
    if has != platform:
        raise InvalidArgument(
            "archive",
            f"holds an image for {has}, and this machine is {platform}",
            "send one for this machine",
        )
    if len(found.layers) > MAX_LAYERS:
        raise damaged(f"has {len(found.layers)} layers, more than {MAX_LAYERS}: squash it")
    return found


def _kind_of(archive: Archive) -> Format:
    if archive.holds(_LAYOUT) and archive.holds(_INDEX):
        return Format.OCI
    if not archive.holds(_DOCKER):
        return Format.ROOT
    entries = parsed(archive.read(_DOCKER), _DOCKER)
    first = entries[0] if isinstance(entries, list) and entries else None
    return Format.DOCKER if isinstance(first, dict) and "Layers" in first else Format.ROOT


def _from_layout(archive: Archive, reference: str, platform: str) -> Image:
    layout = _mapping(parsed(archive.read(_LAYOUT), _LAYOUT), _LAYOUT)
    if not _text(layout, "imageLayoutVersion").startswith("1."):
        raise damaged("has another version of the image layout than 1")
    index = _mapping(parsed(archive.read(_INDEX), _INDEX), _INDEX)
    found = list(_Finder(archive).candidates(index))
    named = [one for one in found if not reference or _is_named(one.names, reference)]
    if not named:
        raise _none(reference, [name for one in found for name in one.names])
    here = [one for one in named if one.platform in (platform, "")]
    if not here:
        there = ", ".join(sorted({one.platform for one in named}))
        raise InvalidArgument(
            "archive",
            f"holds images for {there}; this machine is {platform}",
            "send one for this machine",
        )
    if len({one.manifest for one in here}) > 1:
        raise _several([name for one in here for name in one.names[:1]])
    manifest = _mapping(parsed(archive.read(here[0].manifest), "manifest"), "manifest")
    config_at = _blob(archive, _mapping(manifest.get("config"), "configuration"))
    layers = [_mapping(one, "layer") for one in _sequence(manifest.get("layers"), "layers")]
    return _image(
        archive,
        config_at,
        [_blob(archive, layer) for layer in layers],
        next(iter(here[0].names), ""),
    )


class _Finder:
    """Looks for manifests in an index and in those that it names, so many and no more."""

    def __init__(self, archive: Archive) -> None:
        self._archive, self._left = archive, _MANIFESTS

    def candidates(
        self, index: _Json, names: tuple[str, ...] = (), depth: int = 0
    ) -> Iterator[_Candidate]:
        """Every manifest of an index that may be an image and whose document is there."""
        entries = _sequence(index.get("manifests"), "manifests")
        self._left -= len(entries)
        if depth > _NESTED or self._left < 0:
            raise damaged("has indexes that are too deep or too long")
        for entry in entries:
            entry = _mapping(entry, "manifests")
            notes = _mapping(entry.get("annotations") or {}, "annotations")
            own = names or tuple(filter(None, (_text(notes, key) for key in _NAMES)))
            if not self._archive.holds(_place(entry)) or _STATEMENT in notes:
                continue  # another machine's, left out; or a statement about an image
            at = _blob(self._archive, entry)
            document = _mapping(parsed(self._archive.read(at), "manifest"), "manifest")
            if "manifests" in document:
                yield from self.candidates(document, own, depth + 1)
                continue
            platform = _platform(entry) or _platform_of_config(self._archive, document)
            if "unknown" not in platform:
                yield _Candidate(own, platform, at)


def _platform(entry: _Json) -> str:
    if "platform" not in entry:
        return ""
    platform = _mapping(entry["platform"], "platform")
    return f"{_text(platform, 'os')}/{_text(platform, 'architecture')}"


def _platform_of_config(archive: Archive, manifest: _Json) -> str:
    at = _blob(archive, _mapping(manifest.get("config"), "configuration"))
    config = _mapping(parsed(archive.read(at), "configuration"), "configuration")
    return f"{_text(config, 'os')}/{_text(config, 'architecture')}"


def _place(descriptor: _Json) -> str:
    digest = _text(descriptor, "digest")
    if not _SHA256.fullmatch(digest):
        raise damaged(f"names content by {digest[:80]!r}, and only sha256 is known here")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _blob(archive: Archive, descriptor: _Json) -> str:
    """The file that a descriptor names, checked against it."""
    at = _place(descriptor)
    size = archive.size(at)
    if size < 0:
        raise damaged(f"lacks {at}")
    if descriptor.get("size") != size:
        raise damaged(f"has {size} bytes at {at}, and a document says {descriptor.get('size')!r}")
    if archive.sha256(at) != at.rpartition("/")[2]:
        raise damaged(f"has other content at {at} than its name says")
    return at


def _from_docker(archive: Archive, reference: str) -> Image:
    entries = _sequence(parsed(archive.read(_DOCKER), _DOCKER), _DOCKER)
    found: list[tuple[tuple[str, ...], _Json]] = []
    for number, entry in enumerate(entries[:_MANIFESTS]):
        entry = _mapping(entry, f"{_DOCKER}[{number}]")
        tags = _sequence(entry.get("RepoTags") or [], "RepoTags")
        found.append((tuple(str(tag) for tag in tags), entry))
    named = [one for one in found if not reference or _is_named(one[0], reference)]
    if not named:
        raise _none(reference, [name for names, _ in found for name in names])
    if len({_text(entry, "Config") for _, entry in named}) > 1:
        raise _several([name for names, _ in named for name in names[:1]])
    names, entry = named[0]
    layers = [str(layer) for layer in _sequence(entry.get("Layers"), "Layers")]
    return _image(archive, _text(entry, "Config"), layers, next(iter(names), ""))


def _image(archive: Archive, config_at: str, layers: Sequence[str], reference: str) -> Image:
    data = archive.read(config_at)
    if len(data) > _CONFIG_BYTES:
        raise damaged(f"has a configuration of more than {_CONFIG_BYTES} bytes")
    config = _mapping(parsed(data, "configuration"), "configuration")
    root = _mapping(config.get("rootfs"), "rootfs")
    diffs = [str(one) for one in _sequence(root.get("diff_ids"), "diff_ids")]
    if root.get("type") != "layers" or len(diffs) != len(layers):
        raise damaged("has a configuration that does not fit its layers")
    if not all(map(_SHA256.fullmatch, diffs)):
        raise damaged("names its layers by other digests than sha256")
    found = tuple(
        Layer(name, diff.removeprefix("sha256:")) for name, diff in zip(layers, diffs, strict=True)
    )
    return Image(found, config, hashlib.sha256(data).hexdigest(), reference)


def root_config(diff_id: str, platform: str) -> _Json:
    """The configuration of an archive that is one directory."""
    system, _, machine = platform.partition("/")
    return {
        "architecture": machine,
        "os": system,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
    }


def encoded(document: _Json) -> bytes:
    """A document as bytes that depend on its content alone."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def settings_of(image: Image) -> Settings:
    """Environment, directory and what else an image asks for.

    Raises:
        InvalidArgument: a value cannot be used.
    """
    config = _mapping(image.config.get("config") or {}, "config")
    env = {"PATH": _PATH}
    for entry in _sequence(config.get("Env") or [], "Env"):
        name, equals, value = str(entry).partition("=")
        if name and equals:
            env[_plain(name, "Env")] = _plain(value, "Env")
    cwd = _plain(_text(config, "WorkingDir"), "WorkingDir") or "/"
    labels = {"image.reference": image.reference, "image.user": _text(config, "User")}
    for key in ("Entrypoint", "Cmd"):
        words = [str(word) for word in _sequence(config.get(key) or [], key)]
        labels[f"image.{key.lower()}"] = json.dumps(words) if words else ""
    kept = {name: _plain(value, name) for name, value in labels.items() if value}
    return Settings(env, cwd if cwd.startswith("/") else f"/{cwd}", kept)


def _plain(text: str, what: str) -> str:
    """Text that a command and a message can carry."""
    if "\0" in text or text.encode("utf-8", "ignore").decode() != text:
        raise damaged(f"has a configuration with a malformed {what}")
    return text


def _is_named(names: Sequence[str], reference: str) -> bool:
    wanted = _full(reference)
    return any(name == reference or _full(name) == wanted for name in names)


def _full(name: str) -> str:
    name = name.removeprefix("docker.io/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"


def _none(reference: str, names: Sequence[str]) -> InvalidArgument:
    there = ", ".join(sorted(set(names))[:20]) or "images without names"
    if not reference:
        return damaged("holds no image")
    return InvalidArgument("reference", f"{reference[:200]!r} is not there", f"there is {there}")


def _several(names: Sequence[str]) -> InvalidArgument:
    there = ", ".join(sorted(set(names))[:20]) or "images without names"
    return InvalidArgument("reference", "the archive holds several images", f"name one: {there}")


def _mapping(value: object, what: str) -> _Json:
    if not isinstance(value, dict):
        raise damaged(f"has a malformed document: {what} is no object")
    return value


def _sequence(value: object, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise damaged(f"has a malformed document: {what} is no list")
    return value


def _text(document: _Json, key: str) -> str:
    value = document.get(key) or ""
    if not isinstance(value, str):
        raise damaged(f"has a malformed document: {key} is no text")
    return value
