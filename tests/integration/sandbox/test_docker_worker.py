"""The sandbox service inside one unprivileged container of a Docker engine."""

import asyncio
import hashlib
import io
import json
import os
import platform
import re
import sys
import tarfile
import time
import uuid
from pathlib import Path

import docker.client
import pytest
import pytest_asyncio
from docker.errors import DockerException

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common import v1 as common_pb
from regreen.rpc.errors import InvalidArgument, MissingDependency, NotFound
from regreen.sandbox import v1 as pb
from sandbox_svc.worker.docker import DockerWorker, WorkerOptions

IMAGE = os.environ.get("REGREEN_TEST_WORKER_IMAGE", "regreen-sandbox")
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
_PACKAGES = ("regreen", "sandbox_svc")
_ROOT = Path(__file__).parents[3]
_ABSENT = {"cpu", "memfd", "inotify", "own_devices", "own_programs"}
"""What a container without control groups of its own cannot enforce inside; and the engine mounts
its init below /usr, so that there is no overlay of that."""


@pytest.fixture(scope="module")
def engine():
    try:
        api = docker.client.DockerClient.from_env(timeout=60).api
        images = api.images(name=IMAGE)
    except DockerException as error:
        pytest.skip(f"docker: no engine answers ({type(error).__name__})")
    if not images:
        pytest.skip(f"docker: no image {IMAGE}; build infra/docker/sandbox.Dockerfile")
    yield api
    api.close()


@pytest.fixture(scope="module")
def image(engine, tmp_path_factory):
    """The image with the code of this tree in it; removed at the end."""
    context = io.BytesIO()
    lines = [f"FROM {IMAGE}", *(f"COPY {name} /opt/regreen/lib/{name}" for name in _PACKAGES)]
    with tarfile.open(fileobj=context, mode="w") as archive:
        dockerfile = tarfile.TarInfo("Dockerfile")
        dockerfile.size = len("\n".join(lines))
        archive.addfile(dockerfile, io.BytesIO("\n".join(lines).encode()))
        for name in _PACKAGES:
            archive.add(_ROOT / name, name, filter=lambda m: None if "__pycache__" in m.name else m)
    context.seek(0)
    tag = f"regreen-test-{uuid.uuid4().hex[:12]}"
    built = engine.build(fileobj=context, custom_context=True, tag=tag, rm=True, decode=True)
    said = list(built)
    assert not any("error" in line for line in said), said[-1]
    yield tag
    engine.remove_image(tag, force=True)


@pytest.fixture(scope="module")
def options(image, tmp_path_factory):
    home = tmp_path_factory.mktemp("worker")
    for path in (home, *home.parents[:2]):
        path.chmod(0o711)
    return WorkerOptions(image, home, memory_bytes=2 << 30, arguments=("--warm-seats=1",))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(options):
    async with DockerWorker(options) as worker:
        yield worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clients(worker):
    channel = connect(worker.address)
    yield StateClient(channel, patience_s=0.0), SandboxClient(channel, patience_s=0.0)
    await channel.close()


async def prepared(states: StateClient, text: str = "hello\n") -> pb.State:
    change = common_pb.FileChange(
        path="notes.txt", kind=common_pb.CHANGE_KIND_ADD, content=text.encode()
    )
    spec = pb.EnvironmentSpec(builder="system", overlay=[change])
    return [event async for event in states.prepare_state(spec)][-1].state


async def test_the_container_has_no_privilege(engine, worker):
    found = engine.inspect_container(worker._container)
    host, config = found["HostConfig"], found["Config"]
    assert not host["Privileged"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["ReadonlyRootfs"]
    assert host["NetworkMode"] == "none"
    assert "no-new-privileges" in host["SecurityOpt"]
    assert config["User"].partition(":")[0] != "0"
    assert {mount["Destination"] for mount in found["Mounts"]} == {
        "/home/regreen/data",
        "/run/regreen",
    }
    script = (
        "grep -E 'CapEff|CapBnd' /proc/self/status; test -w /proc/sys/kernel/core_pattern && "
        "echo WRITABLE; test -w /proc/sysrq-trigger && echo WRITABLE; echo looked"
    )
    asked = engine.exec_create(worker._container, ["sh", "-c", script])
    said = engine.exec_start(asked["Id"]).decode()
    assert said.count("0000000000000000") == 2
    assert "looked" in said
    assert "WRITABLE" not in said


_CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for number in (321, 425, 250, 298, 304, 310, 435):
    ctypes.set_errno(0)
    result = libc.syscall(number, *[ctypes.c_long(-1)] * 5)
    print(number, errno.errorcode.get(ctypes.get_errno(), result))
"""
"""bpf, io_uring_setup, keyctl, perf_event_open, open_by_handle_at, process_vm_readv, clone3."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of another machine")
async def test_the_filter_refuses_what_the_service_never_needs(engine, worker):
    asked = engine.exec_create(worker._container, ["python3", "-c", _CALLS])
    said = dict(line.split() for line in engine.exec_start(asked["Id"]).decode().splitlines())
    assert said.pop("435") == "ENOSYS"
    assert set(said.values()) == {"EPERM"}
    asked = engine.exec_create(worker._container, ["unshare", "--user", "--mount", "true"])
    engine.exec_start(asked["Id"])
    assert engine.exec_inspect(asked["Id"])["ExitCode"] == 0


async def test_what_is_enforced_inside_is_told(clients):
    answer = await clients[1].get_capabilities()
    told = {capability.name: capability.proven for capability in answer.capabilities}
    assert answer.runtime == "embedded"
    assert {name for name, proven in told.items() if not proven} <= _ABSENT
    assert {"memory", "pids", "disk", "inodes", "output", "wall_time", "no_network"} <= set(told)


async def test_a_rollouts_life_inside_the_container(clients):
    states, sandboxes = clients
    state = await prepared(states)
    box = await sandboxes.create_sandbox(state.id)
    ran = await sandboxes.run(
        box.id, ["sh", "-c", "cat; echo $A; pwd; echo e >&2; exit 3"], stdin=b"in\n",
        environment={"A": "b"},
    )  # fmt: skip
    assert (ran.exit_code, ran.stdout.head, ran.stderr.head) == (3, b"in\nb\n/work/repo\n", b"e\n")
    await sandboxes.write_file(box.id, "/work/repo/made.txt", b"made")
    snapshot = await sandboxes.snapshot_sandbox(box.id)
    forked = await sandboxes.fork_sandbox(box.id, 3)
    for fork in forked.sandboxes:
        assert (await sandboxes.read_file(fork.id, "/work/repo/made.txt")).content == b"made"
    await sandboxes.run(forked.sandboxes[0].id, ["rm", "made.txt"])
    assert (await sandboxes.read_file(box.id, "/work/repo/made.txt")).content == b"made"
    await sandboxes.restore_sandbox(box.id, state.id)
    with pytest.raises(NotFound):
        await sandboxes.read_file(box.id, "/work/repo/made.txt")
    await sandboxes.restore_sandbox(box.id, snapshot.id)
    assert [c.path for c in (await sandboxes.diff(box.id, base_state_id=state.id)).changes] == [
        "made.txt"
    ]
    for sandbox in (box, *forked.sandboxes):
        await sandboxes.delete_sandbox(sandbox.id)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 60", pb.END_REASON_TIMEOUT),
        ("yes", pb.END_REASON_OUTPUT),
        ("while :; do head -c 9000000 /dev/zero >> big$((i=i+1)); done", pb.END_REASON_DISK),
        ("kill -9 $$", pb.END_REASON_SIGNAL),
    ],
)
async def test_limits_end_commands(clients, script, reason):
    states, sandboxes = clients
    state = await prepared(states)
    limits = pb.Limits(disk_bytes=48 << 20, output_bytes=4 << 20)
    box = await sandboxes.create_sandbox(state.id, limits=limits)
    ended = await sandboxes.run(box.id, ["sh", "-c", script], timeout_s=3.0)
    assert ended.reason == reason
    await sandboxes.delete_sandbox(box.id)


async def test_processes_are_bounded_and_nothing_is_reachable(clients):
    states, sandboxes = clients
    state = await prepared(states)
    box = await sandboxes.create_sandbox(state.id, limits=pb.Limits(pids=24))
    forks = await sandboxes.run(
        box.id, ["sh", "-c", "for i in $(seq 60); do sleep 9 & done; echo all"]
    )
    assert b"all" not in forks.stdout.head
    wide = await sandboxes.create_sandbox(state.id, limits=pb.Limits(pids=200))
    forks = await sandboxes.run(
        wide.id, ["sh", "-c", "for i in $(seq 60); do sleep 9 & done; echo all"]
    )
    assert forks.stdout.head == b"all\n"
    lines = await sandboxes.run(wide.id, ["grep", "-c", ":", "/proc/net/dev"])
    assert lines.stdout.head == b"1\n"
    for path in ("/run/regreen/sandbox.sock", "/home/regreen/data", "/var/run/docker.sock"):
        assert (await sandboxes.run(wide.id, ["test", "-e", path])).exit_code == 1
    for sandbox in (box, wide):
        await sandboxes.delete_sandbox(sandbox.id)


async def test_states_outlive_the_container_and_leftovers_are_removed(engine, image, tmp_path):
    own = WorkerOptions(image, tmp_path / "w", arguments=("--warm-seats=0",))
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o711)
    left = DockerWorker(own)
    await left.__aenter__()  # and never left, as when the supervisor is killed
    channel = connect(left.address)
    state = await prepared(StateClient(channel), "kept\n")
    await channel.close()
    async with DockerWorker(own) as again:
        labels = {"label": f"regreen.worker={again._name}"}
        assert [c["Id"] for c in engine.containers(all=True, filters=labels)] == [again._container]
        channel = connect(again.address)
        box = await SandboxClient(channel).create_sandbox(state.id)
        ran = await SandboxClient(channel).run(box.id, ["cat", "notes.txt"])
        assert ran.stdout.head == b"kept\n"
        await channel.close()
    assert not engine.containers(all=True, filters=labels)


async def test_without_its_syscall_filter_it_says_what_is_missing(options, tmp_path):
    profile = json.loads(options.seccomp.read_text())
    names = profile["syscalls"][0]["names"]
    profile["syscalls"][0]["names"] = [name for name in names if name != "mount"]
    narrow = tmp_path / "narrow.json"
    narrow.write_text(json.dumps(profile))
    began = time.monotonic()
    with pytest.raises(MissingDependency, match="sandboxes do not work here"):
        async with DockerWorker(WorkerOptions(options.image, tmp_path / "n", seccomp=narrow)):
            pass
    assert time.monotonic() - began < 60
    with pytest.raises(MissingDependency, match="cannot be read"):
        async with DockerWorker(
            WorkerOptions(options.image, tmp_path / "n", seccomp=tmp_path / "no")
        ):
            pass


async def test_the_command_says_where_it_serves_and_ends_with_its_container(
    engine, image, tmp_path
):
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o711)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sandbox_svc.worker", "--docker", image, "--home", str(tmp_path)),
        *("--listen", "127.0.0.1:0", "--", "--warm-seats=0"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        cwd=tmp_path,
    )
    async with asyncio.timeout(90):
        line = (await process.stdout.readline()).decode()
    found = re.fullmatch(r"serving (127\.0\.0\.1:[1-9]\d*)\n", line)
    assert found, line
    channel = connect(found[1])
    state = await prepared(StateClient(channel))
    box = await SandboxClient(channel).create_sandbox(state.id)
    lines = await SandboxClient(channel).run(box.id, ["grep", "-c", ":", "/proc/net/dev"])
    assert lines.stdout.head == b"1\n"
    await channel.close()
    process.terminate()
    async with asyncio.timeout(60):
        assert await process.wait() == 0
    name = hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:12]
    assert not engine.containers(all=True, filters={"label": f"regreen.worker={name}"})


async def test_other_addresses_and_images_are_refused(engine, tmp_path):
    with pytest.raises(InvalidArgument, match="loopback"):
        DockerWorker(WorkerOptions(IMAGE, tmp_path, listen="0.0.0.0:1"))
    with pytest.raises(MissingDependency, match="no image"):
        async with DockerWorker(WorkerOptions("regreen-no-such-image", tmp_path / "i")):
            pass
