"""Variables of libraries reach every container of a part; those of the chart stay its own."""

import json
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


WRONG = [
    ("learner.env.HOME", "/x", "the chart says this itself"),
    ("learner.env.OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "tracing.endpoint"),
    ("sglang.env.LWS_GROUP_SIZE", "3", "LeaderWorkerSet says this itself"),
    ("judge.env.REGREEN_JUDGE__MODEL", "rules", "settings or secretSettings"),
    ("rollout.env.OTEL_EXPORTER_OTLP_HEADERS", "a=b", "name that in rollout.envFrom"),
    ("sglang.env.HF_TOKEN", "hf", "name that in sglang.envFrom"),
    ("dataset.env.PGSSLMODE", "disable", "put it there (postgres.urlSecret)"),
    ("dataset.env.PATH", "/x", "into an image of yours (images.dataset)"),
    ("judge.env.PYTHONPATH", "/x", "says which code runs"),
    ("learner.env.LD_PRELOAD", "/x.so", "into an image of yours (images.learner)"),
    ("sandbox.env.LD_LIBRARY_PATH", "/x", "says which code runs"),
    ("judge.env.API_PASS", "x", "name that in judge.envFrom"),
    ("judge.env.MY_CREDENTIALS", "x", "name that in judge.envFrom"),
    ("judge.env.my_api_key", "x", "name that in judge.envFrom"),
    ("policy.env.https_proxy", "http://me:word@proxy:3128", "name that in policy.envFrom"),
    ("dataset.env.AWS_ACCESS_KEY_ID", "x", "the Secret that blobs.secret names"),
    ("dataset.env.AWS_SESSION_TOKEN", "x", "the Secret that blobs.secret names"),
    ("learner.env.MASTER_ADDR", "host", "which its launcher does"),
    ("learner.env.RANK", "0", "which its launcher does"),
    ("judge.env.SSLKEYLOGFILE", "/tmp/keys", "would write the keys of every connection down"),
    ("sglang.env.EXTRA_ARGS", "--log-level=info --api-key=abc", "name that in sglang.envFrom"),
    ("sglang.env.EXTRA_ARGS", "--admin-api-key abc", "name that in sglang.envFrom"),
    ("judge.env.OPTIONS", "a=b,password=x", "name that in judge.envFrom"),
    ("sglang.args", ["--api-key", "--x"], "--api-key would be in plain sight"),
    ("sglang.args", ["--api-key=abc"], "--api-key would be in plain sight; leave it out"),
    ("sglang.args", ["--admin-api-key=abc"], "--admin-api-key would be in plain sight"),
    ("sglang.args", ["--config=/x"], "--config reads options that nothing here sees"),
    ("sglang.args", ["--host=::"], "--host is said by the chart or its image; leave it out"),
    ("sglang.args", ["--x", "--port"], "--port is said by the chart"),
    ("sglang.args", ["--model-path=/x"], "storage.model"),
    ("sglang.args", ["--nnodes=2"], "sglang.nodes"),
    ("sglang.env.NCCL_DEBUG", 1, "want string"),
    ("sglang.env.NCCL-DEBUG", "1", "does not match"),
    ("sglang.envFrom", ["A B"], "does not match"),
]


@pytest.fixture(scope="module")
def wrong(chart_tools: None) -> dict[str, str]:
    """Why each was refused, by path and value."""
    full = chart.values("full")
    answers = chart.tried([{"values": chart.over(full, path, value)} for path, value, _ in WRONG])
    names = [json.dumps([path, value]) for path, value, _ in WRONG]
    return {name: one["refused"] for name, one in zip(names, answers, strict=True)}


@pytest.mark.parametrize(("path", "value", "says"), WRONG)
def test_wrong_variables_are_refused(wrong, path, value, says):
    assert says in wrong[json.dumps([path, value])]


FINE = {
    "PYTHONUNBUFFERED": "1",
    "NCCL_IB_BYPASS": "1",
    "SGLANG_MAX_NEW_TOKENS": "64",
    "https_proxy": "http://proxy:3128",
    "NO_PROXY": "a@b,c://d",
    "HF_HUB_OFFLINE": "1",
    "KEY_OF_CACHE": "1",
    "LIMITS": "--max-new-token=5 --tokenizer=x --no-password",
    "NCCL_RANKS": "1",
}
FINE_ARGS = ["--skip-tokenizer-init", "--port-range=1", "--model-impl=auto", "--log-level=info"]


def test_variables_and_options_that_are_like_them_are_taken(chart_tools):
    values = chart.over(chart.values("full"), "sglang.env", FINE)
    (answer,) = chart.tried([{"values": chart.over(values, "sglang.args", FINE_ARGS)}])
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])
    (server,) = [c for c in chart.containers(answer["objects"]) if c["name"] == "sglang"]
    assert FINE.items() <= environment(server).items()
    assert set(FINE_ARGS) <= set(server["args"])
