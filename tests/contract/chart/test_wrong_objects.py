"""Deliberately wrong objects, as an overlay could make them, each found by what should find it.

- `API` are caught by the schemas of the API and of CRDs, all others by the rules for pods, network
  policies and roles, which look at nothing that a schema refuses.
- A finding names object, field and remedy. What is put into a good object is its only fault.
"""

import copy
from typing import Any

import pytest

from tests.contract.chart.wrong_walls import (
    DEFAULT,
    NOBODY,
    RIGHTS,
    WALL,
    WALLS,
    WORKERS,
    into,
    name,
    out,
)
from tests.fixtures import chart

D = "Deployment/regreen-judge"
ROLLOUT = "Deployment/regreen-rollout"
FRONT = "Deployment/regreen-sandbox"
S = "Service/regreen-judge"
SGLANG = "StatefulSet/regreen-sglang"
BUDGET = "PodDisruptionBudget/regreen-judge"


DATABASE = "Cluster/regreen-postgres"
SCALER = "HorizontalPodAutoscaler/regreen-judge"
KEDA = "ScaledObject/regreen-rollout"
BUDGET_OF_WORKERS = "PodDisruptionBudget/regreen-workers"
HOST = {"name": "home", "hostPath": {"path": "/"}}
TOKEN = {"name": "home", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
DRIVER = {"name": "home", "csi": {"driver": "hostpath.csi.k8s.io"}}
TOKENS = {"name": "home", "secret": {"secretName": "regreen-client-tokens"}}
PROJECTED = {
    "name": "home",
    "projected": {"sources": [{"secret": {"name": "regreen-client-tokens"}}]},
}
OF_JUDGE = {
    "matchLabels": {
        **{"app.kubernetes.io/name": "regreen", "app.kubernetes.io/instance": "regreen"},
        "app.kubernetes.io/component": "judge",
    }
}


ALL = {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}
POD = "spec.template.spec"
SEC = f"{POD}.securityContext"
C = f"{POD}.containers.0"
CSEC = f"{C}.securityContext"
SHM = f"{POD}.volumes.4.emptyDir.sizeLimit"
TLS = {"name": "home", "secret": {"secretName": "regreen-policy-tls"}}
OWN_TLS = {"name": "home", "secret": {"secretName": "another-judge-tls"}}
ONE_TLS = {"name": "home", "projected": {"sources": [{"secret": {"name": "regreen-policy-tls"}}]}}
RANK = "spec.replicatedJobs.0.template.spec.template.spec.containers.0"


def by_reference(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]


API = [
    ("string replicas", D, "spec.replicas", "two", "is not of type"),
    ("unknown field", D, f"{POD}.hostNetwrk", True, "hostNetwrk"),
    ("unknown field of a JobSet", "JobSet/regreen-learner", "spec.maxRestarts", 1, "maxR"),
    ("no such probe", D, f"{C}.readinessProbe", {"grcp": {}}, "grcp"),
    ("unknown kind", D, "kind", "Deploiment", "no schema"),
    ("old API", BUDGET, "apiVersion", "policy/v1beta1", "no sc"),
]
PODS = [
    ("privileged pod", D, f"{CSEC}.privileged", True, "judge: securityContext.privileged"),
    ("privileged rank", "JobSet/regreen-learner", f"{RANK}.securityContext.privileged", True,
     "learner: securityContext.privileged"),
    ("root", D, f"{SEC}.runAsUser", 0, "securityContext.runAsUser is 0"),
    ("perhaps root", D, f"{SEC}.runAsUser", None, "securityContext.runAsUser is missing"),
    ("root by the container", D, f"{CSEC}.runAsUser", 0, "judge: securityContext.runAsUser is 0"),
    ("not surely no root", D, f"{SEC}.runAsNonRoot", None, "securityContext.runAsNonRoot"),
    ("root for all it says", D, f"{CSEC}.runAsNonRoot", False, "judge: securityContext.runAsNonR"),
    ("group of root", D, f"{SEC}.runAsGroup", 0, "securityContext.runAsGroup is 0"),
    ("perhaps group of root", D, f"{SEC}.runAsGroup", None, "securityContext.runAsGroup is miss"),
    ("group by the container", D, f"{CSEC}.runAsGroup", 0, "judge: securityContext.runAsGroup"),
    ("volumes of root's group", D, f"{SEC}.fsGroup", 0, "securityContext.fsGroup is 0"),
    ("one more group", D, f"{SEC}.supplementalGroups", [5, 0], "securityContext.supplementalGroup"),
    ("capability", D, f"{CSEC}.capabilities.add", ["NET_RAW"], "securityContext.capabilities"),
    ("escalation", D, f"{CSEC}.allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
    ("writable root", D, f"{CSEC}.readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
    ("no seccomp", D, f"{SEC}.seccompProfile", None, "securityContext.seccompProfile is missing"),
    ("seccomp off", D, f"{SEC}.seccompProfile", {"type": "Unconfined"}, "seccompProfile is Unconf"),
    ("seccomp off by the container", D, f"{CSEC}.seccompProfile", {"type": "Unconfined"},
     "judge: securityContext.seccompProfile is Unconfined"),
    ("AppArmor off", D, f"{CSEC}.appArmorProfile", {"type": "Unconfined"}, "appArmorProfile is Un"),
    ("SELinux off", D, f"{CSEC}.seLinuxOptions", {"type": "spc_t"}, "securityContext.seLinuxOpti"),
    ("process of the host", D, f"{CSEC}.windowsOptions", {"hostProcess": True}, "hostProcess"),
    ("unmasked /proc", D, f"{CSEC}.procMount", "Unmasked", "procMount does not mask /proc"),
    ("sysctl of the node", D, f"{SEC}.sysctls", [{"name": "kernel.msgmax", "value": "1"}],
     "securityContext.sysctls has kernel.msgmax"),
    ("host network", D, f"{POD}.hostNetwork", True, "hostNetwork"),
    ("processes of the host", D, f"{POD}.hostPID", True, "hostPID"),
    ("IPC of the host", D, f"{POD}.hostIPC", True, "hostIPC"),
    ("processes of each other", D, f"{POD}.shareProcessNamespace", True, "shareProcessNamespace"),
    ("host port", D, f"{C}.ports.0.hostPort", 50054, "of the host"),
    ("hostPath", D, f"{POD}.volumes.0", HOST, "volumes[home] is a hostPath"),
    ("driver of the node", D, f"{POD}.volumes.0", DRIVER, "volumes[home] is a csi"),
    ("tokens of all", D, f"{POD}.volumes.4.secret.items", None,
     "volumes[token] has the tokens of all parts: give items with this part's own"),
    ("token of another", D, f"{POD}.volumes.4.secret.items", [{"key": "driver", "path": "token"}],
     "volumes[token] has the tokens ['driver'], not this part's own"),
    ("one token more", D, f"{POD}.volumes.4.secret.items",
     [{"key": "judge", "path": "token"}, {"key": "operator", "path": "operator"}],
     "volumes[token] has the tokens ['judge', 'operator']"),
    ("tokens of all elsewhere", FRONT, f"{POD}.volumes.0", TOKENS, "volumes[home] has the tokens"),
    ("tokens of all, projected", FRONT, f"{POD}.volumes.0", PROJECTED, "volumes[home] has the tok"),
    ("tokens by variables", D, f"{C}.envFrom", [{"secretRef": {"name": "regreen-client-tokens"}}],
     "judge: env has tokens: mount the part's own"),
    ("another's certificate", D, f"{POD}.volumes.0", TLS,
     "volumes[home] has the certificate regreen-policy-tls: mount this part's own"),
    ("another's certificate, projected", FRONT, f"{POD}.volumes.0", ONE_TLS,
     "volumes[home] has the certificate regreen-policy-tls"),
    ("certificate by variables", ROLLOUT, f"{C}.envFrom",
     [{"secretRef": {"name": "regreen-sandbox-worker-tls"}}], "worker: env has the certificate"),
    ("volume that nobody mounts", D, f"{C}.volumeMounts", [], "volumes[home] is not both"),
    ("token", D, f"{POD}.automountServiceAccountToken", True, "automountServiceAccountToken"),
    ("token by a volume", D, f"{POD}.volumes.0", TOKEN, "volumes[home] has a serviceAccountToken"),
    ("links", D, f"{POD}.enableServiceLinks", None, "enableServiceLinks"),
    ("tag", D, f"{C}.image", "regreen-dataset:latest", "no digest"),
    ("secret in plain sight", D, f"{C}.env", [{"name": "X_KEY", "value": "s"}],
     "env X_KEY is in plain sight: use a mounted file"),
    ("credentials in plain sight", D, f"{C}.env", [{"name": "my_creds", "value": "s"}], "my_creds"),
    ("secret in a URL", D, f"{C}.env", [{"name": "PROXY", "value": "http://me:word@proxy"}],
     "env PROXY is in plain sight"),
    ("secret among options", D, f"{C}.env", [{"name": "OPTS", "value": "-v --api-key=s"}],
     "env OPTS is in plain sight"),
    ("rank of another", D, f"{C}.env", [{"name": "MASTER_ADDR", "value": "x"}],
     "env MASTER_ADDR is for a launcher"),
    ("keys written down", D, f"{C}.env", [{"name": "SSLKEYLOGFILE", "value": "/tmp/x"}],
     "env SSLKEYLOGFILE is for a launcher or a debugger"),
    ("secret setting by reference", D, f"{C}.env", by_reference("REGREEN_JUDGE__X"),
     "env REGREEN_JUDGE__X is a secret by secretKeyRef: use a mounted file"),
    ("secret by reference", D, f"{C}.env", by_reference("API_PASS"), "env API_PASS is a secret by"),
    ("missing limit", D, f"{C}.resources.limits.memory", None, "no limit of memory"),
    ("no resources", D, f"{C}.resources", None, "no request of cpu"),
    ("limit of nothing", D, f"{C}.resources.limits.memory", "0", "limits.memory is 0: give"),
    ("limit of nothing, with a unit", D, f"{C}.resources.limits.ephemeral-storage", "0.0Gi",
     "limits.ephemeral-storage is 0.0Gi: give"),
    ("limit below nothing", D, f"{C}.resources.limits.cpu", "-1", "limits.cpu is -1"),
    ("request of nothing", D, f"{C}.resources.requests.cpu", 0, "requests.cpu is 0"),
    ("thousandths of a byte", D, f"{C}.resources.requests.memory", "512m",
     "requests.memory is 512m, not a whole number"),
    ("bytes for a program", D, f"{C}.resources", {"requests": {"cpu": 1, "memory": 8},
     "limits": {"memory": 8, "ephemeral-storage": "1Gi"}}, "limits.memory is 8, too little"),
    ("no such resource", D, f"{C}.resources.limits.cpus", 2, "limits.cpus is nothing that a node"),
    ("half a device", D, f"{C}.resources.limits",
     {"memory": "2Gi", "ephemeral-storage": "2Gi", "example.org/fpga": "0.5"},
     "limits.example.org/fpga is 0.5, not a whole number"),
    ("more devices than asked for", SGLANG, f"{C}.resources.requests",
     {"cpu": 1, "memory": "1Gi", "nvidia.com/gpu": "2"}, "nvidia.com/gpu is not its limit"),
    ("no quantity", D, f"{C}.resources.limits.memory", "2GiB", "limits.memory: '2GiB' is no quan"),
    ("request above its limit", D, f"{C}.resources.requests.memory", "64Gi",
     "judge: resources.requests.memory is 64Gi, above the limit of 2Gi: raise"),
    ("request of a pod", D, f"{POD}.resources", {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}},
     "resources.requests.cpu is 2, above the limit of 1"),
    ("request of the database", DATABASE, "spec.resources.requests.memory", "1Ti",
     "resources.requests.memory is 1Ti"),
    ("claim of nothing", "PersistentVolumeClaim/regreen-shared", "spec.resources.requests.storage",
     "0", "resources.requests.storage is 0"),
    ("no shm", SGLANG, SHM, "0", "volumes[shm].emptyDir.sizeLimit is 0"),
    ("shm without a bound", SGLANG, SHM, None, "volumes[shm] takes memory without a sizeLimit"),
    ("shm above the limit", SGLANG, SHM, "9Ti", "volumes[shm].emptyDir.sizeLimit is 9Ti, above"),
    ("no probe", D, f"{C}.livenessProbe", None, "no livenessProbe"),
    ("probe by gRPC", D, f"{C}.readinessProbe", {"grpc": {"port": 50054}}, "by HTTP"),
    ("no certificate, probe by HTTP", D, f"{C}.args", [], "by gRPC"),
    ("probe of no port", D, f"{C}.readinessProbe.httpGet.port", 9999,
     "judge: readinessProbe.httpGet.port is 9999, which the container does not declare"),
    ("probe of no such name", D, f"{C}.livenessProbe.httpGet.port", "web",
     "judge: livenessProbe.httpGet.port is web"),
    ("start by no port", D, f"{C}.startupProbe", {"tcpSocket": {"port": 1}}, "startupProbe.tcpSo"),
    ("probe of another host", D, f"{C}.readinessProbe.httpGet.host", "10.0.0.1",
     "readinessProbe.httpGet.host is 10.0.0.1"),
    ("end by no port", D, f"{C}.lifecycle", {"preStop": {"httpGet": {"port": 1}}},
     "lifecycle.preStop.httpGet.port is 1"),
    ("no account", FRONT, f"{POD}.serviceAccountName", "x", "no ServiceAccount x"),
    ("no node is drained", BUDGET, "spec.maxUnavailable", 0, "maxUnavailable is 0, so that no nod"),
    ("no node is drained, in percent", BUDGET, "spec.maxUnavailable", "0%", "maxUnavailable is 0%"),
    ("all at once", BUDGET, "spec.maxUnavailable", "100%", "maxUnavailable is 100%, all at once"),
    ("all of them stay", BUDGET, "spec", {"minAvailable": 2, "selector": OF_JUDGE},
     "minAvailable is 2 of 2, so no node is ever drained: give fewer"),
    ("nearly all of them stay", BUDGET, "spec", {"minAvailable": "51%", "selector": OF_JUDGE},
     "minAvailable is 51% of 2"),
    ("all workers stay", BUDGET_OF_WORKERS, "spec.minAvailable", 2, "minAvailable is 2 of 2"),
    ("pods of another", D, "spec.selector", NOBODY, "selector does not select its own pods"),
    ("more least than most", SCALER, "spec.minReplicas", 9, "minReplicas is above maxReplicas"),
    ("more least by KEDA", KEDA, "spec.minReplicaCount", 65, "minReplicaCount is above maxRepl"),
    ("scale of no such kind", SCALER, "spec.scaleTargetRef.kind", "StatefulSet",
     "scaleTargetRef is StatefulSet/regreen-judge, which is not there"),
    ("scale of another kind", KEDA, "spec.scaleTargetRef.kind", "StatefulSet",
     "scaleTargetRef is StatefulSet/regreen-rollout, which is not there"),
    ("service to nowhere", S, "spec.ports.0.targetPort", 1, "nothing listens on 1"),
    ("virtual address", S, "spec.clusterIP", None, "headless"),
]  # fmt: skip
OF_OTHERS = [
    ("no budget", BUDGET, "spec.selector", NOBODY, f"{D}: has 0 disruption budgets"),
    ("no wall", DEFAULT, "spec.podSelector", NOBODY, f"{ROLLOUT}: no netw"),
    ("no wall of workers", WORKERS, "spec.podSelector", NOBODY, f"{FRONT}: no network polic"),
    ("half a wall of workers", WORKERS, "spec.policyTypes", ["Ingress"], f"{FRONT}: no network po"),
    ("their wall elsewhere", WORKERS, "metadata.namespace", "default", f"{FRONT}: no network poli"),
    ("wall around keys", DEFAULT, "spec.podSelector", name("a", "Exists"),
     f"{ROLLOUT}: no network"),
]  # fmt: skip
"""Faults of one object that are another's finding."""
GOOD = [
    ("word by reference", D, f"{C}.env", by_reference("MODEL_NAME")),
    ("probe by name", D, f"{C}.readinessProbe.httpGet.port", "metrics"),
    ("safe sysctl", D, f"{SEC}.sysctls", [{"name": "net.ipv4.tcp_fin_timeout", "value": "9"}]),
    ("a request as high as its limit", D, f"{C}.resources.requests.memory", "2097152Ki"),
    ("a namespace with all its pods", WALL, "spec.ingress",
     into({"namespaceSelector": NOBODY, "podSelector": {}})),
    ("one of some", WALL, "spec.ingress", into({"podSelector": name("a", "In", "b")})),
    ("a private network", WALL, "spec.ingress", into({"ipBlock": {"cidr": "10.0.0.0/8"}})),
    ("the workers' bucket in the cluster", WORKERS, "spec.egress",
     out({"ipBlock": {"cidr": "10.0.0.0/8"}}, 443)),
    ("names from the node", WORKERS, "spec.egress",
     out({"ipBlock": {"cidr": "169.254.20.10/32"}}, 53)),
    ("network around them without them", WORKERS, "spec.egress",
     out({"ipBlock": {"cidr": "169.0.0.0/8", "except": ["169.254.0.0/16"]}}, 443)),
    ("one of two stays", BUDGET, "spec", {"minAvailable": 1, "selector": OF_JUDGE}),
    ("half of them stay", BUDGET, "spec", {"minAvailable": "50%", "selector": OF_JUDGE}),
    ("its own certificate", D, f"{POD}.volumes.0", OWN_TLS),
    ("a device", D, f"{C}.resources.limits",
     {"memory": "2Gi", "ephemeral-storage": "2Gi", "example.org/fpga": "1"}),
    ("part of a block left out", WALL, "spec.ingress",
     into({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}})),
    ("a third at a time", BUDGET, "spec.maxUnavailable", "30%"),
    ("wall around all", DEFAULT, "spec.podSelector", {}),
]  # fmt: skip
FOUND = PODS + WALLS + RIGHTS


def pod(**faults: Any) -> dict[str, Any]:
    """A pod's template without a finding, but for what is given of its spec or container."""
    container = {
        **{"name": "one", "image": f"one@sha256:{'0' * 64}"},
        "command": faults.pop("command", ["one"]),
        "securityContext": {
            **{"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True},
            "capabilities": {"drop": ["ALL"]},
            **({"privileged": True} if faults.pop("privileged", False) else {}),
        },
        "resources": {
            "requests": {"cpu": "1", "memory": "1Gi"},
            "limits": {"memory": "1Gi", "ephemeral-storage": "1Gi"},
        },
        "volumeMounts": [{"name": "home", "mountPath": "/home"}],
    }
    spec = {
        **{"automountServiceAccountToken": False, "enableServiceLinks": False},
        **{"restartPolicy": "Always", "containers": [container]},
        "volumes": [{"name": "home", "emptyDir": {}}],
        "securityContext": {
            **{"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    return {"metadata": {"labels": labels()}, "spec": spec | faults}


def labels() -> dict[str, str]:
    name = "app.kubernetes.io"
    return {f"{name}/name": "regreen", f"{name}/instance": "regreen", f"{name}/component": "extra"}


def made(version: str, kind: str, **fields: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": "extra"}
    if kind != "ClusterRole":
        metadata["namespace"] = "regreen"
    return {"apiVersion": version, "kind": kind, "metadata": metadata} | fields


def daemons(**faults: Any) -> dict[str, Any]:
    selector = {"matchLabels": labels()}
    return made("apps/v1", "DaemonSet", spec={"selector": selector, "template": pod(**faults)})


def cron(**faults: Any) -> dict[str, Any]:
    template = pod(restartPolicy="Never", **faults)
    spec = {"schedule": "0 0 * * *", "jobTemplate": {"spec": {"template": template}}}
    return made("batch/v1", "CronJob", spec=spec)


def leaders(**faults: Any) -> dict[str, Any]:
    group = {"size": 2, "workerTemplate": pod(), "leaderTemplate": pod(**faults)}
    return made(
        *("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"),
        spec={"replicas": 1, "leaderWorkerTemplate": group},
    )


def alone(**faults: Any) -> dict[str, Any]:
    found = made("v1", "Pod", spec=pod(**faults)["spec"])
    found["metadata"]["labels"] = labels()
    return found


def role(kind: str, **fields: Any) -> dict[str, Any]:
    return made("rbac.authorization.k8s.io/v1", kind, **fields)


WORKLOADS = {"DaemonSet": daemons, "CronJob": cron, "LeaderWorkerSet": leaders, "Pod": alone}
ADDED = [
    (
        "service that says no port",
        alone(command=["python3", "-m", "judge_svc"]),
        "no livenessProbe",
    ),
    *(
        (f"{fault} {kind}", make(**faults), f"{kind}/extra: {says}")
        for kind, make in WORKLOADS.items()
        for fault, faults, says in (
            ("privileged", {"privileged": True}, "one: securityContext.privileged"),
            ("hostPath in a", {"volumes": [HOST]}, "volumes[home] is a hostPath"),
            ("host network of a", {"hostNetwork": True}, "hostNetwork is set"),
        )
    ),
    ("role of all", role("Role", rules=[ALL]), "Role/extra: rules[0].verbs has the wildcard"),
    ("role of all clusters", role("ClusterRole", rules=[ALL]), "ClusterRole/extra: rules[0].verbs"),
    (
        "role of all pages",
        role("ClusterRole", rules=[{"nonResourceURLs": ["/*"], "verbs": ["get"]}]),
        "ClusterRole/extra: rules[0].nonResourceURLs has the wildcard /*",
    ),
    (
        "role of others' rules",
        role("ClusterRole", rules=[], aggregationRule={"clusterRoleSelectors": [NOBODY]}),
        "ClusterRole/extra: aggregationRule",
    ),
    (
        "secret",
        made("v1", "Secret", stringData={"a": "b"}),
        "Secret/extra: kind Secret of v1 is kn",
    ),
    (
        "kind that no rule knows",
        made(
            *("apps/v1", "ReplicaSet"),
            spec={"selector": {"matchLabels": labels()}, "template": pod()},
        ),
        "ReplicaSet/extra: kind ReplicaSet of apps/v1 is known to no rule",
    ),
]
AMOUNTS = [
    ("cpu", "1", "1000m", False),
    ("cpu", "1001m", "1", True),
    ("cpu", "1.5", 1, True),
    ("cpu", "999999u", "1", False),
    ("cpu", "2000000001n", "2", True),
    ("memory", "2Gi", "2048Mi", False),
    ("memory", "2147483649", "2Gi", True),
    ("memory", "3e9", "2Gi", True),
    ("memory", "3G", "3Gi", False),
    ("memory", "3Gi", "3G", True),
    ("memory", "1E", "1Ei", False),
    ("ephemeral-storage", "1E3", "1k", False),
    ("memory", "1Pi", "1100T", True),
    ("ephemeral-storage", "2Ti", "1Ti", True),
    ("ephemeral-storage", "1.5Ki", "1536", False),
]
"""A request, its limit, and whether it is above."""


def case(target: str, path: str, value: Any) -> dict[str, Any]:
    base = "full" if target in (DATABASE, SCALER, KEDA) else "small"
    changes = [[target, path, value]]
    if target == DEFAULT:  # beside it a part has a wall of its own
        changes.append(["NetworkPolicy/regreen-rollout", "spec.podSelector", NOBODY])
    return {"values": chart.values(base), "mutate": changes}


def beside(obj: dict[str, Any]) -> dict[str, Any]:
    budget = made(
        "policy/v1", "PodDisruptionBudget",
        spec={"maxUnavailable": 1, "selector": {"matchLabels": labels()}},
    )  # fmt: skip
    return {"values": chart.values("small"), "add": [copy.deepcopy(obj), budget]}


@pytest.fixture(scope="module")
def answers(chart_tools: None) -> dict[str, dict]:
    """What became of every case, by name."""
    cases = {row[0]: case(*row[1:4]) for row in [*API, *FOUND, *OF_OTHERS, *GOOD]}
    cases |= {name: beside(obj) for name, obj, _ in ADDED}
    cases |= {kind: beside(make()) for kind, make in WORKLOADS.items()}
    for what, least, most, _ in AMOUNTS:
        sides = {"requests": {"cpu": "1m", "memory": 1}, "limits": {"ephemeral-storage": "1E"}}
        sides["limits"]["memory"] = "1Ei"
        sides["requests"][what], sides["limits"][what] = least, most
        cases[f"{what} {least} {most}"] = case(D, f"{C}.resources", sides)
    assert len(cases) == len([*API, *FOUND, *OF_OTHERS, *GOOD, *ADDED, *WORKLOADS, *AMOUNTS])
    return dict(zip(cases, chart.tried(list(cases.values())), strict=True))


def of(rows: list) -> list:
    return [pytest.param(*row, id=row[0]) for row in rows]


@pytest.mark.parametrize(("name", "says"), of([(row[0], row[-1]) for row in API]))
def test_what_the_api_refuses_is_found_by_its_schema(answers, name, says):
    answer = answers[name]
    assert not answer["refused"]
    assert any(says in line for line in answer["schema"]), answer["schema"]


ROWS = [(row[0], f"{row[1]}: ", row[-1]) for row in FOUND]
ROWS += [(row[0], "", row[-1]) for row in [*OF_OTHERS, *ADDED]]


@pytest.mark.parametrize(("name", "target", "says"), of(ROWS))
def test_a_wrong_object_is_found_with_its_field_and_a_remedy(answers, name, target, says):
    answer = answers[name]
    assert (answer["refused"], answer["schema"]) == ("", [])
    found = [line for line in answer["policy"] if line.startswith(target) and says in line]
    assert found, answer["policy"]
    for line in answer["policy"]:
        obj, _, rest = line.partition(": ")
        assert obj.count("/") == 1
        assert all(rest.rpartition(": ")[::2]), f"{line} has no remedy"


@pytest.mark.parametrize("name", [row[0] for row in GOOD] + list(WORKLOADS))
def test_what_is_like_it_and_right_has_no_finding(answers, name):
    answer = answers[name]
    assert (answer["refused"], answer["schema"], answer["policy"]) == ("", [], [])


@pytest.mark.parametrize(("what", "request_", "limit", "above"), AMOUNTS)
def test_amounts_are_compared_whatever_their_suffix(answers, what, request_, limit, above):
    found = answers[f"{what} {request_} {limit}"]["policy"]
    assert [line for line in found if "above" in line] == (found if above else [])
    assert bool(found) is above
