"""The blob store: content addressing, verification on read, and what survives damage."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regreen.blobs import (
    CHUNK_BYTES,
    Digest,
    ObjectBlobs,
    compress,
    decompress,
    digest_of,
    open_blobs,
)
from regreen.rpc.errors import DataLoss, InvalidArgument, NotFound


@pytest.fixture(params=["local", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectBlobs:
    return open_blobs(tmp_path / "blobs" if request.param == "local" else "memory://")


def test_put_get_round_trip(blobs: ObjectBlobs):
    async def scenario():
        for content in (b"", b"x", os.urandom(3 * CHUNK_BYTES + 7)):
            digest = await blobs.put(content)
            assert digest == digest_of(content)
            assert await blobs.put(content) == digest
            assert await blobs.exists(digest)
            assert await blobs.get(digest) == content
            assert b"".join([piece async for piece in blobs.stream(digest)]) == content

    asyncio.run(scenario())


def test_concurrent_puts_of_one_content(blobs: ObjectBlobs):
    async def scenario():
        content = os.urandom(1 << 20)
        digests = await asyncio.gather(*(blobs.put(content) for _ in range(16)))
        assert set(digests) == {digest_of(content)}
        assert await blobs.get(digests[0]) == content

    asyncio.run(scenario())


def test_absent_blob_is_not_found(blobs: ObjectBlobs):
    async def scenario():
        missing = digest_of(b"never stored")
        assert not await blobs.exists(missing)
        with pytest.raises(NotFound):
            await blobs.get(missing)
        with pytest.raises(NotFound):
            async for _ in blobs.stream(missing):
                pass
        await blobs.delete(missing)

    asyncio.run(scenario())


def test_malformed_digest_names_the_field(blobs: ObjectBlobs):
    with pytest.raises(InvalidArgument) as caught:
        asyncio.run(blobs.get(Digest("../../etc/passwd", 1)))
    assert caught.value.field == "digest.sha256"


@pytest.mark.parametrize("damage", [b"short", b"same length!", b"much longer than before"])
def test_damage_is_data_loss_and_a_put_heals_a_wrong_length(tmp_path: Path, damage: bytes):
    async def scenario():
        blobs = open_blobs(tmp_path)
        content = b"hello worlds"
        digest = await blobs.put(content)
        path = tmp_path / digest.sha256[:2] / digest.sha256
        path.write_bytes(damage)
        with pytest.raises(DataLoss):
            await blobs.get(digest)
        with pytest.raises(DataLoss):
            async for _ in blobs.stream(digest):
                pass
        if len(damage) != len(content):
            assert not await blobs.exists(digest)
            await blobs.put(content)
            assert await blobs.get(digest) == content

    asyncio.run(scenario())


def test_files_and_streams(blobs: ObjectBlobs, tmp_path: Path):
    async def scenario():
        source = tmp_path / "weights.bin"
        source.write_bytes(os.urandom(9 << 20))
        digest = await blobs.put_file(source)
        assert await blobs.put_file(source) == digest

        async def chunks() -> AsyncIterator[bytes]:
            yield source.read_bytes()[: 1 << 20]
            yield source.read_bytes()[1 << 20 :]

        assert await blobs.put_stream(chunks()) == digest
        target = tmp_path / "copy.bin"
        await blobs.get_file(digest, target)
        assert target.read_bytes() == source.read_bytes()
        with pytest.raises(NotFound):
            await blobs.get_file(digest_of(b"?"), tmp_path / "absent")
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
            "copy.bin",
            "weights.bin",
        ]

    asyncio.run(scenario())


def test_unknown_scheme_is_refused():
    with pytest.raises(InvalidArgument, match="ftp"):
        open_blobs("ftp://somewhere/else")


def test_compressed_frames_are_bounded_and_checked():
    frame = compress(b"a" * 100_000)
    assert len(frame) < 200
    assert decompress(frame, 100_000) == b"a" * 100_000
    with pytest.raises(DataLoss, match="over 99999"):
        decompress(frame, 99_999)
    with pytest.raises(DataLoss):
        decompress(frame[:-3], 100_000)
    with pytest.raises(DataLoss):
        decompress(b"not a frame", 100_000)


async def test_what_is_taken_away_at_once_is_put_again(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path.as_uri())
    done = threading.Event()
    removed = 0

    def collect() -> None:
        nonlocal removed
        while not done.is_set():
            for path in tmp_path.glob("*/*"):
                if len(path.name) == 64:
                    path.unlink(missing_ok=True)
                    removed += 1

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for number in range(300):
            content = str(number).encode()
            assert await blobs.put(content) == digest_of(content)
    finally:
        done.set()
        collector.join()
    assert removed
    assert await blobs.get(await blobs.put(b"kept")) == b"kept"
