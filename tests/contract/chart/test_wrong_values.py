"""Deliberately wrong values, each refused before anything is installed.

- `schema` is values.schema.json, `template` the chart's own checks. Values are tried as they would
  be given; what no value can say: test_wrong_objects.py.
"""

from typing import Any

import pytest

from tests.fixtures import chart

PEER = {"podSelector": {"matchLabels": {"a": "b"}}}
VALUES = [
    ("string replicas", "judge.replicas", "two", "schema", "got string, want integer"),
    ("no replicas", "judge.replicas", 0, "schema", "minimum"),
    ("unknown key", "judge.replica", 2, "schema", "additional properties 'replica'"),
    ("unknown component", "gateway", {}, "schema", "additional properties 'gateway'"),
    ("unknown setting", "judge.settings.modle", "x", "schema", "additional properties 'modle'"),
    ("setting of the chart", "dataset.settings.listen", "x", "schema", "'listen'"),
    ("setting out of bounds", "dataset.settings.pool_size", 0, "schema", "minimum"),
    ("setting of a wrong type", "dataset.settings.lease_s", "long", "schema", "want number"),
    ("setting of no such choice", "judge.settings.model", "gpt", "schema", "one of"),
    ("secret among settings", "judge.settings.openai_key", "sk-1", "schema", "'openai_key'"),
    ("secret by value", "judge.secretSettings.openai_key", "sk-1", "schema", "want object"),
    ("missing limit", "judge.resources.limits", {"memory": None}, "schema", "missing property"),
    ("bad quantity", "judge.resources.limits.memory", "2 GB", "schema", "does not match"),
    ("image of a former release", "images.services", {}, "schema", "properties 'services'"),
    ("tag for a digest", "images.dataset.digest", "v1.2", "schema", "does not match"),
    ("tag in a repository", "images.judge.repository", "r/x:latest", "schema", "does not match"),
    ("tag of digits", "images.judge.repository", "r:5000", "schema", "does not match"),
    ("no digest", "images.dataset.digest", "", "template", "images.dataset.digest"),
    ("blobs on a disk", "blobs.url", "/data", "schema", "does not match"),
    ("no blobs", "blobs.url", "", "template", "blobs.url"),
    ("no credentials", "blobs.secret", "", "template", "blobs.secret"),
    ("no database", "postgres.urlSecret.name", "", "template", "postgres: set urlSecret"),
    ("two databases", "postgres.cnpg.enabled", True, "template", "one of"),
    ("no model", "storage.model.existingClaim", "", "template", "storage.model"),
    ("path out of a claim", "storage.model.subPath", "../x", "schema", "does not match"),
    ("two engines", "policy.settings.engine", "torch", "template", "engine and model"),
    ("router to nothing", "sglang.enabled", False, "template", "router.enabled"),
    ("workers of nothing", "dataset.enabled", False, "template", "rollout.enabled"),
    ("an enabled that is text", "monitoring.enabled", "yes", "schema", "want boolean"),
    ("word for an option", "sglang.args", ["tp 8"], "schema", "does not match"),
    ("unknown routing", "router.policy", "fastest", "schema", "one of"),
    ("port out of range", "networkPolicy.egress.dns.ports", [70000], "schema", "maximum"),
    ("peer that is everybody", "networkPolicy.clients", [{}], "schema", "minProperties"),
    ("host's volume by scheduling", "judge.scheduling.volumes", [], "schema", "'volumes'"),
    ("tokens in plain text", "security.tls.enabled", False, "template", "in plain text"),
    ("no hashes", "security.tokens.secret", "", "schema", "does not match"),
    ("comment in a name", "rollout.run", "a #b", "schema", "does not match"),
    ("one more option", "rollout.run", "a\n- --until-idle", "schema", "does not match"),
    ("variable in a name", "rollout.run", "$(HOME)", "schema", "does not match"),
    ("far too many", "rollout.concurrency", 5_000_000, "schema", "maximum"),
    ("far too many servers", "sglang.replicas", 2_000, "schema", "maximum"),
    ("comment in a URL", "blobs.url", "s3://bucket/a #b", "schema", "does not match"),
    ("option in a URL", "blobs.url", "s3://bucket/a?secrets=/x", "schema", "does not match"),
    (
        "more in a key",
        "judge.secretSettings.openai_key",
        {"name": "a", "key": "b, path: c"},
        "schema",
        "does not match",
    ),
    ("class of two words", "storage.shared.storageClass", "a #b", "schema", "does not match"),
    (
        "credentials of the node",
        "networkPolicy.egress.packages.to",
        [{"ipBlock": {"cidr": "169.254.169.254/32"}}],
        "template",
        "get their credentials",
    ),
    ("more least than most", "judge.autoscaling.minReplicas", 9, "template", "is above"),
    (
        "more by KEDA",
        "rollout.keda.minReplicas",
        65,
        "template",
        "rollout.keda: minReplicas is above",
    ),
    ("worker's word of a front", "sandbox.settings.behind_front", True, "schema", "'behind_front'"),
    ("engine without its script", "policy.settings.engine", "scripted", "schema", "one of"),
    ("engine of no servers", "policy.settings.engine", "sglang", "schema", "one of"),
    ("word for a network", "sandbox.settings.egress_private", "nonsense", "schema", "not match"),
    ("networks out of range", "sandbox.settings.egress_private", "10.0.0.0/33", "schema", "match"),
    ("address for a network", "sandbox.settings.egress_private", "fd00::/8, 10.0.0.1/8", "template",
     "10.0.0.1/8 is an address in a network"),
    ("URL for a host", "sandbox.settings.prepare_hosts", "https://h/", "schema", "does not match"),
    ("word for hosts", "sandbox.settings.egress_hosts", "a b", "schema", "does not match"),
    ("any host", "sandbox.settings.egress_hosts", "*", "schema", "does not match"),
    ("engine of one process", "learner.settings.engine", "plain", "template", "is one process"),
    ("judge of nowhere", "judge.settings.model", "openai", "template", "needs openai_url"),
    ("password in a URL", "judge.settings.openai_url", "http://u:p@h/v1", "schema", "not match"),
    ("user of an index", "sandbox.workers.indexUrl", "https://me@h/simple/", "schema", "not match"),
    ("password of a collector", "tracing.endpoint", "http://u:p@h:4318", "schema", "not match"),
    ("index of the front", "sandbox.settings.kube_index_url", "https://h/", "schema", "properties"),
    ("node of two words", "sandbox.workers.scheduling.nodeSelector", {"a": "b c"}, "schema",
     "does not match"),
    ("affinity of workers", "sandbox.workers.scheduling.affinity", {}, "schema", "'affinity'"),
    ("no toleration", "sandbox.workers.scheduling.tolerations", [{"kye": "a"}], "schema", "'kye'"),
    ("thousandths of a byte", "judge.resources.limits.memory", "512m", "schema", "does not match"),
    ("eight bytes", "judge.resources.limits.memory", "8", "schema", "does not match"),
    ("memory to start nothing", "judge.resources.requests.memory", "15Mi", "schema", "not match"),
    ("thousandths of a disk", "storage.shared.size", "500m", "schema", "does not match"),
    ("no shared memory", "learner.shm", "1k", "schema", "does not match"),
    ("no such resource", "judge.resources.limits.cpus", "2", "schema", "properties 'cpus'"),
    ("half a device", "judge.resources.limits", {"example.org/fpga": "0.5"}, "schema", "not match"),
    ("GPUs in two places", "sglang.resources.limits", {"nvidia.com/gpu": "3"}, "template",
     "nvidia.com/gpu is said by sglang.gpus"),
    ("GPUs of a learner", "learner.resources.requests", {"nvidia.com/gpu": "3"}, "template",
     "learner.resources.requests: nvidia.com/gpu is said by learner.gpus"),
    ("quota beyond all", "quotas.default.sandboxes", 1e30, "schema", "maximum"),
    ("setting beyond all", "dataset.settings.max_waiting", 1e30, "schema", "maximum"),
    ("two names of a namespace", "sandbox.workersNamespace", "a.b", "schema", "does not match"),
    ("far too long a namespace", "sandbox.workersNamespace", "a" * 200, "schema", "does not match"),
    ("block and pods", "networkPolicy.clients", [PEER | {"ipBlock": {"cidr": "10.0.0.0/8"}}],
     "schema", "maxProperties"),
    ("names from everybody", "networkPolicy.egress.dns.to", [], "schema", "minItems"),
    ("collector out of reach", "networkPolicy.egress.traces.to", [], "template", "egress.traces"),
    ("scraped by nobody", "networkPolicy.monitoring", [], "template", "nobody could scrape"),
    ("operator of databases", "networkPolicy.cnpg", [], "template", "would be everybody"),
    ("operator of scalers", "networkPolicy.keda", [], "template", "would be everybody"),
    ("workers of one run by all", "rollout.run", "mine", "template", "counts the rollouts of all"),
    ("label of the chart", "monitoring.labels", {"app.kubernetes.io/name": "x"}, "schema", "'not'"),
    ("no label", "monitoring.labels", {"a b": "x"}, "schema", "does not match"),
    ("scraped all the time", "monitoring.interval", "0s", "schema", "does not match"),
    ("scraped never", "monitoring.interval", "9999m", "schema", "does not match"),
    ("path for runbooks", "monitoring.runbooks", "docs", "schema", "does not match"),
]  # fmt: skip
FULL = {
    *("scraped by nobody", "operator of databases", "operator of scalers"),
    *("collector out of reach", "workers of one run by all"),
}
"""Those whose fault shows where everything is on."""


def given(name: str, path: str, value: Any) -> dict[str, Any]:
    base = chart.values("full" if name in FULL else "small")
    if path.endswith(".minReplicas"):
        base = chart.over(base, path.replace("minReplicas", "enabled"), True)
    return {"values": chart.over(base, path, value)}


@pytest.fixture(scope="module")
def answers(chart_tools: None) -> dict[str, dict]:
    """What became of every case, by name."""
    cases = {name: given(name, path, value) for name, path, value, _, _ in VALUES}
    return dict(zip(cases, chart.tried(list(cases.values())), strict=True))


@pytest.mark.parametrize(("name", "by", "says"), [(n, b, s) for n, _, _, b, s in VALUES])
def test_a_wrong_value_is_refused_before_anything_is_installed(answers, name, by, says):
    refused = answers[name]["refused"]
    assert says in refused
    assert ("- at '" in refused) is (by == "schema")
