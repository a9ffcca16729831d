"""A front over a stand-in cluster whose workers are real sandbox services."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import (
    FailedPrecondition,
    MissingDependency,
    NotFound,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.fleet.calls import METHODS, Endpoint, Worker
from sandbox_svc.fleet.manifests import INSTANCE, SPEC
from tests.fixtures.kube import Fault
from tests.integration.fleet.conftest import (
    Front,
    eventually,
    holding,
    pods,
    prepared,
    world,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240), pytest.mark.slow]

_ROOT = Path(__file__).parents[3]


@pytest_asyncio.fixture(loop_scope="module")
async def front(plain):
    """A front that leaves its workers to the next test's."""
    async with plain.front(kube_keep_workers=True) as front:
        yield front


async def test_two_workers_are_used_as_one_service(plain, front):
    state = await prepared(front, "hello\n")
    assert (await prepared(front, "hello\n")).id == state.id
    assert len(pods(plain)) == 2
    box = await front.sandboxes.create_sandbox(state.id, labels={"run": "r1"})
    ran = await front.sandboxes.run(box.id, ["sh", "-c", "cat notes.txt; echo more >> notes.txt"])
    assert ran.stdout.head == b"hello\n"
    events = [
        e async for e in front.sandboxes.exec(box.id, pb.Command(argv=["wc", "-l", "notes.txt"]))
    ]
    assert events[0].stdout == b"2 notes.txt\n"
    assert events[-1].ended.exit_code == 0
    forked = await front.sandboxes.fork_sandbox(box.id, 2)
    for fork in forked.sandboxes:
        content = (await front.sandboxes.read_file(fork.id, "/work/repo/notes.txt")).content
        assert content == b"hello\nmore\n"
    kept = await front.sandboxes.snapshot_sandbox(box.id)
    assert kept.parent_id
    await front.sandboxes.restore_sandbox(box.id, state.id)
    assert (await front.sandboxes.read_file(box.id, "/work/repo/notes.txt")).content == b"hello\n"
    await front.sandboxes.write_file(box.id, "/work/repo/new.txt", b"x")
    assert [c.path for c in (await front.sandboxes.diff(box.id)).changes] == ["new.txt"]
    assert (await front.states.get_state(kept.id)).id == kept.id
    with pytest.raises(FailedPrecondition, match="sandboxes run on"):
        await front.states.delete_state(state.id)
    for sandbox in (box, *forked.sandboxes):
        await front.sandboxes.delete_sandbox(sandbox.id)
        await front.sandboxes.delete_sandbox(sandbox.id)
    with pytest.raises(NotFound):
        await front.sandboxes.run(box.id, ["true"])
    await front.states.delete_state(state.id)
    with pytest.raises(NotFound):
        await front.sandboxes.create_sandbox(state.id)


async def test_lists_are_of_all_workers_and_paged(front):
    made = [(await prepared(front, f"number {number}")).id for number in range(6)]
    assert made, "states of several specs"
    seen, token = [], ""
    while True:
        answer = await front.states.list_states(page_size=2, page_token=token)
        seen += [state.id for state in answer.states]
        token = answer.next_page_token
        if not token:
            break
    assert len(seen) == len(set(seen))
    assert set(made) <= set(seen)
    for state_id in made:
        await front.states.delete_state(state_id)


async def test_specs_are_spread_and_stay_where_they_were(plain, front):
    where = {}
    for number in range(8):
        state = await prepared(front, f"spread {number}")
        where[state.id] = await holding(plain, state.id)
    assert len({name for names in where.values() for name in names}) == 2
    assert all(len(names) == 1 for names in where.values())
    for state_id, names in where.items():
        box = await front.sandboxes.create_sandbox(state_id)
        assert await holding(plain, state_id) == names
        await front.sandboxes.delete_sandbox(box.id)
        await front.states.delete_state(state_id)


async def test_a_full_worker_is_passed_over_and_the_state_brought_to_the_next(plain):
    async with plain.front(kube_keep_workers=True, max_sandboxes=2) as front:
        state = await prepared(front, "wanted everywhere\n")
        assert len(await holding(plain, state.id)) == 1
        boxes = [await front.sandboxes.create_sandbox(state.id) for _ in range(4)]
        assert len(await holding(plain, state.id)) == 2
        for box in boxes:
            ran = await front.sandboxes.run(box.id, ["cat", "notes.txt"])
            assert ran.stdout.head == b"wanted everywhere\n"
        with pytest.raises(ResourceExhausted, match="2 of 2 sandboxes") as caught:
            await front.sandboxes.create_sandbox(state.id)
        assert caught.value.retry_after_s is not None
        await front.sandboxes.write_file(boxes[3].id, "/work/repo/own.txt", b"far away")
        snapshot = await front.sandboxes.snapshot_sandbox(boxes[3].id)
        await front.sandboxes.restore_sandbox(boxes[0].id, snapshot.id)
        moved = await front.sandboxes.read_file(boxes[0].id, "/work/repo/own.txt")
        assert moved.content == b"far away"
        for box in boxes:
            await front.sandboxes.delete_sandbox(box.id)
        await front.states.delete_state(snapshot.id)
        await front.states.delete_state(state.id)


async def test_sandboxes_of_a_killed_worker_are_gone_and_new_ones_are_made(plain):
    async with plain.front(kube_keep_workers=True) as front:
        state = await prepared(front, "survives\n")
        box = await front.sandboxes.create_sandbox(state.id)
        (name,) = await holding(plain, state.id)
        (pod,) = [pod for key, pod in pods(plain).items() if key == name]
        plain.kubelet.processes[name].send_signal(signal.SIGKILL)
        errors: list[RegreenError] = []
        while not errors or not isinstance(errors[-1], NotFound):
            try:
                await front.sandboxes.run(box.id, ["true"])
            except RegreenError as error:
                errors.append(error)
            assert len(errors) < 2000
            await asyncio.sleep(0.02)
        assert {type(error) for error in errors} <= {Unavailable, NotFound}
        assert errors[-1].metadata["id"] == box.id

        async def made():
            return await front.sandboxes.create_sandbox(state.id)

        fresh = await eventually(made)
        ran = await front.sandboxes.run(fresh.id, ["cat", "notes.txt"])
        assert ran.stdout.head == b"survives\n"
        await front.sandboxes.delete_sandbox(box.id)

        async def back():
            now = pods(plain).get(name, pod)["status"]
            ready = now["conditions"][0]["status"] == "True"
            return ready and now["containerStatuses"][0]["restartCount"] == 1

        await eventually(back)


async def test_a_lost_pod_takes_only_states_that_were_not_kept(plain):
    async with plain.front(fleet_keep="none", kube_keep_workers=True) as front:
        kept = await prepared(front, "kept by need")
        box = await front.sandboxes.create_sandbox(kept.id)
        await front.sandboxes.write_file(box.id, "/work/repo/only.txt", b"here")
        lost = await front.sandboxes.snapshot_sandbox(box.id)
        (name,) = await holding(plain, lost.id)
        await plain.cluster.delete("pods", name, 1)

        async def replaced():
            now = pods(plain)
            return name not in now and len(now) == 2

        await eventually(replaced)
        with pytest.raises(FailedPrecondition, match="make it again") as caught:
            await front.sandboxes.create_sandbox(lost.id)
        assert caught.value.metadata["id"] == lost.id
        with pytest.raises(NotFound) as gone:
            await front.sandboxes.run(box.id, ["true"])
        assert gone.value.metadata["worker"] == name
        again = await prepared(front, "kept by need")
        assert again.id == kept.id


async def test_a_kept_state_outlives_every_worker(plain):
    async with plain.front(fleet_keep="all", kube_keep_workers=True) as front:
        state = await prepared(front, "root of it\n")
        box = await front.sandboxes.create_sandbox(state.id)
        await front.sandboxes.run(box.id, ["sh", "-c", "echo leaf > leaf.txt"])
        leaf = await front.sandboxes.snapshot_sandbox(box.id)
        names = front.settings.home / "blobs" / "names"

        async def written():
            return (names / leaf.id).exists()

        await eventually(written)

        def layers(state_id):
            digest = (names / state_id).read_text().split()[0]
            manifest = json.loads((names.parent / digest[:2] / digest).read_bytes())
            return [sha256 for sha256, _ in manifest["parts"][1:-1]]

        assert layers(leaf.id)[:-1] == layers(state.id), "a child shares its parent's layers"
        for name in pods(plain):
            await plain.cluster.delete("pods", name, 1)

        async def made():
            return await front.sandboxes.create_sandbox(leaf.id)

        fresh = await eventually(made)
        ran = await front.sandboxes.run(fresh.id, ["cat", "notes.txt", "leaf.txt"])
        assert ran.stdout.head == b"root of it\nleaf\n"
        twig = await front.sandboxes.snapshot_sandbox(fresh.id)

        async def twig_written():
            return (names / twig.id).exists()

        await eventually(twig_written)
        assert layers(twig.id)[:-1] == layers(leaf.id), "wherever they were made"


async def test_a_new_front_takes_over_and_sweeps_what_does_not_fit(plain):
    async with plain.front(kube_keep_workers=True) as front:
        state = await prepared(front, "found again\n")
        box = await front.sandboxes.create_sandbox(state.id)
        before = set(pods(plain))
    async with plain.front(kube_keep_workers=True) as front:
        assert set(pods(plain)) == before
        assert (await front.sandboxes.get_sandbox(box.id)).state_id == state.id
        ran = await front.sandboxes.run(box.id, ["cat", "notes.txt"])
        assert ran.stdout.head == b"found again\n"
    async with plain.front(kube_keep_workers=True, pids=100) as front:

        async def swept():
            return len(pods(plain)) == 2 and not before & set(pods(plain))

        await eventually(swept)


async def test_the_workers_of_a_killed_front_are_taken_over(plain, tmp_path):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sandbox_svc", "--backend=kubernetes", f"--home={tmp_path}"),
        *("--listen=127.0.0.1:0", "--metrics=127.0.0.1:0", f"--kube-config={plain.kubeconfig}"),
        *("--kube-name=killed", "--kube-workers=1", "--warm-seats=1", "--max-sandboxes=8"),
        "--drain-s=0.2",
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        cwd=_ROOT,
    )
    address = ""
    while not address:
        line = json.loads(await process.stderr.readline())
        address = line.get("address", "") if line["event"] == "serving" else ""
    channel = connect(address)
    first = Front(StateClient(channel), SandboxClient(channel), plain.settings(), address)
    state = await prepared(first, "of the killed\n")
    box = await first.sandboxes.create_sandbox(state.id)
    await channel.close()
    process.kill()
    await process.wait()
    left = {name for name in pods(plain) if name.startswith("killed")}
    assert len(left) == 1
    async with plain.front(kube_name="killed", kube_workers=1) as front:
        assert {name for name in pods(plain) if name.startswith("killed")} == left
        ran = await front.sandboxes.run(box.id, ["cat", "notes.txt"])
        assert ran.stdout.head == b"of the killed\n"
    await eventually(lambda: _no_object_of(plain, "killed"))


async def test_the_end_of_a_front_leaves_nothing(plain):
    async with plain.front(kube_name="Büro #7/../$(rm)\n", kube_workers=1) as front:
        (pod,) = [p for p in plain.cluster.all("pods") if "b-ro-7-rm" in p["metadata"]["name"]]
        instance = pod["metadata"]["labels"][INSTANCE]
        assert (await prepared(front, "x")).id
    await eventually(lambda: _no_object_of(plain, instance))


async def _no_object_of(world, instance: str) -> bool:
    labels = [obj["metadata"].get("labels", {}) for obj in world.cluster.objects.values()]
    return not any(found.get(INSTANCE) == instance for found in labels)


async def test_trouble_of_the_api_is_waited_out(plain):
    cluster = plain.cluster
    cluster.faults += [
        Fault("GET", "pods", 500, 1),
        Fault("POST", "configmaps", 429, 1, retry_after_s=1),
        Fault("POST", "pods", 503, 2),
        Fault("WATCH", "pods", 429, 2),
    ]
    async with plain.front(kube_name="troubled", kube_workers=1, fleet_keep="none"):
        (name,) = [key for key in pods(plain) if key.startswith("troubled")]
        await cluster.drop_watches()
        await cluster.drop_watches(forget=True)
        cluster.faults.append(Fault("WATCH", "pods", 500, 1))
        await cluster.drop_watches()
        await cluster.delete("pods", name, 1)

        async def another():
            return [key for key in pods(plain) if key.startswith("troubled") and key != name]

        await eventually(another)
    failed = {(verb, plural, code) for verb, plural, code in cluster.seen if code}
    assert {("GET", "pods", 500), ("POST", "pods", 503), ("WATCH", "pods", 500)} <= failed
    assert not any(fault.times for fault in cluster.faults)


async def test_a_dropped_connection_of_the_watch_does_not_blind(plain, front):
    name = next(iter(pods(plain)))
    await plain.cluster.drop_watches()
    await plain.cluster.delete("pods", name, 1)

    async def replaced():
        return name not in pods(plain) and len(pods(plain)) == 2

    await eventually(replaced)


async def test_a_cluster_that_cannot_serve_is_named(plain, tmp_path):
    with pytest.raises(MissingDependency, match="does not know agent-sandbox"):
        async with serving(plain.settings(kube_api="agent-sandbox", home=tmp_path)):
            pass
    with pytest.raises(MissingDependency, match="no usable cluster configuration"):
        async with serving(plain.settings(kube_config=tmp_path / "none", home=tmp_path)):
            pass
    stranger = tmp_path / "stranger"
    stranger.write_text(plain.kubeconfig.read_text().replace("stand-in-token", "other"))
    with pytest.raises(MissingDependency, match="Unauthorized"):
        async with serving(plain.settings(kube_config=stranger, home=tmp_path)):
            pass


async def test_a_front_without_a_worker_says_so_and_leaves_nothing(plain, tmp_path):
    hasty = plain.settings(kube_name="hasty", kube_start_s=0.2, home=tmp_path, kube_workers=1)
    with pytest.raises(MissingDependency, match="no worker was ready within 0 s"):
        async with serving(hasty):
            pass
    await eventually(lambda: _no_object_of(plain, "hasty"))


_BAD = ("", "x", "sbx_" + "0" * 31, "st_" + "0" * 32, "sbx_" + "0" * 32, "../../etc", "\u2028" * 99)


async def test_every_bad_request_ends_in_a_typed_status(plain, front):
    worker = Worker(Endpoint("front", "", "", front.address))
    told = set()
    for method in METHODS.values():
        if method.streams_in:
            continue
        for text in _BAD:
            fields = [f for f in ("id", "sandbox_id", "state_id", "page_token") if method.has(f)]
            request = method.request(**dict.fromkeys(fields, text))
            try:
                if method.streams_out:
                    [r async for r in worker.stream(method, request, 20.0)]
                else:
                    await worker.call(method, request)
            except RegreenError as error:
                told.add(error.status)
    await worker.close()
    assert told <= {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
    assert {"INVALID_ARGUMENT", "NOT_FOUND"} <= told


async def test_the_role_in_the_repository_allows_what_was_asked(plain):
    """Runs last on the plain cluster: compares what the front asked with the Role it is given."""
    text = (_ROOT / "infra/helm/regreen/templates/sandbox.yaml").read_text()
    rules = text.partition("\nrules:\n")[2].partition("\n---\n")[0]
    plain_lines = [line for line in rules.splitlines() if "{{" not in line]
    role = {"rules": yaml.safe_load("\n".join(plain_lines))}
    allowed = {
        (verb, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    verbs = {"POST": "create", "PUT": "update", "DELETE": "delete"}
    verbs |= {"WATCH": "watch", "GET": "list"}
    asked = {(verbs[verb], kind) for verb, kind, _ in plain.cluster.seen}
    asked = {pair for pair in asked if pair != ("list", "configmaps")}  # one is read by its name
    assert asked <= allowed
    assert {("create", "pods"), ("watch", "pods"), ("delete", "configmaps")} <= asked


async def test_claims_are_used_where_the_cluster_has_agent_sandbox():
    pytest.importorskip("lightkube", reason="regreen[kubernetes] is not installed")
    async with world(agent_sandbox=True) as cluster:
        async with cluster.front(kube_workers=2) as front:
            state = await prepared(front, "claimed\n")
            box = await front.sandboxes.create_sandbox(state.id)
            ran = await front.sandboxes.run(box.id, ["cat", "notes.txt"])
            assert ran.stdout.head == b"claimed\n"
            claims = cluster.cluster.all("sandboxclaims")
            assert len(claims) == 2
            assert len(await holding(cluster, state.id)) == 1
            spec = {claim["metadata"]["labels"][SPEC] for claim in claims}
            (pool,) = cluster.cluster.all("sandboxwarmpools")
            assert spec == {pool["metadata"]["labels"][SPEC]}
            worker = claims[0]["metadata"]["name"]
            await cluster.cluster.delete("sandboxclaims", worker)

            async def replaced():
                left = [c["metadata"]["name"] for c in cluster.cluster.all("sandboxclaims")]
                return len(left) == 2 and worker not in left

            await eventually(replaced)

        async def empty():
            return not cluster.cluster.objects

        await eventually(empty)
