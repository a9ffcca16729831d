"""`regreen doctor --kube` against a stand-in of the API: what it finds, and that it only reads."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from regreen.cli.doctor_kube import KINDS
from regreen.cli.doctor_kube_needs import SECRETS, SECRETS_OF_WORKERS
from tests.fixtures import kube

pytest.importorskip("lightkube", reason="regreen[kubernetes] is not installed")
SPACE = kube.NAMESPACE
DENY = {"policyTypes": ["Ingress", "Egress"]}
OF_SECRETS = f"/api/v1/namespaces/{SPACE}/secrets"
OF_CLAIMS = f"/api/v1/namespaces/{SPACE}/persistentvolumeclaims"
OF_CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
KUEUE = "kueue.x-k8s.io/v1beta1"


def node(name: str, gpus: int = 0, ready: str = "True", cordoned: bool = False) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {
            "conditions": [{"type": "Ready", "status": ready}],
            "allocatable": {"cpu": "8"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {}),
        },
    }


def named(name: str, **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": more.pop("labels", {})}, **more}


def whole() -> kube.Cluster:
    """A cluster that lacks nothing."""
    cluster = kube.Cluster()
    cluster.pages = {
        "/version": {"gitVersion": "v1.35.2"},
        "/apis/node.k8s.io/v1/runtimeclasses": [named("gvisor", handler="runsc")],
        "/api/v1/nodes": [node(f"cpu-{i}") for i in range(600)] + [node("gpu", 8)],
        "/apis/apps/v1/namespaces/kube-system/daemonsets": [named("cilium")],
        f"/api/v1/namespaces/{SPACE}": named(SPACE),
        f"/apis/networking.k8s.io/v1/namespaces/{SPACE}/networkpolicies": [],
    }
    for kind in KINDS:
        cluster.pages[f"/apis/{kind.path}"] = {"resources": [{"name": kind.plural}]}
    cluster.pages[OF_SECRETS] = [
        named(name, data={"key": "c2VjcmV0"}) for name in {**SECRETS, **SECRETS_OF_WORKERS}
    ]
    cluster.pages[OF_CLAIMS] = [
        claim("base-model", "ReadOnlyMany"),
        claim("regreen-shared", "ReadWriteMany"),
        claim("data-0", "ReadWriteOnce"),
    ]
    cluster.pages[OF_CLASSES] = [
        named("fast", provisioner="ebs.csi.aws.com"),
        named("shared", provisioner="efs.csi.aws.com"),
    ]
    cluster.pages["/apis/kueue.x-k8s.io"] = {"preferredVersion": {"groupVersion": KUEUE}}
    cluster.pages[f"/apis/{KUEUE}/namespaces/{SPACE}/localqueues"] = [named("regreen")]
    return cluster


def claim(name: str, mode: str) -> dict[str, Any]:
    return named(name, spec={"accessModes": [mode]})


async def told(cluster: kube.Cluster, tmp_path: Path, *options: str) -> tuple[int, dict[str, dict]]:
    """Exit code and findings by name, of the real command."""
    config = tmp_path / "kubeconfig"
    async with kube.running(cluster, config):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "regreen.cli", "doctor", "--kube", "--json"),
            *(f"--kubeconfig={config}", *options),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
    rows = [json.loads(line) for line in out.decode().splitlines()]
    return process.returncode or 0, {row["name"]: row for row in rows}


async def test_a_cluster_that_lacks_nothing(tmp_path):
    cluster = whole()
    code, found = await told(cluster, tmp_path)
    assert (code, [name for name, row in found.items() if not row["ok"]]) == (0, [])
    assert found["kubernetes version"]["found"] == "v1.35.2"
    assert found["nodes"]["found"] == "601 of 601 take pods"
    assert found["gpus"]["found"] == "8 on 1 nodes"
    assert found["kind: JobSet"]["found"] == "jobset.x-k8s.io/v1alpha2"
    assert found["permissions"]["found"] == "may install the chart"
    assert found["secrets"]["found"] == f"all 10 are in {SPACE}"
    assert found["shared storage"]["found"] == "shared"
    assert found["shared claim"]["found"] == "regreen-shared"
    assert found["model claim"]["found"] == "base-model"
    assert found["queue"]["found"] == "LocalQueue regreen"
    assert "PartialObjectMetadataList" in cluster.accepted[OF_SECRETS], "no content is asked for"
    assert cluster.objects == {}
    assert {verb for verb, _, _ in cluster.seen} <= {"GET"}


async def test_a_bare_cluster_is_told_what_it_lacks(tmp_path):
    cluster = whole()
    for kind in KINDS:
        del cluster.pages[f"/apis/{kind.path}"]
    cluster.pages["/version"] = {"gitVersion": "v1.29.4+k3s1"}
    cluster.pages["/apis/node.k8s.io/v1/runtimeclasses"] = []
    cluster.pages["/api/v1/nodes"] = [node("a", ready="False"), node("b", 8, cordoned=True)]
    cluster.denied = {("create", "jobsets"), ("create", "roles")}
    code, found = await told(cluster, tmp_path, "--workers-namespace=elsewhere")
    assert code == 1
    assert {name for name, row in found.items() if not row["ok"]} == {
        *("kubernetes version", "kind: JobSet", "nodes", "namespace elsewhere", "permissions"),
        *("permissions for workers", "secrets of workers"),
    }
    workers = found["permissions for workers"]["found"]
    assert workers == "may not create roles.rbac.authorization.k8s.io"
    assert "rollout.keda.enabled" in found["kind: KEDA"]["remedy"]
    assert found["gpus"]["found"] == "0 on 0 nodes"
    assert "gVisor" in found["runtime classes"]["remedy"]
    told_of = found["permissions"]["found"]
    assert told_of == "may not create roles.rbac.authorization.k8s.io, jobsets.jobset.x-k8s.io"
    assert found["namespace elsewhere"]["remedy"] == "kubectl create namespace elsewhere"


@pytest.mark.parametrize("level", ["restricted", "privileged"])
async def test_a_namespace_that_would_refuse_workers_is_named(tmp_path, level):
    cluster = whole()
    labels = {"pod-security.kubernetes.io/enforce": level}
    cluster.pages[f"/api/v1/namespaces/{SPACE}"] = named(SPACE, labels=labels)
    code, found = await told(cluster, tmp_path)
    row = found[f"namespace {SPACE}"]
    assert (code, row["ok"]) == ((1, False) if level == "restricted" else (0, True))
    assert ("sandbox.workersNamespace" in row["remedy"]) is (level == "restricted")


async def test_pods_that_no_policy_shuts_off_are_found(tmp_path):
    cluster = whole()
    for name, app in (("dataset-1", "regreen"), ("worker-1", "regreen-sandbox"), ("other", "x")):
        labels = {"app.kubernetes.io/name": app}
        container = {"name": "c", "image": "i", "securityContext": {}}
        pod = named(name, labels=labels, spec={"containers": [container]})
        await cluster.create("pods", pod)
    path = f"/apis/networking.k8s.io/v1/namespaces/{SPACE}/networkpolicies"
    selector = {"matchLabels": {"app.kubernetes.io/name": "regreen"}}
    cluster.pages[path] = [
        named("default", spec={"podSelector": selector, **DENY}),
        named("one way", spec={"podSelector": {}, "policyTypes": ["Ingress"]}),
    ]
    code, found = await told(cluster, tmp_path)
    assert (code, found["network of services"]["ok"]) == (1, True)
    assert found["network of services"]["found"] == "1 of 1 pods are shut off by default"
    assert found["network of workers"]["ok"] is False
    assert "worker-1" in found["network of workers"]["remedy"]


async def test_what_may_not_be_looked_at_is_neither_well_nor_a_fault(tmp_path):
    cluster = whole()
    cluster.forbidden = {"/api/v1/nodes", "/apis/apps/v1/namespaces/kube-system/daemonsets"}
    code, found = await told(cluster, tmp_path)
    assert code == 0
    assert found["nodes"]["ok"] is found["network plugin"]["ok"] is None
    assert "may not look" in found["nodes"]["found"]
    assert "may not look" in found["network plugin"]["found"]
    assert found["permissions"]["ok"] is True


async def test_what_the_values_name_and_is_not_there_is_told(tmp_path):
    cluster = whole()
    cluster.pages[OF_SECRETS] = [named(name) for name in SECRETS if name != "regreen-judge-tls"]
    cluster.pages[OF_CLAIMS] = [claim("data-0", "ReadWriteOnce")]
    cluster.pages[OF_CLASSES] = [named("fast", provisioner="ebs.csi.aws.com")]
    cluster.pages[f"/apis/{KUEUE}/namespaces/{SPACE}/localqueues"] = [named("others")]
    code, found = await told(cluster, tmp_path)
    assert code == 0, "values may say other names"
    unknown = ("secrets", "secrets of workers", "model claim", "shared storage")
    assert [found[name]["ok"] for name in unknown] == [None] * 4
    assert found["secrets"]["found"] == f"not in {SPACE}: regreen-judge-tls"
    assert "security.tls.secretPrefix" in found["secrets"]["remedy"]
    lacking = found["secrets of workers"]["found"]
    assert lacking == f"not in {SPACE}: regreen-sandbox-worker-tls"
    assert found["shared storage"]["found"] == "none that is known for it (classes: fast)"
    assert "storage.model.existingClaim" in found["model claim"]["remedy"]
    assert found["queue"]["found"] == f"no LocalQueue regreen in {SPACE}"
    assert "rl-large" in found["queue"]["remedy"]


async def test_names_that_may_not_be_listed_are_unknown(tmp_path):
    cluster = whole()
    cluster.forbidden = {OF_SECRETS, OF_CLAIMS, OF_CLASSES}
    code, found = await told(cluster, tmp_path)
    assert code == 0
    for name in ("secrets", "secrets of workers", "shared storage", "claims"):
        assert found[name]["ok"] is None
        assert "may not look" in found[name]["found"]


async def test_a_cluster_that_does_not_answer_is_one_line(tmp_path):
    config = tmp_path / "kubeconfig"
    cluster = whole()
    async with kube.running(cluster, config):
        pass
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "regreen.cli", "doctor", "--kube", "--json"),
        f"--kubeconfig={config}",
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    (row,) = map(json.loads, out.decode().splitlines())
    assert (process.returncode, row["name"], row["ok"]) == (1, "kubernetes api", False)


@pytest.mark.parametrize("text", ["{:", "3", "{}", "{current-context: a, contexts: [1]}"])
async def test_a_configuration_of_another_form_is_one_line(tmp_path, text):
    config = tmp_path / "kubeconfig"
    config.write_text(text)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "regreen.cli", "doctor", "--kube", "--json"),
        f"--kubeconfig={config}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    told = (out + errors).decode()
    assert process.returncode == 1, told
    assert "no usable cluster configuration" in told
    assert "set KUBECONFIG or give --kubeconfig" in told
    assert "Traceback" not in told


async def test_options_of_a_cluster_without_it_are_refused():
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "regreen.cli", "doctor", "--namespace", "x"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert "--kube" in errors.decode()
