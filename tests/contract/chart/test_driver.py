"""infra/k8s/driver.yaml fits what the chart makes and what security.md has Secrets hold."""

import asyncio
import json
import re
import sys
from typing import Any

import pytest
import yaml

from tests.fixtures import chart

sys.path.insert(0, str(chart.ROOT / "infra" / "scripts"))
from chart.objects import matches
from chart.pods import check_pod
from chart.tokens import check_tokens

JOB = yaml.safe_load((chart.ROOT / "infra" / "k8s" / "driver.yaml").read_text())
POD: dict[str, Any] = JOB["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
SERVING = {"dataset": 50051, "sandbox": 50052, "policy": 50053, "judge": 50054, "learner": 50055}
CLIENT, DRIVER = {"regreen.dev/client": "true"}, {"regreen.dev/driver": "true"}


def test_it_keeps_to_the_rules_of_pods() -> None:
    assert list(check_pod("Job/driver", POD)) == []
    bad = json.loads(json.dumps(POD))
    bad["spec"]["hostNetwork"] = True
    assert list(check_pod("Job/driver", bad)) == ["Job/driver: hostNetwork is set: leave it out"]


def test_it_has_a_drivers_token_alone() -> None:
    named = {"kind": "Job", "metadata": {"name": "driver"}}
    assert list(check_tokens([(named, POD)])) == []
    bad = json.loads(json.dumps(POD))
    (volume,) = [one for one in bad["spec"]["volumes"] if one["name"] == "token"]
    volume["secret"]["items"][0]["key"] = "rollout"
    (found,) = check_tokens([(named, bad)])
    assert found.startswith("Job/driver: volumes[token] has the tokens ['rollout'], not")


def test_it_stands_where_the_chart_lets_callers_in(rendered: dict[str, list[dict]]) -> None:
    """And outside of the release's own selectors, whose walls would shut it in."""
    objects = rendered["small"]
    assert POD["metadata"]["labels"] == CLIENT | DRIVER
    (wall,) = [obj for obj in objects if chart.label(obj) == "NetworkPolicy/regreen-dataset"]
    peers = [peer for rule in wall["spec"]["ingress"] for peer in rule.get("from", [])]
    assert {"podSelector": {"matchLabels": CLIENT}} in peers
    for obj in objects:
        if obj["kind"] == "NetworkPolicy":
            assert obj["spec"]["podSelector"].get("matchLabels"), chart.label(obj)


def test_it_calls_the_services_of_the_release_and_nothing_else(rendered) -> None:
    """What its wall lets out is what each service's wall lets in; and names, and spans."""
    for name, objects in rendered.items():
        walls = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
        labels = POD["metadata"]["labels"]
        mine = [w for w in walls if matches(w["podSelector"], labels)]
        (wall,) = mine
        assert set(wall["policyTypes"]) == {"Ingress", "Egress"}
        assert not wall.get("ingress")
        out = {
            (peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"], port["port"])
            for rule in wall["egress"]
            for peer in rule["to"]
            for port in rule["ports"]
            if "podSelector" in peer and "namespaceSelector" not in peer
        }
        lets_in = {
            (other["podSelector"]["matchLabels"]["app.kubernetes.io/component"], port["port"])
            for other in walls
            for rule in other.get("ingress") or ()
            for peer in rule.get("from") or ()
            for port in rule.get("ports") or ()
            if peer.get("podSelector", {}).get("matchLabels") == CLIENT
        }
        called = {(part, port) for part, port in lets_in if port in SERVING.values()}
        assert out == called == {(p, n) for p, n in SERVING.items() if (p, n) in lets_in}, name
        elsewhere = [
            rule
            for rule in wall["egress"]
            if not all("podSelector" in peer and len(peer) == 1 for peer in rule["to"])
        ]
        assert {port["port"] for rule in elsewhere for port in rule["ports"]} <= {53, 4318}
        assert not [p for rule in elsewhere for p in rule["to"] if "ipBlock" in p]


def test_its_files_are_those_that_the_stack_names(rendered: dict[str, list[dict]]) -> None:
    (stack,) = [o for o in rendered["small"] if chart.label(o) == "ConfigMap/regreen-stack"]
    said = json.loads(stack["data"]["stack.json"])
    volumes = {one["name"]: one for one in POD["spec"]["volumes"]}
    places = {one["name"]: one["mountPath"] for one in CONTAINER["volumeMounts"]}
    (home,) = [one["value"] for one in CONTAINER["env"] if one["name"] == "REGREEN_HOME"]
    assert places["stack"] == f"{home}/run"
    assert volumes["stack"]["configMap"]["name"] == stack["metadata"]["name"]
    assert said["tls"] == places["tls"]
    assert volumes["tls"]["secret"]["secretName"] == "regreen-rollout-tls"
    (item,) = volumes["token"]["secret"]["items"]
    assert said["token_file"] == f"{places['token']}/{item['path']}"
    page = (chart.ROOT / "docs/operations/security.md").read_text()
    (made,) = re.findall("create secret generic regreen-client-tokens (.*)", page)
    assert volumes["token"]["secret"]["secretName"] == "regreen-client-tokens"
    assert f"--from-file={item['key']}" in made.split()


async def test_its_command_reads_the_stack(
    rendered: dict[str, list[dict]], dataset_address: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the chart's file; only the address and the home are of this machine."""
    (stack,) = [o for o in rendered["small"] if chart.label(o) == "ConfigMap/regreen-stack"]
    said = json.loads(stack["data"]["stack.json"]) | {"tls": "", "token_file": ""}
    said["endpoints"]["dataset"] = f"dns:///{dataset_address}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stack.json").write_text(json.dumps(said))
    monkeypatch.setenv("REGREEN_HOME", str(tmp_path))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *CONTAINER["command"][1:]),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    assert out
