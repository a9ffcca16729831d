"""Archives that mean harm or are broken: refused with a typed error, nothing is left of them."""

import asyncio
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.image import ImageClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import InvalidArgument, RegreenError, ResourceExhausted
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox import images as made

_ROOT = Path(__file__).parents[3]
_LIMIT = 8 << 20


@pytest.fixture
async def small(tmp_path):
    """Clients of a service that takes archives of 8 MiB."""
    settings = SandboxSettings(
        home=tmp_path / "home",
        listen=f"unix:{tmp_path}/s",
        metrics="127.0.0.1:0",
        import_bytes=_LIMIT,
        drain_s=0.2,
    )
    runtime = EmbeddedRuntime(tmp_path / "home" / "sandbox", run_probes=False, warm_seats=0)
    async with serving(settings, SandboxHost(settings, runtime)) as server:
        channel = connect(server.address)
        yield (
            ImageClient(channel, patience_s=0.0),
            SandboxClient(channel, patience_s=0.0),
            StateClient(channel, patience_s=0.0),
        )
        await channel.close()


def left(tmp_path: Path) -> list[str]:
    """Layers, drafts and records below the service's home."""
    home = tmp_path / "home/sandbox"
    found = [path for name in ("layers", "trash", "states") for path in (home / name).iterdir()]
    return [str(path) for path in found if not path.name.startswith(".st_")]  # being rewritten


def _document(**changes: object) -> bytes:
    """A layout whose manifest says something else than it should."""
    layout = made.layout()
    found = layout.add([made.files(a=b"1")])
    digest = found["digest"].removeprefix("sha256:")
    manifest = json.loads(layout.blobs.pop(digest)) | changes
    layout.manifests = [layout.blob(json.dumps(manifest).encode(), found["mediaType"])]
    return layout.tar()


def _index(**changes: object) -> bytes:
    layout = made.layout()
    layout.manifests = [layout.add([made.files(a=b"1")]) | changes]
    return layout.tar()


def _config(document: object) -> bytes:
    layout = made.layout()
    layout.add([made.files(a=b"1")], config=json.dumps(document).encode())
    return layout.tar()


def _lying_blob() -> bytes:
    layout = made.layout()
    layout.add([made.files(a=b"1")])
    name = made.sha256(made.files(a=b"1"))
    layout.blobs[name] = layout.blobs[name].replace(b"1", b"2")
    return layout.tar()


def _self_naming() -> bytes:
    """Indexes that name one index a thousand times, four deep."""
    layout = made.layout()
    entry = layout.add([made.files(a=b"1")])
    for _ in range(4):
        index = {"schemaVersion": 2, "manifests": [entry] * 900}
        entry = layout.blob(json.dumps(index).encode(), "application/vnd.oci.image.index.v1+json")
    layout.manifests = [entry]
    return layout.tar()


def _negative_size() -> bytes:
    member = made.tar(made.entry("a", b"x"))
    header = bytearray(member[:512])
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + member[512:]


def _long_name(size: int) -> bytes:
    """A header that announces a name of `size` bytes."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT) + b"x" * 2048


def _damaged_middle() -> bytes:
    good = made.tar(made.entry("a", b"1"), made.entry("b", b"2"))
    return good[:1024] + b"\x07" * 512 + good[1536:]


SH = made.files(bin__sh=b"#!")
DEEP = "/".join(["d" * 100] * 60)
LAYERS = {
    "leads out": made.files(**{"..__etc__x": b"x"}),
    "leads out in the middle": made.files(**{"a__..__..__x": b"x"}),
    "below a link": made.tar(made.symlink("l", "/etc"), made.entry("l/x", b"x")),
    "below a file": made.tar(made.entry("f", b"x"), made.entry("f/x", b"x")),
    "link to the host": made.tar(made.hard_link("h", "/etc/passwd")),
    "link that leads out": made.tar(made.hard_link("h", "../../../etc/passwd")),
    "link to another layer": made.tar(made.hard_link("h", "bin/sh")),
    "link through a link": made.tar(made.symlink("l", "/etc"), made.hard_link("h", "l/passwd")),
    "link to a directory": made.tar(made.folder("d"), made.hard_link("h", "d")),
    "link to itself": made.tar(made.entry("a"), made.hard_link("a", "a")),
    "link without a target": made.tar(made.symlink("l", "")),
    "file in the place of a directory": made.tar(made.entry("a/b"), made.entry("a", b"x")),
    "directory in the place of a link": made.tar(made.symlink("a", "b"), made.folder("a")),
    "whiteout of nothing": made.tar(made.entry("d/.wh.")),
    "whiteout of the parent": made.tar(made.entry("d/.wh...")),
    "the layer itself as a file": made.tar(made.entry("./", b"x")),
    "deep": made.tar(made.entry(DEEP, b"x")),
    "long part": made.tar(made.entry("p" * 300, b"x")),
    "unknown type": made.tar(made.entry("a", type=b"9")),
    "negative size": _negative_size(),
    "huge name": _long_name(1 << 40),
    "name cut short": _long_name(4096),
    "damaged in the middle": _damaged_middle(),
    "cut short": made.tar(made.entry("a", b"x" * 5000))[:2000],
    "no tar": b"\x01\x02" * 5000,
    "xattr bomb": made.tar(made.entry("a", pax_headers={"SCHILY.xattr.user.a": "x" * (2 << 20)})),
}
ARCHIVES = {
    "empty": b"",
    "no tar": b"not a tar" * 1000,
    "cut short": made.oci(SH)[:3000],
    "cut gzip": made.gzipped(made.oci(SH))[:-20],
    "bad zstd": made.zstd(made.oci(SH))[:40] + b"\xff" * 100,
    "bzip2": b"BZh91AY&SY" + b"x" * 100,
    "no index": made.tar(made.entry("oci-layout", b"{}"), made.entry("index.json", b"[]")),
    "index that is no json": made.tar(
        made.entry("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), made.entry("index.json", b"{")
    ),
    "deep json": made.tar(
        made.entry("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
        made.entry("index.json", b"[" * 100_000),
    ),
    "no images": made.layout().tar(),
    "content that is not its name's": _lying_blob(),
    "size that is not so": _index(size=7),
    "digest that leads out": _index(digest="sha256:../../../../etc/passwd"),
    "digest of another kind": _index(digest="md5:" + "0" * 32),
    "digest that is no text": _index(digest=7),
    "indexes of indexes": _self_naming(),
    "no layers": _document(layers=None),
    "one layer less": _document(layers=[]),
    "layer that is absent": _document(
        layers=[{"digest": "sha256:" + "0" * 64, "size": 1, "urls": ["http://x"]}]
    ),
    "configuration that is a list": _config([]),
    "configuration of other layers": made.oci(SH, config=made.configuration([made.files(b=b"2")])),
    "configuration without layers": _config({"os": "linux", "architecture": made.MACHINE}),
    "half a character": made.oci(SH, Env=["A=\ud800"]),
    "NUL in the environment": made.oci(SH, Env=["A=b\0c"]),
    "environment that is no list": made.oci(SH, Env={"A": "b"}),
    "too many layers": made.oci(*(made.files(a=b"%d" % n) for n in range(100))),
    "docker: other content": made.docker_save(SH).replace(b"#!", b"!#"),
    "docker: link that leads out": made.tar(
        made.symlink("x/layer.tar", "../../../../etc/passwd"),
        made.entry("c.json", made.configuration([SH])),
        made.entry(
            "manifest.json", b'[{"Config": "c.json", "RepoTags": null, "Layers": ["x/layer.tar"]}]'
        ),
    ),
    "docker: links in a circle": made.tar(
        made.symlink("a", "b"),
        made.symlink("b", "a"),
        made.entry("manifest.json", b'[{"Config": "a", "RepoTags": null, "Layers": []}]'),
    ),
}


async def test_hostile_and_damaged_archives_are_refused_and_leave_nothing(small, tmp_path):
    image, _, _ = small
    kept = (await image.import_image([made.oci(SH)])).state
    before = sorted(left(tmp_path))
    wrong = []
    table = {f"layer: {name}": made.oci(SH, layer) for name, layer in LAYERS.items()} | ARCHIVES
    for name, archive in table.items():
        try:
            found = await image.import_image(made.pieces(archive))
            wrong.append(f"{name}: taken, {found.notes}")
        except InvalidArgument:
            pass
        except RegreenError as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        if sorted(left(tmp_path)) != before:
            wrong.append(f"{name}: left {set(left(tmp_path)) - set(before)}")
            before = sorted(left(tmp_path))
    assert wrong == []
    assert len(table) >= 50
    root = made.tar(made.entry("../x", b"x"))
    with pytest.raises(InvalidArgument):
        await image.import_image([root], format=pb.IMAGE_FORMAT_ROOT)
    again = (await image.import_image([made.oci(SH)])).state
    assert again.create_time == kept.create_time


async def test_bombs_are_stopped_at_the_limit(small, tmp_path):
    image, _, _ = small
    big = made.files(zeros=bytes(3 * _LIMIT))
    gnu = tarfile.TarInfo("holes")
    gnu.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(gnu.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"\x80" + struct.pack(">Q", 1 << 50).rjust(11, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    bombs = {
        "plain": made.oci(big),
        "gzip": made.oci(big, packed=[made.gzipped(big)]),
        "zstd": made.oci(big, packed=[made.zstd(big)]),
        "gzip of all": made.gzipped(made.oci(big)),
        "zstd of all": made.zstd(made.oci(big)),
        "many of half": made.oci(
            *(made.files(a=bytes(_LIMIT // 2) + b"%d" % n) for n in range(3)),
            packed=[made.gzipped(made.files(a=bytes(_LIMIT // 2) + b"%d" % n)) for n in range(3)],
        ),
        "sparse": made.oci(bytes(header) + bytes(1024)),
    }
    for name, archive in bombs.items():
        with pytest.raises(ResourceExhausted, match="import_bytes"):
            print(name, await image.import_image(made.pieces(archive)))
        assert left(tmp_path) == [], name
    within = made.files(zeros=bytes(_LIMIT // 2))
    assert (await image.import_image([made.oci(within, packed=[made.gzipped(within)])])).state.id


async def test_an_import_that_is_given_up_leaves_nothing(small, tmp_path):
    image, _, states = small
    never = asyncio.Event()
    archive = made.oci(made.files(a=bytes(1 << 20)))

    async def half():
        yield pb.ImportImageRequest(options=pb.ImageOptions())
        yield pb.ImportImageRequest(chunk=archive[: 1 << 20])
        await never.wait()

    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        call = image._stub.ImportImage(half())
        async with asyncio.timeout(20):
            while not left(tmp_path):
                await states.list_states()
        call.cancel()
        async with asyncio.timeout(20):
            while left(tmp_path):
                await states.list_states()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert (await image.import_image([archive])).state.id


async def test_a_hostile_system_cannot_move_what_is_mounted_over_it(small):
    image, sandboxes, _ = small
    links = made.tar(
        made.symlink("proc", "/work"),
        made.symlink("dev", "proc"),
        made.entry("tmp", b"a file"),
        made.entry(".wh.work"),
        *made.programs("sh", "ls"),
    )
    state = (await image.import_image([made.oci(links, WorkingDir="/")])).state
    assert state.base != "host"
    box = await sandboxes.create_sandbox(state.id)
    script = """
        echo x > /tmp/y; ls -d /proc/self /dev/null /tmp/y
        [ -r /proc/sys/kernel/core_pattern ] || echo absent
        [ -w /proc/sys/kernel/core_pattern ] && echo open
        [ -w /proc/sysrq-trigger ] && echo open
        ls /proc/1/root >/dev/null 2>&1 && echo seen
        exit 0
    """
    done = await sandboxes.run(box.id, ["/bin/sh", "-c", script])
    assert done.stdout.head == b"/dev/null\n/proc/self\n/tmp/y\n"


async def test_a_service_killed_during_imports_leaves_nothing(tmp_path):
    home = tmp_path / "home"
    archives = [made.oci(made.files(a=os.urandom(3 << 20) + b"%d" % n)) for n in range(4)]
    kept = made.oci(made.files(a=b"kept"))
    for round_ in range(2):
        process, address = await _service(tmp_path)
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(connect(address))
            image = ImageClient(channel, patience_s=0.0)
            states = StateClient(channel, patience_s=0.0)
            whole = (await image.import_image([kept])).state.id
            found = await states.list_states()
            answered = {state.id for state in found.states}
            layers = {layer for state in found.states for layer in state.layers}
            assert whole in answered
            assert set(os.listdir(home / "sandbox/layers")) == layers
            assert list((home / "sandbox/trash").iterdir()) == []
            work = [asyncio.create_task(_answer(image, one)) for one in archives]
            async with asyncio.timeout(30):
                while not list((home / "sandbox/trash").glob("draft-*/*")):
                    await states.list_states()
            process.send_signal(signal.SIGKILL)
            promised = {one for one in await asyncio.gather(*work) if one}
        await asyncio.to_thread(process.wait)
        if round_:
            break
        process, address = await _service(tmp_path)
        async with connect(address) as channel:
            found = await StateClient(channel).list_states()
            assert answered | promised <= {state.id for state in found.states}
        process.terminate()
        await asyncio.to_thread(process.wait)


async def _answer(image: ImageClient, archive: bytes) -> str:
    with contextlib.suppress(RegreenError):
        return (await image.import_image(made.pieces(archive, 100_000))).state.id
    return ""


async def _service(tmp_path: Path) -> tuple[subprocess.Popen, str]:
    """A service process over a home."""
    address = f"unix:{tmp_path}/p"
    command = ["-m", "sandbox_svc", "--home", str(tmp_path / "home"), "--listen", address]
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, *command, "--metrics", "127.0.0.1:0", "--warm-seats", "0"],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    async with connect(address) as channel:
        states = StateClient(channel, patience_s=60.0)
        until = time.monotonic() + 60
        while True:
            try:
                await states.list_states()
                break
            except RegreenError:
                assert process.poll() is None
                assert time.monotonic() < until
    return process, address
