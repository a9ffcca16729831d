"""Images as states over gRPC: every kind of archive, what holds inside, sharing, and back again."""

import asyncio
import io
import json
import logging
import os
import shutil
import statistics
import subprocess
import tarfile
import time
from pathlib import Path

import grpc
import pytest

from regreen.client.channel import connect
from regreen.client.image import ImageClient, directory_chunks
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from regreen.sandbox import v1 as pb
from sandbox_svc.backends.base import Limits
from sandbox_svc.images.store import Images, layer_id
from sandbox_svc.states import StateStore
from tests.contract.runtimes import started
from tests.integration.sandbox import images as made
from tests.integration.sandbox.overlay import prepared

log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def shell() -> bytes:
    return made.system()


@pytest.fixture
async def image(service):
    """Client of the image service."""
    _, _, server = service
    channel = connect(server.address)
    yield ImageClient(channel, patience_s=0.0)
    await channel.close()


async def sh(sandboxes, state_id: str, script: str) -> str:
    """Output of a script in a fresh fork of a state."""
    box = await sandboxes.create_sandbox(state_id)
    try:
        done = await sandboxes.run(box.id, ["sh", "-c", script])
        assert done.exit_code == 0, done.stderr.head
        return done.stdout.head.decode()
    finally:
        await sandboxes.delete_sandbox(box.id)


def layers_of(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "home/sandbox/layers"))


def drafts_of(tmp_path: Path) -> list[str]:
    names = os.listdir(tmp_path / "home/sandbox/trash")
    return [name for name in names if name.startswith("draft-")]


async def test_an_image_runs_with_its_own_programs_alone(service, image, shell):
    states, sandboxes, _ = service
    words = made.files(app__hello=b"hi\n")
    archive = made.oci(
        shell,
        words,
        packed=[made.gzipped(shell), made.zstd(words)],
        Env=["GREETING=hello", "PATH=/bin"],
        WorkingDir="/app",
        User="app",
        Cmd=["sh", "-c", "cat hello"],
    )
    found = await image.import_image(made.pieces(archive), labels={"kind": "test"})
    assert found.state.base.startswith("image:sha256:")
    assert found.state.host == f"linux/{made.MACHINE}"
    assert dict(found.state.labels) == {
        "kind": "test",
        "image.user": "app",
        "image.cmd": '["sh", "-c", "cat hello"]',
    }
    assert list(found.state.layers) == [layer_id(made.sha256(one)) for one in (shell, words)]
    box = await sandboxes.create_sandbox(found.state.id)
    done = await sandboxes.run(box.id, ["sh", "-c", "echo $GREETING $PATH; ls; cat hello; ls /usr"])
    assert done.stdout.head == b"hello /bin\nhello\nhi\n"
    assert b"/usr" in done.stderr.head  # the host has one, the image has none
    assert (await sandboxes.run(box.id, ["/usr/bin/env"])).exit_code == 127
    listed = await sandboxes.run(box.id, ["ls", "/"])
    assert set(listed.stdout.head.decode().split()) <= {
        *("app", "bin", "dev", "etc", "lib", "lib64", "proc", "tmp", "work")
    }
    plain = await prepared(states, a="1")
    assert plain.base == "host"
    assert (await sh(sandboxes, plain.id, "ls -d /usr")) == "/usr\n"  # which the host's states see


async def test_fork_snapshot_restore_and_diff_keep_the_base(service, image, shell):
    _, sandboxes, _ = service
    state = (await image.import_image([made.oci(shell, WorkingDir="/bin")])).state
    box = await sandboxes.create_sandbox(state.id)
    await sandboxes.run(box.id, ["sh", "-c", "echo one > new; rm ls"])
    changes = {c.path: c.kind for c in (await sandboxes.diff(box.id)).changes}
    assert set(changes) == {"new", "ls"}
    child = await sandboxes.snapshot_sandbox(box.id)
    assert (child.base, child.host, child.parent_id) == (state.base, state.host, state.id)
    forked = await sandboxes.fork_sandbox(box.id, 2)
    for fork in forked.sandboxes:
        done = await sandboxes.run(fork.id, ["sh", "-c", "cat new; ls"])
        assert (done.stdout.head, done.exit_code) == (b"one\n", 127)
    await sandboxes.restore_sandbox(box.id, state.id)
    assert (await sandboxes.run(box.id, ["ls", "new"])).exit_code == 2
    with pytest.raises(FailedPrecondition, match="find"):
        await sandboxes.list_files(box.id)
    with pytest.raises(FailedPrecondition):
        await sandboxes.validate(state.id)


async def test_whiteouts_hide_what_is_below_and_only_that(service, image, shell):
    _, sandboxes, _ = service
    below = made.files(a=b"1", d__x=b"2", d__y=b"3", e__x=b"4", f__x=b"5", g__h__x=b"6")
    above = made.tar(
        made.entry(".wh.a"),
        made.entry("d/.wh.x"),
        made.entry("e/new", b"7"),
        made.entry("e/.wh..wh..opq"),
        made.entry("e/.wh.x"),
        made.entry("f/y", b"8"),
        made.entry(".wh.f"),
        made.entry(".wh.g"),
        made.entry("g/h/z", b"9"),
        made.entry("g/.wh..wh.plnk"),
    )
    found = await image.import_image([made.docker_save(shell, below, above, below, above)])
    assert len(found.state.layers) == 3  # one that repeats counts once, at its last place
    listed = await sh(sandboxes, found.state.id, "for i in a d e f g/h; do echo $i: $(ls $i); done")
    expected = "a:\nd: y\ne: new\nf: y\ng/h: z\n"
    assert listed == expected
    again = await sh(sandboxes, found.state.id, "rm -r d e g; ls -d d e g 2>/dev/null || echo gone")
    assert again == "gone\n"


async def test_a_layer_that_hides_everything_is_the_lowest(service, image, shell):
    _, sandboxes, _ = service
    top = made.tar(made.entry(".wh..wh..opq"), *made.programs("sh", "ls"))
    found = await image.import_image([made.oci(made.files(old=b"1"), shell, top)])
    assert len(found.state.layers) == 1
    assert "old" not in await sh(sandboxes, found.state.id, "ls /")


async def test_what_does_not_hold_in_a_sandbox_is_told(service, image, shell, tmp_path):
    _, sandboxes, _ = service
    odd = made.tar(
        made.entry("su", b"x", mode=0o4755),
        made.entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        made.entry("hider", type=tarfile.CHRTYPE),
        made.entry("pipe", type=tarfile.FIFOTYPE),
        made.entry("theirs", b"x", uid=33, mode=0o600),
        made.entry(
            "ping",
            b"x",
            pax_headers={
                "SCHILY.xattr.security.capability": "\x01",
                "SCHILY.xattr.user.kept": "yes\udcff",
                "SCHILY.xattr.user.overlay.opaque": "y",
            },
        ),
        made.folder("sticky", 0o1777),
        made.folder("closed", 0o555),
        made.entry("closed/in", b"z"),
        made.hard_link("twin", "theirs"),
        made.symlink("way", "/nowhere/at/all"),
        made.entry("./again//and", b"1"),
        made.entry("/again/and", b"22"),
    )
    found = await image.import_image([made.oci(shell, odd)])
    kinds = [note.split()[:2] for note in found.notes]
    assert kinds == [["1", "set-id"], ["3", "devices"], ["2", "extended"], ["1", "entries"]]
    script = "ls -l su theirs twin way; ls -ld sticky closed; cat closed/in again/and; ls"
    listed = await sh(sandboxes, found.state.id, script)
    for part in ("-rwxr-xr-x 1", "-rw------- 2", "-> /nowhere", "drwxrwxrwt", "dr-xr-xr-x", "z22"):
        assert part in listed
    assert "hider" not in listed
    assert "null" not in listed
    top = tmp_path / "home/sandbox/layers" / found.state.layers[1]
    assert os.getxattr(top / "ping", "user.kept") == b"yes\xff"
    assert os.listxattr(top / "ping") == ["user.kept"]
    assert (top / "su").stat().st_mtime == 1_700_000_000
    other = await image.import_image([made.oci(odd, shell)])
    assert sorted(other.notes) == sorted(found.notes)  # also where the layers were here already


async def test_images_share_layers_and_drop_them_with_the_last(service, image, shell, tmp_path):
    states, sandboxes, _ = service
    first = (await image.import_image([made.oci(shell, made.files(a=b"1"))])).state
    count = len(layers_of(tmp_path))
    second = (await image.import_image([made.docker_save(shell, made.files(b=b"2"))])).state
    assert len(layers_of(tmp_path)) == count + 1
    again = (await image.import_image([made.oci(shell, made.files(a=b"1"))])).state
    assert (again.id, again.create_time) == (first.id, first.create_time)
    await states.delete_state(first.id)
    assert len(layers_of(tmp_path)) == count
    assert await sh(sandboxes, second.id, "cat /b") == "2"
    await states.delete_state(second.id)
    assert layers_of(tmp_path) == []
    assert drafts_of(tmp_path) == []


async def test_the_same_image_many_times_at_once(service, image, shell, tmp_path):
    states, sandboxes, _ = service
    archive = made.oci(shell, made.files(a=b"1"))

    async def come_and_go() -> str:
        state = (await image.import_image(made.pieces(archive))).state
        await states.delete_state(state.id)
        return state.id

    found = await asyncio.gather(*(come_and_go() for _ in range(12)))
    assert len(set(found)) == 1
    assert layers_of(tmp_path) == drafts_of(tmp_path) == []
    found = await asyncio.gather(*(image.import_image([archive]) for _ in range(6)))
    assert {tuple(one.state.layers) for one in found} == {tuple(found[0].state.layers)}
    assert len(layers_of(tmp_path)) == 2
    assert await sh(sandboxes, found[0].state.id, "cat /a") == "1"


async def test_the_image_of_this_machine_is_chosen(service, image, shell):
    _, sandboxes, _ = service
    both = made.layout()
    there = both.add([made.files(a=b"other")], machine=made.OTHER)
    here = both.add([shell, made.files(a=b"this")])
    statement = both.add([made.files(a=b"none")], machine="unknown")
    absent = {**there, "digest": f"sha256:{'0' * 64}"}
    index = {"schemaVersion": 2, "manifests": [there, here, statement, absent]}
    document = json.dumps(index).encode()
    nested = both.blob(document, "application/vnd.oci.image.index.v1+json")
    both.manifests = [nested]
    for archive in (both.tar(), made.gzipped(both.tar()), made.zstd(both.tar())):
        state = (await image.import_image([archive])).state
        assert await sh(sandboxes, state.id, "cat /a") == "this"
    both.manifests = [there]
    with pytest.raises(InvalidArgument, match=rf"linux/{made.OTHER}.*linux/{made.MACHINE}"):
        await image.import_image([both.tar()])
    alien = made.docker_save(made.files(a=b"other"), machine=made.OTHER)
    with pytest.raises(InvalidArgument, match=rf"linux/{made.OTHER}.*linux/{made.MACHINE}"):
        await image.import_image([alien])


async def test_one_of_several_images_is_chosen_by_name(service, image, shell):
    _, sandboxes, _ = service
    many = made.layout()
    for name in ("one:1", "docker.io/library/two:latest"):
        many.add([shell, made.files(a=name.encode())], name=name)
    many.manifests.append(
        {**many.manifests[0], "annotations": {"org.opencontainers.image.ref.name": "uno"}}
    )
    for reference, content in (("one:1", "one:1"), ("uno", "one:1"), ("two", "docker.io/")):
        state = (await image.import_image([many.tar()], reference=reference)).state
        assert (await sh(sandboxes, state.id, "cat /a")).startswith(content)
    with pytest.raises(InvalidArgument, match=r"several.*one:1"):
        await image.import_image([many.tar()])
    with pytest.raises(InvalidArgument, match=r"three.*not there.*one:1"):
        await image.import_image([many.tar()], reference="three")
    with pytest.raises(InvalidArgument, match=r"not there.*work:latest"):
        await image.import_image([made.docker_save(shell)], reference="work:2")


async def test_a_directory_is_an_image_of_one_layer(service, image, shell, tmp_path):
    _, sandboxes, _ = service
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(fileobj=io.BytesIO(shell)) as archive:
        archive.extractall(root, filter="tar")
    (root / "manifest.json").write_text('{"of": "something else"}')
    (root / "etc/note").write_text("hello\n")
    os.link(root / "etc/note", root / "etc/other")
    os.mkfifo(root / "pipe")
    with (root / "holes").open("wb") as target:
        target.truncate(3_000_000)
    for kind in (pb.IMAGE_FORMAT_UNSPECIFIED, pb.IMAGE_FORMAT_ROOT):
        found = await image.import_image(directory_chunks(root), format=kind)
        listed = await sh(sandboxes, found.state.id, "cat /etc/other; ls -l /etc/note; ls /")
        assert listed.startswith("hello\n-rw-r--r-- 2")
        assert "pipe" not in listed
    unpacked = tmp_path / "layout"
    with tarfile.open(fileobj=io.BytesIO(made.oci(shell))) as archive:
        archive.extractall(unpacked, filter="tar")
    state = (await image.import_image(directory_chunks(unpacked))).state
    assert state.layers == [layer_id(made.sha256(shell))]


async def test_sparse_files_keep_their_holes(service, image, shell, tmp_path):
    _, sandboxes, _ = service
    source = tmp_path / "holes"
    with source.open("wb") as target:
        target.write(b"begin")
        target.seek(50_000_000)
        target.write(b"end")
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "-S", "-cf", "-", "-C", str(tmp_path), "holes"]
        layer = (
            await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
        ).stdout
        assert len(layer) < 1_000_000
        state = (await image.import_image([made.oci(shell, layer)])).state
        kept = tmp_path / "home/sandbox/layers" / state.layers[1] / "holes"
        assert kept.read_bytes() == source.read_bytes()
        assert kept.stat().st_blocks * 512 < 1_000_000
        assert (await sh(sandboxes, state.id, "ls -l /holes")).split()[4] == "50000003"


async def test_an_export_over_the_bound_is_refused_before_its_holes_are_read(service, image, shell):
    """A terabyte of nothing costs a block here, and would cost a terabyte on the wire."""
    _, sandboxes, _ = service
    grower = made.tar(*made.programs("truncate"))
    state = (await image.import_image([made.oci(shell, grower)])).state
    box = await sandboxes.create_sandbox(state.id, limits=pb.Limits(disk_bytes=4 << 40))
    grown = await sandboxes.run(box.id, ["sh", "-c", "truncate -s 1T /holes"])
    assert grown.exit_code == 0, grown.stderr.head
    child = await sandboxes.snapshot_sandbox(box.id)
    await sandboxes.delete_sandbox(box.id)
    async with asyncio.timeout(20):
        with pytest.raises(FailedPrecondition, match="larger than this service takes"):
            async for _ in image.export_image(child.id):
                pass
    assert await sh(sandboxes, state.id, "ls /holes 2>/dev/null || echo none") == "none\n"


async def test_an_exported_state_comes_back_equal(service, image, shell, tmp_path):
    states, sandboxes, _ = service
    words = made.tar(
        made.folder("d", 0o700),
        made.entry("d/x", b"1"),
        made.entry("e/x", b"2"),
        made.entry("y", b"3", pax_headers={"SCHILY.xattr.user.k": "v"}),
        made.hard_link("z", "y"),
        made.symlink("l", "d/x"),
        made.entry("wide \udcff\n\u00fc", b"4"),
    )
    state = (await image.import_image([made.oci(shell, words, Env=["A=b"], WorkingDir="/d")])).state
    box = await sandboxes.create_sandbox(state.id)
    script = "rm x; rm -r /e; mkdir /e; echo 5 > /e/new; ln -s new /e/l; rm /bin/ln"
    assert (await sandboxes.run(box.id, ["sh", "-c", script])).exit_code == 0
    child = await sandboxes.snapshot_sandbox(box.id)
    await sandboxes.delete_sandbox(box.id)
    archive = b"".join([c async for c in image.export_image(child.id, reference="work:1")])
    assert archive == b"".join([c async for c in image.export_image(child.id, reference="work:1")])
    made.check_layout(archive, "work:1")
    back = (await image.import_image(made.pieces(archive), reference="work:1")).state
    layers = tmp_path / "home/sandbox/layers"
    for old, new in zip(child.layers, back.layers, strict=True):
        assert made.tree(layers / old) == made.tree(layers / new)
    for form in (pb.IMAGE_FORMAT_DOCKER, pb.IMAGE_FORMAT_OCI):
        assert (await image.import_image([archive], format=form)).state.id == back.id
    script = "echo $A; ls /d; ls /e; cat /e/l; ls -d /bin/ln 2>/dev/null || echo gone"
    assert await sh(sandboxes, back.id, script) == "b\nl\nnew\n5\ngone\n"
    moved = b"".join([chunk async for chunk in states.export_state(back.id)])
    await states.delete_state(back.id)
    arrived = await states.import_state([moved])  # the service's own archives know the base too
    assert (arrived.id, arrived.base, arrived.host) == (back.id, back.base, back.host)
    assert (await sh(sandboxes, arrived.id, "echo $A")) == "b\n"


async def test_states_of_the_host_and_odd_requests_are_refused(service, image):
    states, _, server = service
    state = await prepared(states, a="1")
    with pytest.raises(FailedPrecondition, match="ExportState"):
        [chunk async for chunk in image.export_image(state.id)]
    with pytest.raises(NotFound):
        [chunk async for chunk in image.export_image("st_" + "0" * 32)]
    async with connect(server.address) as channel:
        stub = pb.ImageServiceStub(channel)
        options = pb.ImportImageRequest(options=pb.ImageOptions())
        chunk = pb.ImportImageRequest(chunk=b"x")
        for requests, field in (([chunk], "options"), ([], "options"), ([options] * 2, "chunk")):
            with pytest.raises(grpc.aio.AioRpcError, match=field) as refused:
                await stub.ImportImage(iter(requests))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_backend_without_layers_says_so(tmp_path):
    async with started("docker", tmp_path) as runtime:
        states = StateStore(tmp_path, runtime)
        images = Images(states, runtime)
        with pytest.raises(FailedPrecondition, match="embedded backend"):
            await images.import_(aiter_of(b"x"))
        with pytest.raises(FailedPrecondition, match="embedded backend"):
            await runtime.create([], limits=Limits(), base="image:sha256:" + "0" * 64)
        await images.close()


async def aiter_of(*chunks: bytes):
    for chunk in chunks:
        yield chunk


async def test_a_fork_of_an_image_is_as_quick_as_any(service, image, shell):
    states, sandboxes, _ = service
    many = made.tar(*(made.entry(f"f/{n // 100}/{n}", b"x" * 100) for n in range(5000)))
    found = (await image.import_image([made.oci(shell, many)])).state
    plain = await prepared(states, a="1")

    async def median_ms(state_id: str, command: str) -> float:
        taken = []
        for _ in range(15):
            began = time.perf_counter()
            box = await sandboxes.create_sandbox(state_id)
            assert (await sandboxes.run(box.id, [command, "-c", ":"])).exit_code == 0
            taken.append(time.perf_counter() - began)
            await sandboxes.delete_sandbox(box.id)
        return statistics.median(taken) * 1000

    ours, hosts = await median_ms(found.id, "/bin/sh"), await median_ms(plain.id, "/bin/sh")
    log.info("fork and `sh -c :`, image of 5000 files: %.1f ms, host state: %.1f ms", ours, hosts)
    print(f"fork and `sh -c :`: image of 5000 files {ours:.1f} ms, host state {hosts:.1f} ms")


def engine() -> str:
    """Why no engine can be asked; empty where one answers."""
    if not shutil.which("docker"):
        return "no docker client on this host"
    asked = subprocess.run(["docker", "version"], capture_output=True, timeout=60, check=False)
    return "" if asked.returncode == 0 else "no engine answers"


async def test_an_engine_loads_what_was_exported(service, image, shell, tmp_path):
    if problem := await asyncio.to_thread(engine):
        pytest.skip(problem)
    _, sandboxes, _ = service
    name = f"regreen-test-image-{os.getpid()}:1"
    state = (await image.import_image([made.oci(shell, made.files(a=b"1", b=b"2"))])).state
    box = await sandboxes.create_sandbox(state.id)
    await sandboxes.run(box.id, ["sh", "-c", "rm /a; echo 3 > /c"])
    child = await sandboxes.snapshot_sandbox(box.id)
    file = tmp_path / "image.tar"
    with file.open("wb") as target:
        async for chunk in image.export_image(child.id, reference=name):
            target.write(chunk)

    async def docker(*words: str) -> str:
        run = subprocess.run
        done = await asyncio.to_thread(
            run, ["docker", *words], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        assert name in await docker("load", "-i", str(file))
        said = await docker(
            "run", "--rm", "--network=none", name, "/bin/sh", "-c", "ls /a /b /c 2>&1; cat /c"
        )
        assert "/b\n/c\n3\n" in said
        assert "cannot access" in said
        saved = tmp_path / "saved.tar"
        await docker("save", "-o", str(saved), name)
        back = (await image.import_image(made.pieces(saved.read_bytes()), reference=name)).state
        assert list(back.labels) == ["image.reference"]
        assert await sh(sandboxes, back.id, "ls /b /c; cat /c") == "/b\n/c\n3\n"
    finally:
        await docker("rmi", "-f", name)
