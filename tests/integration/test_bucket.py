"""Credentials of a bucket are read from files, renewed while it is open, or are the machine's."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from regreen import blobs as blobs_module
from regreen.blobs import open_blobs, ready_blobs
from regreen.bucket import secrets_folder
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from tests.fixtures.bucket import Bucket, bucket


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with bucket() as made:
        yield made


def mounted(place: Path, server: Bucket, **more: str) -> str:
    """The URL of the bucket, with a folder as Kubernetes mounts a Secret."""
    data = place / "..2026_11_29"
    data.mkdir()
    (place / "..data").symlink_to(data.name)
    values = {
        "AWS_REGION": "eu-somewhere-1\n",
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ALLOW_HTTP": "true",
        **more,
    }
    for name, value in values.items():
        (data / name).write_text(value)
        (place / name).symlink_to(f"..data/{name}")
    return f"s3://regreen/tokens?secrets={place}"


KEYS = {"AWS_ACCESS_KEY_ID": "first\n", "AWS_SECRET_ACCESS_KEY": "secret\n"}


async def test_keys_are_read_from_files_and_renewed(server: Bucket, tmp_path: Path) -> None:
    blobs = open_blobs(mounted(tmp_path, server, **KEYS))
    digest = await blobs.put(b"tokens")
    assert await blobs.get(digest) == b"tokens"
    assert set(server.seen) == {("first", "eu-somewhere-1")}
    (path,) = server.objects
    assert path.startswith("/regreen/tokens/")
    assert "secrets" not in path
    server.known = {"second"}
    with pytest.raises(Unavailable, match="refuses the credentials") as refused:
        await blobs.get(digest)
    assert "\n" not in refused.value.message
    (tmp_path / "..data" / "AWS_ACCESS_KEY_ID").write_text("second\n")
    async with asyncio.timeout(10):
        while True:  # keys that were read a moment ago are used once more
            with contextlib.suppress(Unavailable):
                assert await blobs.get(digest) == b"tokens"
                break
            await asyncio.sleep(0.05)
    assert server.seen[-1] == ("second", "eu-somewhere-1")
    assert not [name for name in os.environ if name.startswith("AWS_")]


async def test_without_a_folder_the_environment_says_who_it_is(
    server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**KEYS, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value.strip())
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    await open_blobs("s3://regreen/tokens").put(b"tokens")
    assert set(server.seen) == {("first", "us-east-1")}
    server.seen.clear()
    # A folder without keys leaves who it is to the machine, here its environment.
    await open_blobs(mounted(tmp_path, server)).put(b"others")
    assert set(server.seen) == {("first", "eu-somewhere-1")}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("secrets=relative", "whole path"),
        ("secrets=", "whole path"),
        ("secrets=/a&region=b", "parameters"),
        ("secrets=/no/such/folder", "cannot be read"),
    ],
)
def test_what_is_no_folder_is_refused(query: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        open_blobs(f"s3://regreen/tokens?{query}")


def test_half_a_key_is_refused(server: Bucket, tmp_path: Path) -> None:
    url = mounted(tmp_path, server, AWS_ACCESS_KEY_ID="first")
    with pytest.raises(InvalidArgument, match="no file AWS_SECRET_ACCESS_KEY"):
        open_blobs(url)
    (tmp_path / "AWS_SECRET_KEY").write_text("secret")
    with pytest.raises(InvalidArgument, match="has a file 'AWS_SECRET_KEY'; use AWS_ACCESS"):
        open_blobs(url)
    assert secrets_folder(url) == str(tmp_path)
    assert secrets_folder("s3://regreen/tokens") == ""


async def test_a_service_does_not_start_on_a_bucket_that_refuses_it(
    server: Bucket, tmp_path: Path
) -> None:
    url = mounted(tmp_path, server, **KEYS)
    await ready_blobs(url)
    server.known = {"second"}
    with pytest.raises(FailedPrecondition, match=r"cannot be written.*Forbidden.*give the name"):
        await ready_blobs(url)
    server.known, server.absent = {"first"}, {"regreen"}
    with pytest.raises(FailedPrecondition, match=r"s3://regreen/tokens cannot.*give the name"):
        await ready_blobs(url)


async def test_a_bucket_that_is_silent_at_the_start_is_asked_again_later(
    server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "_FIRST_S", 1.0)
    url = mounted(tmp_path, server, **KEYS)
    server.silent = True
    blobs = await ready_blobs(url)
    server.silent = False
    digest = await blobs.put(b"tokens")
    assert await blobs.get(digest) == b"tokens"
