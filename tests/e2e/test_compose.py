"""compose.yaml, started: everything is healthy, callers with certificates and tokens are let in,
nobody else is, and no process of the sandbox service reaches the whole /proc that it stands on."""

import json
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.sandbox import v1 as sandbox_pb
from tests.fixtures.compose_stack import Composed, composed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
USER = "10001:10001"
PROC = "/root/proc"
ATTACK = """
import ctypes, errno, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)

def tried(act, *given):
    try:
        act(*given)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def access(path, mode):
    if libc.access(path.encode(), mode):
        raise OSError(ctypes.get_errno(), path)

def bind(path):
    if libc.mount(path.encode(), b"/tmp/bound", None, 0x1000, None):
        raise OSError(ctypes.get_errno(), path)

said = {}
for top in sys.argv[1:]:
    for mode in (os.F_OK, os.R_OK, os.X_OK):
        said[f"access {mode} {top}"] = tried(access, top, mode)
    said[f"list {top}"] = tried(os.listdir, top)
    said[f"enter {top}"] = tried(os.chdir, top)
    for name in ("1/cmdline", "1/environ", "self/status", "uptime"):
        said[f"open {top}/{name}"] = tried(open, f"{top}/{name}")
    if os.path.exists("/tmp/bound"):
        said[f"bind {top}"] = tried(bind, top)
print(json.dumps(said))
"""
STEAL = """
import json, pathlib
found = {}
for place in pathlib.Path("/whole").iterdir():
    if place.name.isdigit():
        try:
            words = (place / "cmdline").read_bytes().split(b"\\0")
            key = (place / "root/etc/regreen/tls/tls.key").read_text()
        except OSError:
            continue
        if b"judge_svc" in words:
            found["judge"] = key.splitlines()[0]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Composed]:
    """The running project."""
    with composed() as found:
        yield found


def test_everything_is_healthy(stack: Composed) -> None:
    """As soon as `compose.sh up` has ended."""
    states = {
        name: stack.api.inspect_container(id)["State"] for name, id in stack.containers().items()
    }
    services = {"dataset", "sandbox", "policy", "judge", "learner"}
    assert set(states) == services | {"access", "postgres", "prometheus"}
    assert {name: state["Health"]["Status"] for name, state in states.items()} == dict.fromkeys(
        states, "healthy"
    )


def test_every_image_lists_what_it_holds(stack: Composed) -> None:
    ask = (
        "import json; from importlib import metadata as m; "
        "bill = json.load(open('/opt/regreen/sbom.json')); "
        "print(json.dumps([[c['name'] for c in bill['components']], "
        "[d.metadata['Name'] for d in m.distributions()]]))"
    )
    for service in ("dataset", "sandbox", "policy", "judge", "learner", "access"):
        code, said = stack.run(service, ["python3", "-c", ask], USER)
        assert code == 0, said
        listed, held = json.loads(said)
        assert {"regreen", *held} <= set(listed)


async def test_who_has_certificates_and_a_token_is_let_in(stack: Composed) -> None:
    async with Stack(stack.endpoints) as clients:
        await clients.tasks.get_task_stats()
        change = common_pb.FileChange(
            path="notes.txt", kind=common_pb.CHANGE_KIND_ADD, content=b"hello\n"
        )
        spec = sandbox_pb.EnvironmentSpec(builder="system", overlay=[change])
        state = [event async for event in clients.state.prepare_state(spec)][-1].state
        box = await clients.sandbox.create_sandbox(state.id)
        ran = await clients.sandbox.run(box.id, ["cat", "notes.txt"])
        assert ran.stdout.head == b"hello\n"
        await clients.sandbox.delete_sandbox(box.id)


async def test_nobody_else_is(stack: Composed) -> None:
    for address in stack.endpoints.addresses.values():
        async with connect(address, Access()) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    certificates = Access.of(str(stack.home / "docker" / "certs" / "client"))
    async with connect(stack.endpoints.dataset, certificates) as channel:
        tasks = dataset_pb.TaskServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await tasks.ListTasks(dataset_pb.ListTasksRequest(), timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_prometheus_sees_every_service_and_loads_the_alerts(stack: Composed) -> None:
    ask = "wget -q -O - http://127.0.0.1:9090/api/v1/%s"
    _, said = stack.run("prometheus", ["sh", "-c", ask % "rules"], "")
    groups = json.loads(said)["data"]["groups"]
    assert "RegreenServiceDown" in {rule["name"] for group in groups for rule in group["rules"]}
    _, said = stack.run("prometheus", ["sh", "-c", ask % "targets"], "")
    labels = [target["labels"] for target in json.loads(said)["data"]["activeTargets"]]
    assert {label["component"] for label in labels} == set(stack.endpoints.addresses)
    assert {label["job"] for label in labels} == {"regreen"}


def attacked(stack: Composed, user: str, *before: str, tops: tuple[str, ...]) -> dict[str, str]:
    """What each attempt to reach /proc below these folders came to."""
    code, said = stack.run("sandbox", [*before, "python3", "-ISc", ATTACK, *tops], user)
    assert code == 0, said
    return json.loads(said)


def test_the_services_user_cannot_reach_the_whole_proc(stack: Composed) -> None:
    _, mounts = stack.run("sandbox", ["cat", "/proc/self/mountinfo"], USER)
    (mount,) = [line for line in mounts.splitlines() if f" {PROC} " in line]
    assert " - proc " in mount
    assert "hidepid=invisible" in mount
    tops = (PROC, f"/proc/self/root{PROC}", f"/proc/1/root{PROC}")
    found = attacked(stack, USER, tops=tops)
    assert found == dict.fromkeys(found, "EACCES")
    assert f"list {PROC}" in found


def test_nor_can_it_as_root_of_a_namespace_of_its_own(stack: Composed) -> None:
    """Where it may mount: the folder moved elsewhere is still another user's."""
    moved = 'mkdir -p /tmp/all /tmp/bound && mount --rbind / /tmp/all && exec "$@"'
    own = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", moved, "sh")
    tops = (PROC, f"/tmp/all{PROC}")
    found = attacked(stack, USER, *own, tops=tops)
    assert found == dict.fromkeys(found, "EACCES")
    assert f"bind {PROC}" in found


async def test_code_in_a_sandbox_sees_nothing_of_it(stack: Composed) -> None:
    async with Stack(stack.endpoints) as clients:
        spec = sandbox_pb.EnvironmentSpec(builder="system")
        state = [event async for event in clients.state.prepare_state(spec)][-1].state
        box = await clients.sandbox.create_sandbox(state.id)
        script = f"grep -c '{PROC} ' /proc/self/mountinfo; ls {PROC} && echo LISTED; echo looked"
        ran = await clients.sandbox.run(box.id, ["sh", "-c", script])
        assert ran.stdout.head == b"0\nlooked\n"
        await clients.sandbox.delete_sandbox(box.id)


def test_without_the_wall_it_is_there_and_tells_other_services_keys(stack: Composed) -> None:
    """So that the tests above fail for want of rights, and not for want of something to reach."""
    code, said = stack.run("sandbox", ["ls", PROC], "0:0")
    assert code == 0, said
    assert [name for name in said.split() if name.isdigit()]
    api = stack.api
    made = api.create_container(
        f"regreen-sandbox:{stack.env['REGREEN_TAG']}",
        ["python3", "-ISc", STEAL],
        user=USER,
        host_config=api.create_host_config(
            binds=[f"{stack.project}_proc:/whole:ro"], cap_drop=["ALL"], network_mode="none"
        ),
    )
    try:
        api.start(made["Id"])
        assert api.wait(made["Id"], timeout=60)["StatusCode"] == 0, api.logs(made["Id"])
        assert json.loads(api.logs(made["Id"])) == {"judge": "-----BEGIN PRIVATE KEY-----"}
    finally:
        api.remove_container(made["Id"], force=True)


@pytest.mark.registry
@pytest.mark.usefixtures("registry")
def test_the_quick_demo_runs_against_it(stack: Composed) -> None:
    """What `make demo QUICK=1` runs: all of its attempts are graded, and its report is written."""
    command = [sys.executable, "-m", "regreen.cli", "demo", "--quick", "--home", str(stack.home)]
    done = subprocess.run(
        command, env=stack.env, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((stack.home / "demo-quick" / "report.json").read_text())
    assert {"base", "sft", "grpo"} <= {cell["subject"] for cell in found["cells"]}
    assert found["attempts"] > 0
    assert found["lost"] == 0
