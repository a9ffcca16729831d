"""Layers as archives: what is unpacked is what was packed, times and modes of directories too."""

import io
import os
import tarfile

from sandbox_svc.backends.tree_archive import Quota, TreeReader, write_tree
from sandbox_svc.images.streams import TarStream


def packed(top) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        write_tree(archive, top, "layers/0", 1 << 30)
    return target.getvalue()


def test_a_layer_that_was_unpacked_packs_to_the_same_bytes(tmp_path):
    layer, copy = tmp_path / "layer", tmp_path / "copy"
    (layer / "a" / "b").mkdir(parents=True)
    copy.mkdir()
    (layer / "a" / "file").write_bytes(b"content")
    (layer / "a" / "b" / "deep").write_bytes(b"more")
    (layer / "link").symlink_to("a/file")
    (layer / "a" / "b").chmod(0o555)
    for number, path in enumerate(sorted(layer.rglob("*"))):
        os.utime(path, (1000 + number, 1000 + number), follow_symlinks=False)
    data = packed(layer)
    stream = TarStream(io.BytesIO(data), Quota(1 << 20))
    with TreeReader(copy, None, Quota(1 << 20)) as reader:
        for member in stream.members():
            path = member.name.removeprefix("layers/0/")
            reader.add(member, path, stream.content(member.size))
        reader.finish()
    assert packed(copy) == data
    assert (copy / "a" / "b").stat().st_mode & 0o777 == 0o555
    (layer / "a" / "b").chmod(0o755)
    (copy / "a" / "b").chmod(0o755)
