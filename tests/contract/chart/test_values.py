"""Every value does something, and the docs' table names each."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.fixtures import chart

SAMPLES: dict[str, Any] = {
    "imagePullSecrets": [{"name": "another"}],
    "blobs.url": "s3://another/place",
    "postgres.cnpg.enabled": None,
    "storage.model.subPath": "another",
    "sandbox.settings.kube_api": "pods",
    "sglang.args": ["--another"],
    "router.policy": "random",
    "monitoring.interval": "7s",
    "monitoring.runbooks": "https://git.example/main/",
    "sandbox.workers.indexUrl": "https://another/simple/",
    "tracing.endpoint": "http://another:4318",
    "tracing.share": 0.5,
    "quotas": {"default": {"sandboxes": 3}},
    "monitoring.labels": {"another": "label"},
}
"""Other values of leaves whose type does not tell one; None: tried by what depends on it."""
PEER = [{"ipBlock": {"cidr": "198.51.100.0/24"}}]
DATABASE = {"urlSecret": {"name": "db", "key": "uri"}, "cnpg": {"enabled": False}}


def leaves(at: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of the values, and what they are."""
    if isinstance(at, dict) and at:
        for key, value in at.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, at


LEAVES = dict(leaves(yaml.safe_load((chart.CHART / "values.yaml").read_text())))


def another(path: str, value: Any) -> Any:
    """A value that is as good and different."""
    name = path.rpartition(".")[2]
    if path in SAMPLES:
        return SAMPLES[path]
    if name == "digest":
        return "sha256:" + "9" * 64
    if name == "settings":
        return {"log_level": "error"}
    if name == "secretSettings":
        key = "http_key" if path.startswith("policy") else "openai_key"
        return {key: {"name": "another", "key": "another"}}
    if name == "env":
        return {"ANOTHER": "another"}
    if name == "envFrom":
        return ["another"]
    if name == "scheduling":
        return {"priorityClassName": "another"}
    if name in ("to", "clients", "monitoring", "keda", "cnpg"):
        return PEER
    if name == "ports":
        return [777]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if value[:1].isdigit():
        return "3Gi" if name != "cpu" else "3"
    return "another"


def tried_alone(base: dict[str, Any], path: str) -> dict[str, Any]:
    value: Any = base
    for key in path.split("."):
        value = value.get(key, LEAVES[path]) if isinstance(value, dict) else value
    return {"values": chart.over(base, path, another(path, value)), "only_digest": True}


def bases() -> list[dict[str, Any]]:
    """Sets of values in which a leaf may count."""
    plain = chart.values("full")
    for name in ("dataset", "judge"):
        plain = chart.over(plain, f"{name}.autoscaling.enabled", False)
    plain = chart.over(plain, "rollout.keda.enabled", False)
    plain = chart.over(plain, "sglang.nodes", 1)
    bare = {**chart.values("small"), "postgres": DATABASE}
    for component in ("router", "sglang", "policy", "rollout", "dataset", "judge", "learner"):
        bare = chart.over(bare, f"{component}.enabled", False)
    bare = chart.over(bare, "security.tokens.enabled", False)
    return [chart.values("small"), chart.values("full"), plain, bare]


@pytest.fixture(scope="module")
def effects(chart_tools: None) -> dict[str, int]:
    """How many of the sets of values render otherwise when a leaf changes."""
    sets = bases()
    tried = [path for path in LEAVES if SAMPLES.get(path, "") is not None]
    cases = [{"values": base, "only_digest": True} for base in sets]
    cases += [tried_alone(base, path) for path in tried for base in sets]
    answers = chart.tried(cases)
    before, after = answers[: len(sets)], answers[len(sets) :]
    assert not any(answer["refused"] for answer in before)
    found = dict.fromkeys(tried, 0)
    for index, answer in enumerate(after):
        path, base = tried[index // len(sets)], before[index % len(sets)]
        found[path] += not answer["refused"] and answer["digest"] != base["digest"]
    return found


@pytest.mark.parametrize("path", [p for p in LEAVES if SAMPLES.get(p, "") is not None])
def test_a_value_changes_what_is_installed(effects, path):
    assert effects[path] > 0


def test_a_database_of_the_operator_changes_what_is_installed(rendered):
    kinds = {name: {obj["kind"] for obj in objects} for name, objects in rendered.items()}
    assert ("Cluster" in kinds["full"], "Cluster" in kinds["small"]) == (True, False)


def test_every_value_has_a_line_in_the_table_of_the_docs():
    page = (chart.ROOT / "docs/operations/chart.md").read_text()
    assert [path for path in LEAVES if f"| `{path}` |" not in page] == []
