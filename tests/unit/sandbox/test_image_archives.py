"""Image archives with random damage: each is taken or refused by name, and nothing else happens."""

import gzip
import os
import random
import subprocess
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from sandbox_svc.backends.layers import Layout, remove_tree
from sandbox_svc.backends.tree_archive import Quota
from sandbox_svc.images.manifest import Format
from sandbox_svc.images.pack import image_archive
from sandbox_svc.images.store import _take_archive
from tests.integration.sandbox import images as made

_QUOTA = 4 << 20


def _layer() -> bytes:
    """A bit of everything that a layer may have."""
    return made.tar(
        made.folder("d", 0o700),
        made.entry("d/x" * 30, b"1" * 700, pax_headers={"SCHILY.xattr.user.k": "v"}),
        made.hard_link("h", "d/x" * 30),
        made.symlink("l", "../../.."),
        made.entry("d/.wh.gone"),
        made.entry("e/.wh..wh..opq"),
        made.entry("\u00fc" * 90, b"2", mtime=1.5),
    )


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """The archive with a few bytes changed, a block lost, doubled, or moved, or its end cut."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        if len(out) < 2048:
            break
        at = chance.randrange(len(out) // 512) * 64
        block = out[at : at + 512]
        match chance.randrange(6):
            case 0:
                del out[at : at + 512]
            case 1:
                out[at:at] = block
            case 2:
                out[at : at + 512] = chance.randbytes(512)
            case 3:
                del out[chance.randrange(1024, len(out)) :]
            case _:
                for _ in range(chance.randint(1, 4)):
                    out[min(len(out) - 1, at + chance.randrange(512))] = chance.randrange(256)
                if chance.random() < 0.7 and len(out) >= at + 512:
                    _sign(out, at)
    return bytes(out)


def _sign(out: bytearray, at: int) -> None:
    """Make a header's checksum fit again, so that what it says is believed."""
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])


def _take(files: Layout, archive: bytes, kind: Format) -> bool:
    spool = files.draft_layer()
    try:
        (spool / "sent").write_bytes(archive)
        _take_archive(files, spool, kind, "", Quota(_QUOTA, 5000))
        return True
    except (InvalidArgument, ResourceExhausted):
        return False
    finally:
        remove_tree(spool)


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_named_and_nothing_leaves_the_layer(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    (tmp_path / "kept").write_text("kept")
    layer = _layer()
    goods = {
        Format.OCI: made.oci(layer),
        Format.DOCKER: made.docker_save(layer, layer),
        Format.ROOT: layer,
        Format.UNKNOWN: made.oci(layer, packed=[made.gzipped(layer)]),
    }
    outcomes = []
    for number in range(25):
        files = Layout(tmp_path / f"home{number}", None)
        for kind, good in goods.items():
            outcomes.append(_take(files, _damaged(good, chance), kind))
            assert list((files.home / "trash").iterdir()) == []
            deep = made.oci(_damaged(layer, chance))  # a layer that is damaged and well signed
            outcomes.append(_take(files, deep, Format.OCI))
        assert sorted(os.listdir(files.home)) == ["base", "layers", "run", "stage", "trash"]
        remove_tree(files.home)
    assert sorted(os.listdir(tmp_path)) == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert {True, False} == set(outcomes)


def test_the_bound_of_an_export_is_that_of_all_its_layers(tmp_path):
    for name in ("below", "above"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(name.encode() * 100_000)
    tops = [tmp_path / "below", tmp_path / "above"]
    assert sum(map(len, image_archive(tops, {}, "x", max_bytes=2_000_000))) > 1_000_000
    for few, most in ((tops[:1], 600_000), (tops[1:], 600_000)):
        assert list(image_archive(few, {}, "x", max_bytes=most))
    with pytest.raises(FailedPrecondition, match="larger than this service takes"):
        list(image_archive(tops, {}, "x", max_bytes=600_000))


_THREE = made.files(a=b"1" * 600, b=b"2" * 600, c=b"3" * 600)
_MEMBER = 1536
"""Bytes of one of these members: its header, and its content in whole blocks."""


def _refused(tmp_path: Path, archive: bytes, kind: Format) -> str:
    """Why an archive is refused; nothing of it is left."""
    files = Layout(tmp_path / "home", None)
    spool = files.draft_layer()
    (spool / "sent").write_bytes(archive)
    with pytest.raises(InvalidArgument) as caught:
        _take_archive(files, spool, kind, "", Quota(1 << 30, 5000))
    remove_tree(spool)
    assert os.listdir(files.home / "layers") == []
    remove_tree(files.home)
    return str(caught.value)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("blocks", [0, 1], ids=["no end", "half an end"])
def test_an_archive_without_its_end_is_cut_short(tmp_path, packed, blocks):
    for members in (1, 2, 3):
        cut = _THREE[: members * _MEMBER] + bytes(512 * blocks)
        root = made.gzipped(cut) if packed else cut
        assert "cut short" in _refused(tmp_path, root, Format.ROOT)
        layers = [made.gzipped(cut)] if packed else None
        assert "cut short" in _refused(tmp_path, made.oci(cut, packed=layers), Format.OCI)
    image = made.oci(_THREE)
    whole = image[: len(image.rstrip(b"\0")) // 512 * 512 + 512]
    assert "cut short" in _refused(tmp_path, whole + bytes(512 * blocks), Format.OCI)


def test_the_end_that_tools_write_is_enough(tmp_path):
    ended = _THREE[: 3 * _MEMBER] + bytes(1024)
    (tmp_path / "a").write_text("a")
    tools = [
        subprocess.run(["tar", *flags, "-C", tmp_path, "a"], capture_output=True, check=True).stdout
        for flags in (["-cf-"], ["-cf-", "-b1"], ["-cf-", "-b2048"], ["-czf-"])
    ]
    for number, root in enumerate([ended, _THREE, *tools]):
        assert _take(Layout(tmp_path / f"root{number}", None), root, Format.ROOT)
    empty = bytes(1024)  # engines write it for a step that changed no file
    assert _take(Layout(tmp_path / "image", None), made.oci(ended, empty), Format.OCI)


def test_nothing_but_zeros_is_refused_at_once(tmp_path, monkeypatch):
    unpacked = []
    monkeypatch.setattr(gzip.GzipFile, "read", _counting(gzip.GzipFile.read, unpacked))
    zeros = gzip.compress(bytes(1 << 20)) * 64
    for kind in (Format.UNKNOWN, Format.ROOT):
        assert "holds nothing" in _refused(tmp_path, zeros, kind)
        assert "holds nothing" in _refused(tmp_path, bytes(10_240), kind)
    assert sum(unpacked) < 1 << 20
    for archive, kind in (
        (gzip.compress(_THREE) + zeros, Format.ROOT),
        (made.oci(bytes(64 << 20), packed=[zeros]), Format.OCI),
    ):
        unpacked.clear()
        assert "after its end" in _refused(tmp_path, archive, kind)
        assert sum(unpacked) < 32 << 20


def _counting(read, sizes: list[int]):
    def counted(self, size=-1):
        data = read(self, size)
        sizes.append(len(data))
        return data

    return counted
