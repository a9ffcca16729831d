"""Values that are good one by one: what follows from them together, and what cannot work."""

from typing import Any

import pytest
import yaml

from tests.fixtures import chart

SGLANG = {"replicas": 1, "nodes": 2, "gpus": 8}


def with_sglang(**own: Any) -> dict[str, Any]:
    return chart.over(chart.values("small"), "sglang", SGLANG | own)


def options(values: dict[str, Any]) -> list[str]:
    """Options of SGLang's server beside those that every node of a replica has."""
    (answer,) = chart.tried([{"values": values}])
    assert not answer["refused"], answer["refused"]
    assert answer["schema"] == answer["policy"] == []
    (server,) = [c for c in chart.containers(answer["objects"]) if c["name"] == "sglang"]
    nodes = ("--nnodes", "--node-rank", "--dist-init-addr")
    return [word for word in server.get("args", ()) if not word.startswith(nodes)]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({}, ["--tp-size=16"]),
        ({"nodes": 1}, ["--tp-size=8"]),
        ({"nodes": 1, "gpus": 1}, []),
        ({"args": ["--log-level=info"]}, ["--tp-size=16", "--log-level=info"]),
        ({"args": ["--tp=8", "--pp-size=2"]}, ["--tp=8", "--pp-size=2"]),
        ({"nodes": 1, "args": ["--dp-size=8"]}, ["--dp-size=8"]),
    ],
)
def test_a_model_lies_over_all_gpus_unless_its_options_say(chart_tools, own, words):
    assert options(with_sglang(**own)) == words


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"args": ["--tp-size=1"]}, "over 1 GPUs"),
        ({"args": ["--dp-size=2"]}, "over 1 GPUs"),
        ({"args": ["--tp-size=32"]}, "over 32 GPUs"),
        ({"nodes": 3, "args": ["--tp-size=8"]}, "does not lie on 3 nodes of 8 GPUs"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(chart_tools, own, says):
    (answer,) = chart.tried([{"values": with_sglang(**own)}])
    assert says in answer["refused"]
    assert "give sizes that fit, or none" in answer["refused"]


@pytest.mark.parametrize("place", ["judge.autoscaling", "dataset.autoscaling", "rollout.keda"])
def test_numbers_of_set_are_compared_with_those_of_a_file(chart_tools, place):
    """`helm --set` makes other types of numbers than a file of values."""
    base = chart.over(chart.values("full"), f"{place}.enabled", True)
    cases = [
        {"values": chart.over(base, f"{place}.minReplicas", least)}
        | {"set": chart.over({}, f"{place}.minReplicas", least)}
        for least in (2, 100)
    ]
    fine, wrong = chart.tried(cases)
    assert (fine["refused"], fine["schema"], fine["policy"]) == ("", [], [])
    assert f"{place}: minReplicas is above maxReplicas" in wrong["refused"]


def test_numbers_of_set_make_what_those_of_a_file_make(chart_tools):
    full = chart.values("full")
    file, by_set = chart.tried([{"values": full}, {"values": full, "set": full}])
    assert file == by_set
    assert file["objects"]


def test_numbers_and_words_are_written_whole(chart_tools):
    """Go writes a million as 1e+06, and YAML takes many a word for something else."""
    words = {
        "rollout.env": {"NO": "yes"},
        "rollout.envFrom": ["0x1"],
        "sandbox.workersNamespace": "123",
        "blobs.secret": "1e3",
        "storage.model.existingClaim": "0",
        "storage.shared": {"existingClaim": "", "size": "100000000", "storageClass": "on"},
        "security.tokens": {"enabled": True, "secret": "null", "clientSecret": "true"},
        "judge.secretSettings.openai_key": {"name": "12", "key": "no"},
        "images.judge.repository": "host.example:5000/x/judge",
    }
    numbers = {
        "rollout.concurrency": 1_000_000,
        "rollout.keda.cooldownSeconds": 1_000_000,
        "learner.maxRestarts": 1_000_000,
    }
    values = chart.values("full")
    for path, value in (words | numbers).items():
        values = chart.over(values, path, value)
    alone = chart.over(chart.over(values, "rollout.keda.enabled", False), "rollout.run", "1e3")
    answer, by_run = chart.tried([{"values": values}, {"values": alone}])
    for one in (answer, by_run):
        assert (one["refused"], one["schema"], one["policy"]) == ("", [], [])
    (worker,) = [c for c in chart.containers(by_run["objects"]) if c["name"] == "worker"]
    assert "--run=1e3" in worker["args"]
    found = {chart.label(obj): obj["spec"] for obj in answer["objects"] if "spec" in obj}
    assert found["JobSet/regreen-learner"]["failurePolicy"]["maxRestarts"] == 1_000_000
    scaled = found["ScaledObject/regreen-rollout"]
    assert scaled["cooldownPeriod"] == 1_000_000
    assert scaled["advanced"]["scalingModifiers"]["target"] == "1000000"
    containers = {one["name"]: one for one in chart.containers(answer["objects"])}
    assert "--concurrency=1000000" in containers["worker"]["args"]
    assert {"name": "NO", "value": "yes"} in containers["worker"]["env"]
    assert {"--kube-namespace=123", "--kube-secret=1e3"} <= set(containers["front"]["args"])
    assert containers["judge"]["image"].startswith("host.example:5000/x/judge@sha256:")


def test_an_engine_of_others_is_told_where_they_are(chart_tools):
    base = chart.values("small")
    for name in ("sglang", "router"):
        base = chart.over(base, f"{name}.enabled", False)
    lacking = chart.over(base, "policy.settings.engine", "openai")
    half = chart.over(lacking, "policy.settings.openai_url", "https://models.example/v1")
    whole = chart.over(half, "policy.settings.openai_model", "one")
    *wrong, fine = chart.tried([{"values": values} for values in (lacking, half, whole)])
    for answer in wrong:
        assert "engine openai needs openai_url and openai_model" in answer["refused"]
    assert (fine["refused"], fine["schema"], fine["policy"]) == ("", [], [])


def test_nothing_that_needs_the_policy_runs_without_it(chart_tools):
    small = chart.over(chart.values("small"), "policy.enabled", False)
    idle = chart.over(small, "rollout.enabled", False)
    judging = chart.over(idle, "judge.settings.model", "policy")
    workers, alone, judge = chart.tried([{"values": v} for v in (small, idle, judging)])
    assert (
        "rollout.enabled: workers need the policy service; set policy.enabled" in workers["refused"]
    )
    assert not alone["refused"]
    assert "judge.settings.model: the policy service is left out" in judge["refused"]


def test_a_large_cluster_rolls_out_no_more_than_the_docs_say_that_a_policy_serves():
    overlay = chart.ROOT / "infra/k8s/overlays/rl-large/values.yaml"
    rollout = yaml.safe_load(overlay.read_text())["rollout"]
    most = rollout["keda"]["maxReplicas"] * rollout["concurrency"]
    assert f"at most {most} rollouts at a time".lower() in overlay.read_text().lower()
    page = (chart.ROOT / "docs/operations/chart.md").read_text()
    assert f"`rl-large` ends at {most} " in page
