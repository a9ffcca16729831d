"""What the chart says to services is what they read; the fleet is what it makes room for."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataset_svc.measures import ROLLOUTS
from dataset_svc.models import ROLLOUT_STATES
from learner_svc.launch import CALL, Call
from regreen.client.stack import Endpoints
from sandbox_svc.fleet.manifests import CONTAINER, Plan
from sandbox_svc.settings import SandboxSettings
from tests.contract.chart.reading import ELSEWHERE, environment, service_of
from tests.fixtures import chart


@pytest.mark.parametrize("name", ["small", "full", "sandbox"])
def test_every_flag_and_variable_is_a_setting_of_the_service(rendered, settings_of, name):
    found = [c for c in chart.containers(rendered[name]) if service_of(c)]
    assert len(found) == {"small": 6, "full": 6, "sandbox": 1}[name]
    for container in found:
        prefix = f"REGREEN_{service_of(container).upper()}__"
        wrong = [n for n in environment(container) if not n.startswith(prefix)]
        assert set(wrong) <= ELSEWHERE
        settings = settings_of(container)
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        if ports:
            assert settings.listen == f"0.0.0.0:{ports['grpc']}"
            assert settings.metrics == f"0.0.0.0:{ports['metrics']}"
            probe = container["readinessProbe"]
            if settings.tls is None:
                assert probe["grpc"]["port"] == ports["grpc"]
            else:
                assert probe["httpGet"] == {"path": "/healthz", "port": ports["metrics"]}
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        if container["command"][2] != "dataset_svc.migrate":
            assert any(str(settings.home).startswith(mount) for mount in mounts)


@pytest.mark.parametrize(("name", "on"), [("small", True), ("full", True), ("sandbox", False)])
def test_every_service_shows_a_certificate_and_asks_for_tokens(rendered, settings_of, name, on):
    pods = {c["name"]: pod for obj in rendered[name] for pod in chart.pods(obj)
            for c in pod["containers"]}  # fmt: skip
    for container in chart.containers(rendered[name]):
        service = service_of(container)
        if not service and container["name"] != "worker":
            continue
        if container["command"][2] == "dataset_svc.migrate":
            continue
        secrets = {
            volume["name"]: volume["secret"]["secretName"]
            for volume in pods[container["name"]]["volumes"]
            if "secret" in volume
        }
        part = "rollout" if container["name"] == "worker" else service
        assert secrets.get("tls") == (f"regreen-{part}-tls" if on else None)
        assert ("tokens" in secrets) is (on and bool(service))
        assert ("token" in secrets) is (on and part in ("rollout", "judge"))
        if service:
            settings = settings_of(container)
            assert bool(settings.tls and settings.tls_ca) is on
            assert (settings.tokens is not None) is on
    front = [c for c in chart.containers(rendered[name]) if c["name"] == "front"]
    (pod,) = [Plan(settings_of(one)).pod_spec() for one in front]
    volumes = [v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v]
    assert volumes == [*(["regreen-sandbox-worker-tls"] if on else []), "regreen-blobs"]


def test_large_numbers_reach_the_service_as_they_were_written(rendered, settings_of):
    (front,) = [c for c in chart.containers(rendered["full"]) if c["name"] == "front"]
    settings = settings_of(front)
    assert settings.kube_memory_bytes == 68719476736
    assert settings.kube_workers == 200
    assert settings.egress_private == "10.96.0.0/12"
    (dataset,) = [c for c in chart.containers(rendered["full"]) if c["name"] == "dataset"]
    assert settings_of(dataset).max_waiting == 2_000_000


def test_the_policy_asks_the_replicas_by_the_names_that_they_have(rendered, settings_of):
    for name, kind in (("small", "StatefulSet"), ("full", "LeaderWorkerSet")):
        (policy,) = [c for c in chart.containers(rendered[name]) if c["name"] == "policy"]
        (servers,) = [obj for obj in rendered[name] if obj["kind"] == kind]
        own = servers["metadata"]["name"]
        assert settings_of(policy).sglang_urls.split(",") == [
            f"http://{own}-{i}.{own}:30000" for i in range(servers["spec"]["replicas"])
        ]
    (servers,) = [obj for obj in rendered["small"] if obj["kind"] == "StatefulSet"]
    assert servers["spec"]["serviceName"] == servers["metadata"]["name"]


def front_plan(objects: list[dict], settings_of: Any) -> Plan:
    (front,) = [c for c in chart.containers(objects) if c["name"] == "front"]
    settings = settings_of(front)
    assert isinstance(settings, SandboxSettings)
    return Plan(settings)


@pytest.mark.parametrize("name", ["small", "full", "sandbox"])
def test_workers_are_those_that_the_chart_makes_room_for(rendered, settings_of, name):
    plan = front_plan(rendered[name], settings_of)
    pod = plan.pod("worker-1", {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "1"})
    labels = pod["metadata"]["labels"]
    kinds = {"NetworkPolicy": "podSelector", "PodDisruptionBudget": "selector"}
    kinds |= {"PodMonitor": "selector"} if name == "full" else {}
    for kind, field in kinds.items():
        selecting = [
            obj
            for obj in rendered[name]
            if obj["kind"] == kind
            and obj["spec"][field].get("matchLabels", {}).items() <= labels.items()
        ]
        assert [chart.label(obj) for obj in selecting] == [f"{kind}/regreen-workers"]
        assert {obj["metadata"]["namespace"] for obj in selecting} == {plan.settings.kube_namespace}
    ports = {port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    (wall,) = [obj for obj in rendered[name] if chart.label(obj) == "NetworkPolicy/regreen-workers"]
    opened = {port["port"] for rule in wall["spec"]["ingress"] for port in rule["ports"]}
    assert opened == ports
    assert pod["spec"]["containers"][0]["name"] == CONTAINER


def test_workers_have_the_index_the_nodes_and_the_secrets_of_the_values(rendered, settings_of):
    spec = front_plan(rendered["full"], settings_of).pod_spec()
    (container,) = spec["containers"]
    given = chart.values("full")["sandbox"]["workers"]
    index = {"name": "REGREEN_INDEX_URL", "value": given["indexUrl"]}
    assert index in container["env"]
    assert [one["secretRef"]["name"] for one in container["envFrom"]] == given["envFrom"]
    assert spec["imagePullSecrets"] == chart.values("full")["imagePullSecrets"]
    placed = {key: spec[key] for key in ("nodeSelector", "tolerations", "priorityClassName")}
    assert placed == given["scheduling"]
    plain = front_plan(rendered["small"], settings_of).pod_spec()
    assert not {*placed, "imagePullSecrets"} & set(plain)


@pytest.mark.parametrize(
    "networks", ["10.0.0.0/8", "10.96.0.0/12, fd00::/8,192.0.2.7", "0.0.0.0/0,::/0", "10.1.2.4/30"]
)
def test_networks_that_the_chart_takes_the_service_takes(chart_tools, networks):
    values = chart.over(chart.values("small"), "sandbox.settings.egress_private", networks)
    (answer,) = chart.tried([{"values": values}])
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])
    assert SandboxSettings(egress_private=networks).egress_private == networks


@pytest.mark.parametrize("hosts", ["pypi.org,*.example.org:8443, [::1]", "bücher.example", "a_b."])
def test_hosts_that_the_chart_takes_the_service_takes(chart_tools, hosts):
    values = chart.over(chart.values("small"), "sandbox.settings.egress_hosts", hosts)
    (answer,) = chart.tried([{"values": values}])
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])
    assert SandboxSettings(egress_hosts=hosts).egress_hosts == hosts


@pytest.mark.parametrize(("name", "http"), [("small", False), ("full", True)])
def test_the_policy_is_reached_where_it_serves_and_reaches_no_bucket(rendered, name, http):
    (policy,) = [c for c in chart.containers(rendered[name]) if c["name"] == "policy"]
    serves = {port["name"]: port["containerPort"] for port in policy["ports"]}
    assert ("http" in serves) is http
    walls = {chart.label(o): o["spec"] for o in rendered[name] if o["kind"] == "NetworkPolicy"}
    opened = {
        port["port"]
        for rule in walls["NetworkPolicy/regreen-policy"]["ingress"]
        for port in rule["ports"]
    }
    assert opened == set(serves.values())
    (judges,) = [
        {port["port"] for port in rule["ports"]}
        for rule in walls["NetworkPolicy/regreen-judge"]["egress"]
        if "policy" in str(rule["to"])
    ]
    assert judges == set(serves.values()) - {serves["metrics"]}
    bucket = yaml.safe_load((chart.CHART / "values.yaml").read_text())["networkPolicy"]["egress"]
    ways = [rule["to"] for rule in walls["NetworkPolicy/regreen-policy"]["egress"]]
    assert bucket["blobs"]["to"] not in ways
    assert not [m for m in policy["volumeMounts"] if m["name"] == "blobs"]


def test_what_the_front_makes_is_what_the_cluster_takes(rendered, settings_of):
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "regreen-sandbox", "uid": "1"}
    objects = []
    for name in ("small", "full"):
        plan = front_plan(rendered[name], settings_of)
        objects += [
            *(plan.anchor(True), plan.pod("worker-1", owner), plan.template(owner)),
            *(plan.warm_pool(owner), plan.claim("worker-1", owner)),
        ]
    (answer,) = chart.tried([{"objects": json.loads(json.dumps(objects))}])
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])


def test_the_scaler_reads_states_that_the_queue_has(rendered):
    (scaler,) = [obj for obj in rendered["full"] if obj["kind"] == "ScaledObject"]
    triggers = {t["name"]: t["metadata"] for t in scaler["spec"]["triggers"]}
    assert scaler["spec"]["advanced"]["scalingModifiers"]["formula"] == " + ".join(triggers)
    exported = next(iter(ROLLOUTS.collect())).name
    assert {state: meta["valueLocation"] for state, meta in triggers.items()} == {
        state: f'{exported}{{state="{state}"}}'
        for state in ROLLOUT_STATES
        if state in ("waiting", "leased")
    }
    (service,) = [obj for obj in rendered["full"] if chart.label(obj) == "Service/regreen-dataset"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert {meta["url"] for meta in triggers.values()} == {
        f"http://regreen-dataset.regreen:{ports['metrics']}/metrics"
    }


def stack_file(objects: list[dict], home: Path) -> Endpoints:
    """The ConfigMap's file where a rollout worker finds it."""
    (stack,) = [obj for obj in objects if chart.label(obj) == "ConfigMap/regreen-stack"]
    (home / "run").mkdir(parents=True)
    for name, text in stack["data"].items():
        (home / "run" / name).write_text(text)
    return Endpoints.load(home)


def test_rollout_workers_find_the_services(rendered, tmp_path):
    for name in ("small", "sandbox"):
        endpoints = stack_file(rendered[name], tmp_path / name)
        for service in ("dataset", "sandbox", "policy", "judge", "learner"):
            found = [o for o in rendered[name] if chart.label(o) == f"Service/regreen-{service}"]
            target = getattr(endpoints, service)
            assert bool(found) == bool(target)
            for obj in found:
                port = next(p["port"] for p in obj["spec"]["ports"] if p["name"] == "grpc")
                assert target == f"dns:///regreen-{service}:{port}"
    (worker,) = [c for c in chart.containers(rendered["full"]) if c["name"] == "worker"]
    assert worker["command"] == ["python3", "-m", "regreen.cli", "rollout", "worker"]
    at = next(m["mountPath"] for m in worker["volumeMounts"] if m["name"] == "stack")
    home = next(arg for arg in worker["args"] if arg.startswith("--home=")).partition("=")[2]
    assert at == f"{home}/run"


async def test_a_rollout_worker_runs_as_the_chart_starts_it(rendered, dataset_address, tmp_path):
    """With the chart's arguments and file; only addresses and home are of this machine."""
    (worker,) = [c for c in chart.containers(rendered["small"]) if c["name"] == "worker"]
    stack_file(rendered["small"], tmp_path)
    path = tmp_path / "run" / "stack.json"
    endpoints = json.loads(path.read_text())
    endpoints["endpoints"]["dataset"] = f"dns:///{dataset_address}"
    endpoints["tls"] = endpoints["token_file"] = ""  # the service of this test asks for neither
    path.write_text(json.dumps(endpoints))
    args = [arg for arg in worker["args"] if not arg.startswith("--home")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *worker["command"][1:], *args, f"--home={tmp_path}", "--until-idle"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    assert "committed=0" in errors.decode()


async def test_the_ranks_of_further_nodes_start_as_the_chart_starts_them(
    rendered, settings_of, tmp_path
):
    """Which home and how many nodes, service and followers say alike."""
    (learner,) = [c for c in chart.containers(rendered["full"]) if c["name"] == "learner"]
    (follower,) = [c for c in chart.containers(rendered["full"]) if c["name"] == "follower"]
    settings = settings_of(learner)
    (jobs,) = [obj for obj in rendered["full"] if obj["kind"] == "JobSet"]
    job = {one["name"]: one["template"]["spec"] for one in jobs["spec"]["replicatedJobs"]}
    assert job["follower"]["completions"] == settings.nodes - 1
    assert settings.processes == int(learner["resources"]["limits"]["nvidia.com/gpu"])
    assert chart.label({"kind": "Service", "metadata": {"name": settings.address}}) in {
        chart.label(obj) for obj in rendered["full"]
    }
    home = next(arg for arg in follower["args"] if arg.startswith("--home="))
    assert home == f"--home={settings.home}"
    args = [arg.replace("$(JOB_COMPLETION_INDEX)", "2") for arg in follower["args"] if arg != home]
    (tmp_path / "learner").mkdir()
    call = Call.make(settings.address, 1, 8, nodes=2)
    (tmp_path / "learner" / CALL).write_text(call.to_json())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *follower["command"][1:], *args, f"--home={tmp_path}"),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        while b"takes fewer machines" not in await process.stderr.readline():
            assert process.returncode is None
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 30) == 143
