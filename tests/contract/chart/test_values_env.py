"""Variables of libraries reach every container of a part; those of the chart stay its own."""

from typing import Any

import pytest

from tests.contract.chart.reading import environment
from tests.fixtures import chart

CONTAINERS = {
    **{
        "dataset": {"dataset", "migrate"},
        "judge": {"judge"},
        "sandbox": {"front"},
        "policy": {"policy"},
    },
    **{"sglang": {"sglang"}, "router": {"router"}, "rollout": {"worker"}},
    "learner": {"learner", "follower"},
}


def secrets(container: dict[str, Any]) -> list[str]:
    """Secrets that are a container's environment."""
    return [source["secretRef"]["name"] for source in container.get("envFrom") or ()]


@pytest.fixture(scope="module")
def given(chart_tools: None) -> list[dict]:
    """Containers of everything, each part with a variable and a Secret of its own."""
    values = chart.values("full")
    for part in CONTAINERS:
        values = chart.over(values, f"{part}.env", {"CACHE": f"of {part}"})
        values = chart.over(values, f"{part}.envFrom", [f"headers-{part}"])
    (answer,) = chart.tried([{"values": values}])
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])
    return chart.containers(answer["objects"])


@pytest.mark.parametrize("part", CONTAINERS)
def test_a_part_has_its_own_variables_and_secrets(given, part):
    found = {c["name"] for c in given if environment(c).get("CACHE") == f"of {part}"}
    assert found == CONTAINERS[part]
    assert found == {c["name"] for c in given if f"headers-{part}" in secrets(c)}


def test_the_keys_of_the_bucket_are_in_no_environment(given):
    assert not [c["name"] for c in given if "regreen-blobs" in secrets(c)]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("learner.env.HOME", "/x", "the chart says this itself"),
        ("learner.env.OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "tracing.endpoint"),
        ("sglang.env.LWS_GROUP_SIZE", "3", "LeaderWorkerSet says this itself"),
        ("judge.env.REGREEN_JUDGE__MODEL", "rules", "settings or secretSettings"),
        ("rollout.env.OTEL_EXPORTER_OTLP_HEADERS", "a=b", "name that in rollout.envFrom"),
        ("sglang.env.HF_TOKEN", "hf", "name that in sglang.envFrom"),
        ("sglang.env.NCCL_DEBUG", 1, "want string"),
        ("sglang.env.NCCL-DEBUG", "1", "does not match"),
        ("sglang.envFrom", ["A B"], "does not match"),
    ],
)
def test_wrong_variables_are_refused(chart_tools, path, value, says):
    (answer,) = chart.tried([{"values": chart.over(chart.values("full"), path, value)}])
    assert says in answer["refused"]
