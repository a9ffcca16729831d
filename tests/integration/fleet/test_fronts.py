"""Fronts that meet, or lose what owns their workers; what settings and secrets become."""

import asyncio
import contextlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient
from regreen.rpc.errors import InvalidArgument, NotFound, Unavailable
from sandbox_svc.__main__ import serving
from tests.fixtures.certs import DAY, Certs
from tests.integration.fleet.conftest import eventually, holding, pods, prepared, ready_workers

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240), pytest.mark.slow]


async def test_two_equal_fronts_at_once_share_their_workers(plain, tmp_path):
    async with (
        plain.front(kube_keep_workers=True, blobs=str(tmp_path)) as one,
        plain.front(kube_keep_workers=True, blobs=str(tmp_path)) as two,
    ):
        workers = set(pods(plain))
        assert len(workers) == 2
        states = await asyncio.gather(*(prepared(f, "of both\n") for f in (one, two) * 4))
        assert len({state.id for state in states}) == 1
        state = states[0]
        assert len(await holding(plain, state.id)) == 1
        box = await one.sandboxes.create_sandbox(state.id)
        ran = await two.sandboxes.run(box.id, ["cat", "notes.txt"])
        assert ran.stdout.head == b"of both\n"
        snapshot = await two.sandboxes.snapshot_sandbox(box.id)
        made = await one.sandboxes.create_sandbox(snapshot.id)
        await two.sandboxes.delete_sandbox(made.id)
        with pytest.raises(NotFound):
            await one.sandboxes.run(made.id, ["true"])
        await one.states.delete_state(snapshot.id)
        with pytest.raises(NotFound):
            await two.sandboxes.create_sandbox(snapshot.id)
        name = min(workers)
        await plain.cluster.delete("pods", name, 1)

        async def settled():
            now = set(pods(plain))
            return name not in now and len(now) == 2 and ready_workers() == 2

        await eventually(settled)
        await asyncio.sleep(6.0)  # a round of either front
        assert len(pods(plain)) == 2
        assert max(workers) in pods(plain), "the one that was there before stays"
        await two.sandboxes.delete_sandbox(box.id)
        await eventually(lambda: _gone(one, state.id))


async def _gone(front, state_id: str) -> bool:
    await front.states.delete_state(state_id)
    return True


async def test_of_two_different_fronts_the_last_to_start_has_the_name(plain, tmp_path):
    options = {"kube_name": "twins", "kube_workers": 1, "blobs": str(tmp_path)}

    def twins():
        return {key for key in pods(plain) if key.startswith("twins")}

    async with contextlib.AsyncExitStack() as first, contextlib.AsyncExitStack() as second:
        one = await first.enter_async_context(plain.front(**options))
        two = await second.enter_async_context(plain.front(**options, pids=123))

        async def swept():
            return len(twins()) == 1

        await eventually(swept)
        left = twins()
        assert (await prepared(two, "of the second\n")).id
        with pytest.raises(Unavailable):
            await prepared(one, "of the first\n")
        await asyncio.sleep(6.0)  # a round of either front
        assert twins() == left
        await first.aclose()
        await asyncio.sleep(1.0)
        assert twins() == left, "what lost the name takes nothing from who has it"
        assert (await prepared(two, "still there\n")).id
        await second.aclose()
        await eventually(lambda: _no_pod_of(plain, "twins"))


async def _no_pod_of(plain, name: str) -> bool:
    return not any(key.startswith(name) for key in pods(plain))


async def test_an_anchor_that_was_removed_is_made_again_with_its_workers(plain):
    async with plain.front(kube_name="loose", kube_workers=1) as front:
        before = {key for key in pods(plain) if key.startswith("loose")}
        await plain.cluster.delete("configmaps", "loose")

        async def back():
            now = {key for key in pods(plain) if key.startswith("loose")}
            return len(now) == 1 and not now & before and ready_workers() == 1

        await eventually(back, within_s=60.0)
        uid = plain.cluster.get("configmaps", "loose")["metadata"]["uid"]
        (pod,) = [pod for key, pod in pods(plain).items() if key.startswith("loose")]
        assert pod["metadata"]["ownerReferences"][0]["uid"] == uid
        assert (await prepared(front, "again\n")).id


async def test_a_setting_that_would_show_a_password_is_refused(plain, tmp_path):
    settings = plain.settings(egress_upstream="http://user:pw@proxy:3128", home=tmp_path)
    with pytest.raises(InvalidArgument, match="egress_upstream") as caught:
        async with serving(settings):
            pass
    assert "pw" not in str(caught.value)


async def test_workers_are_given_an_index_a_proxy_and_their_place(plain):
    plain.kubelet.secrets["proxy"] = {"REGREEN_SANDBOX__EGRESS_UPSTREAM": "http://u:h1dden@p:3128"}
    options = {
        **{"kube_name": "placed", "kube_workers": 1, "kube_env_secrets": "proxy"},
        **{"kube_index_url": "https://index.example/simple/", "kube_pull_secrets": "registry"},
        **{"kube_node_selector": "pool=sandboxes", "kube_priority_class": "low"},
        "kube_tolerations": '[{"key": "pool", "operator": "Exists"}]',
    }
    async with plain.front(**options) as front:
        ((name, pod),) = [item for item in pods(plain).items() if item[0].startswith("placed")]
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["spec"]["nodeSelector"] == {"pool": "sandboxes"}
        assert pod["spec"]["tolerations"] == [{"key": "pool", "operator": "Exists"}]
        assert pod["spec"]["priorityClassName"] == "low"
        assert "h1dden" not in str(pod)
        environ = Path(f"/proc/{plain.kubelet.processes[name].pid}/environ").read_bytes()
        assert b"REGREEN_INDEX_URL=https://index.example/simple/" in environ.split(b"\0")
        assert b"h1dden" in environ
        state = await prepared(front, "placed\n")
        box = await front.sandboxes.create_sandbox(state.id)
        look = "env; cat /proc/*/environ 2>/dev/null"
        ran = await front.sandboxes.run(box.id, ["sh", "-c", look])
        assert b"h1dden" not in ran.stdout.head


async def test_a_secret_reaches_workers_and_no_sandbox(plain):
    plain.kubelet.secrets["aws"] = {"AWS_SECRET_ACCESS_KEY": "s3cr3t-key"}
    options = {"kube_name": "trusted", "kube_workers": 1, "kube_secret": "aws"}
    async with plain.front(**options) as front:
        (name,) = [key for key in pods(plain) if key.startswith("trusted")]
        pid = plain.kubelet.processes[name].pid
        assert b"s3cr3t-key" in Path(f"/proc/{pid}/environ").read_bytes()
        state = await prepared(front, "curious\n")
        box = await front.sandboxes.create_sandbox(state.id)
        look = "env; cat /proc/*/environ 2>/dev/null"
        ran = await front.sandboxes.run(box.id, ["sh", "-c", look])
        assert b"PATH" in ran.stdout.head
        assert b"s3cr3t-key" not in ran.stdout.head + ran.stdout.tail


async def test_front_and_workers_show_each_other_certificates(plain, tmp_path):
    certs = Certs.make(tmp_path / "certs")
    certs.service("sandbox-worker", "sandbox-worker")
    plain.kubelet.secret_files["tls"] = certs.folder.path / "sandbox-worker"
    options = {"kube_name": "shown", "kube_workers": 1, "kube_tls_secret": "tls"}
    client = Access(certs.tls("client"))
    async with plain.front(access=client, **options, **certs.settings()) as front:
        state = await prepared(front, "curious\n")
        box = await front.sandboxes.create_sandbox(state.id)
        look = "ls /var/run/regreen; cat /var/run/regreen/tls/* /proc/*/environ; env"
        ran = await front.sandboxes.run(box.id, ["sh", "-c", look])
        assert b"PRIVATE KEY" not in ran.stdout.head + ran.stdout.tail
        (pod,) = [pod for name, pod in pods(plain).items() if name.startswith("shown")]
        for access in (Access(), Access(replace(client.tls, server_name="server"))):
            async with connect(f"{pod['status']['podIP']}:50052", access) as channel:
                with pytest.raises(Unavailable):
                    await SandboxClient(channel, patience_s=0.0).list_sandboxes()
        for change in (
            lambda: certs.folder.renew_authority(100 * DAY, datetime.now(UTC)),
            lambda: certs.folder.renew([], 2 * DAY, datetime.now(UTC)),
            certs.folder.retire,
        ):
            change()
            ran = await front.sandboxes.run(box.id, ["cat", "notes.txt"])
            assert ran.stdout.head == b"curious\n"
