"""D: attacks on what is copied out of a sandbox and into it, and on archives.

The counterpart is always the naive way: paths of a sandbox resolved by who stands outside.
"""

import asyncio
import gzip
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
)
from sandbox_svc.backends.base import Mount
from sandbox_svc.backends.tree_archive import Quota, TreeReader
from sandbox_svc.images.streams import TarStream
from tests.contract.abuse.walls import WIDE, needs_python, pause, python
from tests.contract.runtimes import SMALL, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")
_SECRET = "of the host"
REFUSED = (FailedPrecondition, InvalidArgument, NotFound)


async def planted(box, secret: Path) -> dict[str, str]:
    """Paths in a sandbox that mean harm to who reads or writes them."""
    script = (
        f"cd /work; mkdir -p out deep/er; ln -s {secret} out/absolute;"
        f" ln -s ../../../../../../../../../../..{secret} out/up; ln -s {secret.parent} out/dir;"
        " ln -s loop out/loop; mkfifo out/pipe; ln -s /dev/zero out/device; ln -s / out/root;"
        " ln -s /proc/self/mem out/mem; ln -s /proc/1/root out/first; ln -s pipe out/to-pipe"
    )
    assert (await sh(box, script)).ok
    return {
        "absolute link": "/work/out/absolute",
        "link upwards": "/work/out/up",
        "link to a directory": f"/work/out/dir/{secret.name}",
        "dots": f"/work/../../../../../..{secret}",
        "dots in the middle": f"/work/deep/er/../../../../../..{secret}",
        "through the root": f"/work/out/root/..{secret}",
        "absolute": str(secret),
        "loop": "/work/out/loop",
        "pipe": "/work/out/pipe",
        "link to a pipe": "/work/out/to-pipe",
        "device": "/dev/zero",
        "link to a device": "/work/out/device",
        "memory": "/work/out/mem",
        "first process": f"/work/out/first{secret}",
        "directory": "/work/out",
        "magic": f"/proc/self/root{secret}",
        "working directory": f"/proc/self/cwd/..{secret}",
    }


async def test_d1_nothing_is_copied_out_from_elsewhere(box, common):
    secret = common / "secret"
    secret.write_text(_SECRET)
    for name, path in (await planted(box, secret)).items():
        async with asyncio.timeout(5):
            with pytest.raises(REFUSED):
                print(name, await box.read_file(path, 1 << 20))


def _read_by_cat(path: Path) -> None:
    subprocess.run(["cat", path], timeout=0.5, check=False)


async def test_d1_who_resolves_outside_reads_the_host(box, common):
    (common / "secret").write_text(_SECRET)
    await planted(box, common / "secret")
    top = Path(box.upper_path)
    for name in ("absolute", "dir/secret"):
        assert (top / "work/out" / name).read_text() == _SECRET
    with pytest.raises(subprocess.TimeoutExpired):  # nobody ever writes into the pipe
        await asyncio.to_thread(_read_by_cat, top / "work/out/pipe")
    with (top / "work/out/device").open("rb") as endless:
        assert len(endless.read(1 << 20)) == 1 << 20


_SWAP = """
import os, sys
os.chdir("/work")
open("keep", "w").write("inside")
while True:
    os.symlink(sys.argv[1], "t"); os.rename("t", "swapped")
    os.link("keep", "t"); os.rename("t", "swapped")
    os.symlink(os.path.dirname(sys.argv[1]), "t"); os.rename("t", "there")
    os.mkdir("d"); os.unlink("there"); os.rename("d", "there")
    os.rmdir("there")
    os.symlink("/work", "there")
"""


@pytest_asyncio.fixture(loop_scope="module")
async def swapping(box, common):
    """A box in which names become files, directories and links in turn, and the host's secret."""
    secret = common / "secret"
    secret.write_text(_SECRET)
    task = asyncio.create_task(python(box, _SWAP, str(secret), timeout_s=60))
    async with asyncio.timeout(10):
        while (await sh(box, "test -e /work/swapped")).exit_code:
            await pause()
    yield box, secret
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@needs_python
async def test_d1_d2_links_swapped_meanwhile_lead_nowhere(swapping):
    box, secret = swapping
    answers = set()
    for number in range(300):
        for path in ("/work/swapped", f"/work/there/{secret.name}"):
            answers.add(await _outcome(box.read_file(path, 100)))
        if number % 10 == 0:
            for path in ("/work/swapped", "/work/there/made"):
                answers.add(await _outcome(box.write_file(path, b"inside")))
    assert answers <= {b"inside", b"", None, "FailedPrecondition", "InvalidArgument", "NoSuchFile"}
    assert b"inside" in answers
    assert (secret.read_text(), os.listdir(secret.parent)) == (_SECRET, ["secret"])


async def _outcome(work: Awaitable[bytes | None]) -> object:
    """What was read, or the name of the refusal."""
    try:
        return await work
    except RegreenError as error:
        return type(error).__name__


@needs_python
async def test_d1_who_looks_first_and_opens_then_loses_the_race(swapping):
    box, _ = swapping
    path = Path(box.upper_path) / "work/swapped"

    def lose() -> str:
        for _ in range(1_000_000):
            try:
                if not stat.S_ISREG(path.lstat().st_mode):
                    continue
                if (found := path.read_text()) == _SECRET:
                    return found
            except OSError:
                continue
        return ""

    async with asyncio.timeout(30):
        assert await asyncio.to_thread(lose) == _SECRET


async def test_d1_a_file_of_ten_gigabytes_of_nothing_is_refused_at_once(runtime):
    box = await runtime.create([], limits=replace(WIDE, disk_bytes=20 << 30))
    assert (await sh(box, "truncate -s 10G /work/holes")).ok
    async with asyncio.timeout(5):
        with pytest.raises(FailedPrecondition, match="more than the"):
            await box.read_file("/work/holes", 1 << 20)
        part, info = await box.read_range("/work/holes", offset=9 << 30, max_bytes=1000)
    assert (part, info.size_bytes) == (bytes(1000), 10 << 30)
    with (Path(box.upper_path) / "work/holes").open("rb") as naive:  # only its first megabytes
        assert len(naive.read(64 << 20)) == 64 << 20
    await box.delete()


async def test_d1_magic_links_and_swapped_links_are_refused(box):
    await sh(box, "ln -s /proc/1/root/etc/passwd /work/magic; ln -s /proc/self/mem /work/mem")
    for path in ("/work/magic", "/work/mem", "/proc/self/status", "/proc/1/root/etc/passwd"):
        with pytest.raises(REFUSED):
            await box.read_file(path, 1 << 20)
        with pytest.raises(REFUSED):
            await box.write_file(path, b"x")
    await sh(box, "echo fine > /work/plain")
    assert await box.read_file("/work/plain", 10) == b"fine\n"


async def test_d2_nothing_is_copied_in_to_elsewhere(box, common):
    secret = common / "secret"
    secret.write_text(_SECRET)
    for name, path in (await planted(box, secret)).items():
        async with asyncio.timeout(5):
            try:
                await box.write_file(path, b"planted")
            except REFUSED:
                continue
        assert "/proc" not in path, name
        assert await box.read_file(path, 100) == b"planted", name  # in the sandbox's own root
        assert (await sh(box, f"cat {secret}")).stdout.text == "planted", name
    assert (secret.read_text(), os.listdir(common)) == (_SECRET, ["secret"])


async def test_d2_who_writes_from_outside_follows_the_link(box, common):
    secret = common / "secret"
    secret.write_text(_SECRET)
    await planted(box, secret)
    (Path(box.upper_path) / "work/out/absolute").write_text("planted")
    assert secret.read_text() == "planted"


async def test_d2_replacing_a_mount_point_with_a_link_reaches_nothing(runtime, box, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "f").write_text("x")
    await sh(box, "rmdir /opt; ln -s /etc /opt; rm -rf /tmp /proc 2>/dev/null; ls -d /opt")
    layer = await box.freeze()
    with pytest.raises(Exception, match="set-up failed at mount /opt/tool"):
        await runtime.create([layer], limits=SMALL, mounts=[Mount(tmp_path / "m", "/opt/tool")])
    plain = await runtime.create([layer], limits=SMALL)
    assert (await sh(plain, "readlink /opt; ls /proc/self/status")).ok


async def test_d3_deep_and_odd_names_can_be_made_and_removed(box, runtime):
    await sh(
        box,
        "cd /work; mkdir -m 0 locked; touch \"$(printf 'a\\nb')\";"
        " for i in $(seq 600); do mkdir dddddddddd; cd dddddddddd; done",
    )
    layer = await box.freeze()
    await box.delete()
    await runtime.drop_layer(layer)


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _member(name: str, content: bytes = b"x", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


_LINK = {"type": tarfile.SYMTYPE, "linkname": ".."}
_DEEP = "/".join(["d" * 15] * 300)
HOSTILE = {
    "leads out": (_tar(_member("../landed")), "landed"),
    "below a link": (_tar(_member("l", b"", **_LINK), _member("l/landed")), "landed"),
    "twice": (_tar(_member("a"), _member("a", b"second")), "top/a"),
    "pipe": (_tar(_member("p", b"", type=tarfile.FIFOTYPE)), "top/p"),
    "link to a file": (
        _tar(_member("h", b"", type=tarfile.LNKTYPE, linkname="../secret")),
        "top/h",
    ),
    "bomb": (_tar(_member("b", bytes(16 << 20))), "top/b"),
}


_TRUSTING = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}


def _unpack(data: bytes, top: Path) -> None:
    with TreeReader(top, None, Quota(1 << 20)) as reader:
        stream = TarStream(io.BytesIO(data), Quota(64 << 20))
        for member in stream.members():
            reader.add(member, member.name, stream.content(member.size))


@pytest.mark.parametrize("name", HOSTILE)
async def test_d3_hostile_archives_are_refused_and_naive_unpacking_is_not(common, name):
    data, landed = HOSTILE[name]
    (common / "secret").write_text(_SECRET)
    (common / "top").mkdir()
    assert len(gzip.compress(data)) < 64 << 10
    with pytest.raises((InvalidArgument, ResourceExhausted)):
        _unpack(data, common / "top")
    assert sorted(os.listdir(common)) == ["secret", "top"]
    for left in (common / "top").iterdir():
        left.unlink()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(common / "top", **_TRUSTING)
    assert os.path.lexists(common / landed)


async def test_d3_a_path_longer_than_any_is_refused_and_odd_names_are_kept(common):
    (common / "top").mkdir()
    folders = [
        _member("/".join(["d" * 15] * depth), b"", type=tarfile.DIRTYPE, mode=0o755)
        for depth in range(1, 301)
    ]
    with pytest.raises(InvalidArgument, match=r"too long|cannot be made"):
        _unpack(_tar(*folders, _member(f"{_DEEP}/f")), common / "top")
    (common / "odd").mkdir()
    _unpack(_tar(_member("line\nbreak", b"1"), _member("\udcff", b"2")), common / "odd")
    assert {p.name: p.read_bytes() for p in (common / "odd").iterdir()} == {
        "line\nbreak": b"1",
        "\udcff": b"2",
    }
