"""The overlay of a large cluster: who goes first where there is no room, and what is spread."""

import subprocess

import pytest
import yaml

from tests.fixtures import chart

OVERLAY = chart.ROOT / "infra/k8s/overlays/rl-large"
ORDER = ("rollout", "workers", "services", "training")
"""From those that go first to those that stay."""


@pytest.fixture(scope="module")
def objects(chart_tools: None, tmp_path_factory) -> list[dict]:
    """What the overlay makes."""
    values = yaml.safe_load((OVERLAY / "values.yaml").read_text())
    (answer,) = chart.tried([{"values": values}])
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])
    folder = tmp_path_factory.mktemp("overlay")
    for path in OVERLAY.iterdir():
        (folder / path.name).write_text(path.read_text())
    (folder / "rendered.yaml").write_text(yaml.safe_dump_all(answer["objects"]))
    kubectl = chart.ROOT / "build/chart/venv/bin/kubectl"
    done = subprocess.run(
        [str(kubectl), "kustomize", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def place_of(name: str) -> str:
    """Where a part stands in the order."""
    if name in ("rollout", "workers"):
        return name
    return "training" if name in ("learner", "follower", "sglang") else "services"


def test_who_loses_nothing_goes_first_and_the_learner_last(objects):
    classes = {o["metadata"]["name"]: o for o in objects if o["kind"] == "PriorityClass"}
    found: dict[str, set[str]] = {place: set() for place in ORDER}
    for obj in objects:
        for pod in chart.pods(obj):
            part = obj["metadata"]["labels"]["app.kubernetes.io/component"]
            found[place_of(part)].add(pod["priorityClassName"])
    (front,) = [c for c in chart.containers(objects) if c["name"] == "front"]
    flag = "--kube-priority-class="
    (of_workers,) = [word for word in front["args"] if word.startswith(flag)]
    found["workers"].add(of_workers.removeprefix(flag))
    (database,) = [obj for obj in objects if obj["kind"] == "Cluster"]
    found["services"].add(database["spec"]["priorityClassName"])
    values = []
    for place in ORDER:
        (name,) = found[place]
        values.append(classes[name]["value"])
    assert values == sorted(set(values))
    assert set(classes) == {name for names in found.values() for name in names}
    for place in ("rollout", "workers"):
        (name,) = found[place]
        assert classes[name]["preemptionPolicy"] == "Never"


@pytest.mark.parametrize("part", ["dataset", "judge"])
def test_each_part_is_spread_over_zones_by_itself(objects, part):
    (obj,) = [o for o in objects if chart.label(o) == f"Deployment/regreen-{part}"]
    (spread,) = obj["spec"]["template"]["spec"]["topologySpreadConstraints"]
    wanted = spread["labelSelector"]["matchLabels"]
    selecting = [
        other["metadata"]["name"]
        for other in objects
        if other["kind"] in ("Deployment", "StatefulSet", "Job")
        and wanted.items() <= other["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert selecting == [f"regreen-{part}"]
    assert spread["matchLabelKeys"] == ["pod-template-hash"]


def test_the_queue_that_admits_the_learner_is_told(objects):
    (jobs,) = [obj for obj in objects if obj["kind"] == "JobSet"]
    queue = jobs["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    head = (OVERLAY / "kustomization.yaml").read_text().partition("apiVersion: kustomize")[0]
    assert f"kind: LocalQueue, metadata: {{name: {queue}}}" in head
    page = (chart.ROOT / "docs/operations/chart.md").read_text()
    assert f"LocalQueue named `{queue}`" in page
