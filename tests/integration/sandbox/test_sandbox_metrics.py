"""`/metrics` of the sandbox service after real work, and the look for leaks."""

from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from regreen.sandbox import v1 as pb
from sandbox_svc import metrics
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.selfcheck import SelfCheck
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox.egressing import until, web, world


async def scraped(server) -> dict[str, float]:
    """Samples of the sandbox service by name and labels."""
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{server.metrics_port}/metrics")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "le")
            found[f"{sample.name.removeprefix('regreen_sandbox_')}{{{labels}}}"] = sample.value
    return found


async def test_metrics_hold_what_happened(tmp_path):
    async with world(tmp_path) as here, web() as seen:
        before = await scraped(here.server)
        here.names.answers["index.test"] = [["127.0.0.1"]]
        limits = pb.Limits(pids=32, output_bytes=1 << 20, memory_bytes=64 << 20)
        allow = (f"index.test:{seen.port}",)
        sandbox = await here.sandbox(*allow, limits=limits)

        async def sh(script: str, timeout_s: float = 20.0) -> pb.CommandResult:
            argv = ["sh", "-c", script]
            return await here.sandboxes.run(sandbox.id, argv, timeout_s=timeout_s)

        assert (await sh("exit 0")).exit_code == 0
        assert (await sh("sleep 30", 0.3)).reason == pb.END_REASON_TIMEOUT
        flood = await sh("head -c 4000000 /dev/zero; sleep 5")
        assert flood.reason == pb.END_REASON_OUTPUT
        await here.fetch(sandbox, f"http://index.test:{seen.port}/")
        await here.fetch(sandbox, "http://other.test/")
        await here.sandboxes.snapshot_sandbox(sandbox.id)
        checks = (await scraped(here.server))["self_checks_total{}"]
        while (await scraped(here.server))["self_checks_total{}"] < checks + 3:
            await sh("true")
        after = await scraped(here.server)

        def grown(name: str) -> float:
            return after[name] - before.get(name, 0.0)

        assert after["active{}"] == 1
        assert after["queue_depth{}"] == 0
        assert after["states{}"] == 2
        assert after["layers{}"] == 2
        assert after["layer_bytes{}"] > 0
        assert after["disk_free_bytes{}"] > 1 << 20
        assert grown("start_seconds_count{}") == 1
        assert grown("exec_seconds_count{reason=exit}") >= 3
        assert grown("limit_kills_total{reason=timeout}") == 1
        assert grown("limit_kills_total{reason=output}") == 1
        assert grown("egress_requests_total{decision=allowed}") == 1
        assert grown("egress_requests_total{decision=refused_host}") == 1
        assert grown("egress_bytes_total{direction=received}") == 5
        assert after["egress_connections{}"] == 0
        leaks = {name: value for name, value in after.items() if name.startswith("leaks{")}
        assert len(leaks) == 6
        assert set(leaks.values()) == {0.0}


@pytest.fixture
async def runtime(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=1)
    await runtime.start()
    yield runtime
    await runtime.close()


async def test_what_belongs_to_nothing_is_a_leak_when_it_stays(runtime, tmp_path):
    doors = {"sbx_live", "sbx_gone"}
    check = SelfCheck(
        runtime, tmp_path / "home", period_s=60.0, grace_s=0.0,
        doors=lambda: frozenset(doors), live=lambda: frozenset({"sbx_live"}),
    )  # fmt: skip
    assert not any((await check.look()).values())
    assert (await check.look())["door"] == {"sbx_gone"}
    doors.discard("sbx_gone")
    (tmp_path / "home/run/lost").mkdir()
    lost = await runtime._seats._make()
    await until((tmp_path / "home/run" / lost.name / "w").is_dir)
    first = await check.look()
    assert not any(first.values()), "what was not there before may be on its way"
    second = await check.look()
    assert second["directory"] == {"run/lost", f"run/{lost.name}"}
    assert second["process"] == {str(lost.pid)}
    if runtime.cgroups.name != "rlimit":
        assert second["cgroup"] == {lost.name}
    assert second["mount"] == frozenset()
    (tmp_path / "home/run/lost").rmdir()
    await runtime._seats._discard(lost)
    await until(lambda: not Path(f"/proc/{lost.pid}").exists())  # the spawner has waited for it
    await check.look()
    assert not any((await check.look()).values())


async def test_work_leaves_nothing_for_the_look_to_find(tmp_path):
    async with world(tmp_path) as here:
        check = SelfCheck(here.host.runtime, tmp_path / "home", period_s=60.0, grace_s=0.0)
        for _ in range(3):
            sandbox = await here.sandbox("index.test")
            await here.sandboxes.run(sandbox.id, ["sh", "-c", "(setsid sleep 60 &)"])
            await here.sandboxes.fork_sandbox(sandbox.id, 2)
            for one in (await here.sandboxes.list_sandboxes()).sandboxes:
                await here.sandboxes.delete_sandbox(one.id)
        runtime = here.host.runtime
        await runtime.settle()
        await until(lambda: len(runtime._seats.warm) == 1)
        await check.look()
        assert not any((await check.look()).values())


async def test_what_is_there_for_a_moment_is_no_leak(runtime, tmp_path):
    now = [0.0]
    check = SelfCheck(runtime, tmp_path / "home", period_s=60.0, grace_s=20.0, clock=lambda: now[0])
    (tmp_path / "home/run/slow").mkdir()
    for now[0], leaks in ((0.0, 0), (10.0, 0), (19.0, 0), (20.0, 1)):
        assert len((await check.look())["directory"]) == leaks
    (tmp_path / "home/run/slow").rmdir()
    assert not (await check.look())["directory"]


async def test_a_fresh_service_has_killed_nothing(tmp_path):
    def counted() -> dict[str, float]:
        return {
            sample.labels["reason"]: sample.value
            for metric in metrics.LIMIT_KILLS.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }

    before = counted()
    settings = SandboxSettings(home=tmp_path / "home", listen=f"unix:{tmp_path}/s")
    async with SandboxHost(settings) as host:
        assert {one.name for one in host.runtime.capabilities() if one.proven} >= {"pids"}
    assert counted() == before
