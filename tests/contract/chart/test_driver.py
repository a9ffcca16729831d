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
from chart.pods import check_pod

JOB = yaml.safe_load((chart.ROOT / "infra" / "k8s" / "driver.yaml").read_text())
POD: dict[str, Any] = JOB["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def test_it_keeps_to_the_rules_of_pods() -> None:
    assert list(check_pod("Job/driver", POD)) == []
    bad = json.loads(json.dumps(POD))
    bad["spec"]["hostNetwork"] = True
    assert list(check_pod("Job/driver", bad)) == ["Job/driver: hostNetwork is set: leave it out"]


def test_it_stands_where_the_chart_lets_callers_in(rendered: dict[str, list[dict]]) -> None:
    """And outside of the release's own selectors, whose walls would shut it in."""
    objects = rendered["small"]
    assert POD["metadata"]["labels"] == {"regreen.dev/client": "true"}
    (wall,) = [obj for obj in objects if chart.label(obj) == "NetworkPolicy/regreen-dataset"]
    peers = [peer for rule in wall["spec"]["ingress"] for peer in rule.get("from", [])]
    assert {"podSelector": {"matchLabels": POD["metadata"]["labels"]}} in peers
    for obj in objects:
        if obj["kind"] == "NetworkPolicy":
            assert obj["spec"]["podSelector"].get("matchLabels"), chart.label(obj)


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
