"""Deliberately wrong values and objects, each caught by what should catch it.

- `schema` is values.schema.json, `template` the chart's own checks, `api` the schemas of the API
  and of CRDs, `policy` the rules for pods. Values that a schema refuses are tried as they would be
  given; what no value can say is put into the rendered objects, as an overlay could.
"""

from typing import Any

import pytest

from tests.fixtures import chart

D = "Deployment/regreen-judge"
FRONT = "Deployment/regreen-sandbox"
S = "Service/regreen-judge"
BUDGET = "PodDisruptionBudget/regreen-judge"
HOST = {"name": "home", "hostPath": {"path": "/"}}
NOBODY = {"matchLabels": {"a": "b"}}
POD = "spec.template.spec"
C = f"{POD}.containers.0"
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
    ("more least than most", "judge.autoscaling.minReplicas", 9, "template", "minReplicas"),
]
OBJECTS = [
    ("string replicas", D, "spec.replicas", "two", "api", "is not of type"),
    ("unknown field", D, f"{POD}.hostNetwrk", True, "api", "hostNetwrk"),
    ("unknown field of a JobSet", "JobSet/regreen-learner", "spec.maxRestarts", 1, "api", "maxR"),
    ("no such probe", D, f"{C}.readinessProbe", {"grcp": {}}, "api", "grcp"),
    ("unknown kind", D, "kind", "Deploiment", "api", "no schema"),
    ("old API", BUDGET, "apiVersion", "policy/v1beta1", "api", "no sc"),
    ("privileged pod", D, f"{C}.securityContext.privileged", True, "policy", "privileged"),
    ("root", D, f"{POD}.securityContext.runAsUser", 0, "policy", "root"),
    ("capability", D, f"{C}.securityContext.capabilities.add", ["NET_RAW"], "policy", "capab"),
    ("writable root", D, f"{C}.securityContext.readOnlyRootFilesystem", False, "policy", "written"),
    ("no seccomp", D, f"{POD}.securityContext.seccompProfile", None, "policy", "seccomp"),
    ("unmasked /proc", D, f"{C}.securityContext.procMount", "Unmasked", "policy", "/proc"),
    ("missing limit", D, f"{C}.resources.limits.memory", None, "policy", "no limit of memory"),
    ("no resources", D, f"{C}.resources", None, "policy", "no limit"),
    ("no probe", D, f"{C}.livenessProbe", None, "policy", "no livenessProbe"),
    ("probe by gRPC", D, f"{C}.readinessProbe", {"grpc": {"port": 50054}}, "policy", "by HTTP"),
    ("no certificate, probe by HTTP", D, f"{C}.args", [], "policy", "by gRPC"),
    ("tag", D, f"{C}.image", "regreen-dataset:latest", "policy", "no digest"),
    ("token", D, f"{POD}.automountServiceAccountToken", True, "policy", "automount"),
    ("hostPath", D, f"{POD}.volumes.0", HOST, "policy", "hostPath"),
    ("host network", D, f"{POD}.hostNetwork", True, "policy", "hostNetwork"),
    ("host port", D, f"{C}.ports.0.hostPort", 50054, "policy", "of the host"),
    ("volume that nobody mounts", D, f"{C}.volumeMounts", [], "policy", "mounted"),
    ("secret in plain sight", D, f"{C}.env", [{"name": "X_KEY", "value": "s"}], "policy", "plain"),
    ("no account", FRONT, f"{POD}.serviceAccountName", "x", "policy", "no Serv"),
    ("service to nowhere", S, "spec.ports.0.targetPort", 1, "policy", "listens"),
    ("virtual address", S, "spec.clusterIP", None, "policy", "headless"),
    ("no budget", BUDGET, "spec.selector", NOBODY, "policy", "0 disruption"),
    ("open network", "NetworkPolicy/regreen-judge", "spec.ingress", [{}], "policy", "anybody"),
    ("no wall", "NetworkPolicy/regreen-default", "spec.podSelector", NOBODY, "policy", "shuts"),
]


def given(name: str, path: str, value: Any) -> dict[str, Any]:
    base = chart.values("small")
    if name == "more least than most":
        base = chart.over(base, "judge.autoscaling.enabled", True)
    return {"values": chart.over(base, path, value)}


@pytest.fixture(scope="module")
def answers(chart_tools: None) -> dict[str, dict]:
    """What became of every case, by layer and name."""
    cases = {f"value: {name}": given(name, path, value) for name, path, value, _, _ in VALUES}
    cases |= {
        f"object: {name}": {"values": chart.values("small"), "mutate": [[target, path, value]]}
        for name, target, path, value, _, _ in OBJECTS
    }
    return dict(zip(cases, chart.tried(list(cases.values())), strict=True))


@pytest.mark.parametrize(("name", "by", "says"), [(n, b, s) for n, _, _, b, s in VALUES])
def test_a_wrong_value_is_refused_before_anything_is_installed(answers, name, by, says):
    refused = answers[f"value: {name}"]["refused"]
    assert says in refused
    assert ("- at '" in refused) is (by == "schema")


@pytest.mark.parametrize(("name", "by", "says"), [(n, b, s) for n, _, _, _, b, s in OBJECTS])
def test_a_wrong_object_is_found_by_schema_or_policy(answers, name, by, says):
    answer = answers[f"object: {name}"]
    assert not answer["refused"]
    found = answer["schema" if by == "api" else "policy"]
    assert any(says in line for line in found), answer["schema"] + answer["policy"]
    assert bool(answer["schema"]) is (by == "api")
