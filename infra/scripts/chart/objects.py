"""Objects as rules see them: their names, kinds, pods and selectors.

- A finding reads `OBJECT: FIELD is so: REMEDY`.
- Pods are found by what they are, not by the kind around them: whatever holds `containers`.
- A kind that is not in the table is one that no rule has looked at; that is a finding by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

_KINDS = {
    "": {"ConfigMap", "Namespace", "PersistentVolumeClaim", "Pod", "Service", "ServiceAccount"},
    "apps": {"DaemonSet", "Deployment", "StatefulSet"},
    "autoscaling": {"HorizontalPodAutoscaler"},
    "batch": {"CronJob", "Job"},
    "extensions.agents.x-k8s.io": {"SandboxClaim", "SandboxTemplate", "SandboxWarmPool"},
    "jobset.x-k8s.io": {"JobSet"},
    "keda.sh": {"ScaledObject"},
    "leaderworkerset.x-k8s.io": {"LeaderWorkerSet"},
    "monitoring.coreos.com": {"PodMonitor", "PrometheusRule", "ServiceMonitor"},
    "networking.k8s.io": {"NetworkPolicy"},
    "policy": {"PodDisruptionBudget"},
    "postgresql.cnpg.io": {"Cluster"},
    "rbac.authorization.k8s.io": {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"},
    "scheduling.k8s.io": {"PriorityClass"},
}
"""Kinds by API group for which the rules are enough."""


def label(obj: Object) -> str:
    """How an object is named in messages."""
    return f"{obj['kind']}/{obj['metadata']['name']}"


def check_kind(obj: Object) -> Iterator[str]:
    """The rules know what an object of this kind may do."""
    group = obj["apiVersion"].rpartition("/")[0]
    if obj["kind"] not in _KINDS.get(group, ()):
        yield (
            f"{label(obj)}: kind {obj['kind']} of {obj['apiVersion']} is known to no rule:"
            " see what it may do, and add it to infra/scripts/chart/objects.py"
        )


def pods_of(at: Any) -> Iterator[Object]:
    """The templates of all pods in an object, at any depth: metadata and spec."""
    if isinstance(at, list):
        for one in at:
            yield from pods_of(one)
    elif isinstance(at, dict):
        spec = at.get("spec")
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            yield {"metadata": at.get("metadata") or {}, "spec": spec}
        elif isinstance(at.get("containers"), list):
            yield {"metadata": {}, "spec": at}
        else:
            for one in at.values():
                yield from pods_of(one)


@dataclass(frozen=True, slots=True)
class Workers:
    """Pods that a front makes and no release holds."""

    namespace: str
    labels: Object
    number: int


def fronts(template: Object) -> Iterator[Workers]:
    """What the fronts in a pod make, by their arguments and settings."""
    for container in template["spec"]["containers"]:
        words = [str(word).partition("=") for word in container.get("args") or ()]
        said = {flag: value for flag, _, value in words if flag.startswith("--kube-")}
        if "--kube-name" not in said:
            continue
        env = {entry["name"]: entry.get("value") for entry in container.get("env") or ()}
        labels = {
            "app.kubernetes.io/name": "regreen-sandbox",
            "app.kubernetes.io/managed-by": "regreen",
            "regreen.dev/instance": said["--kube-name"],
        }
        number = int(env.get("REGREEN_SANDBOX__KUBE_WORKERS") or 2)  # the setting's default
        yield Workers(said.get("--kube-namespace", ""), labels, number)


def labels_of(template: Object) -> Object:
    """The labels of a pod."""
    return template["metadata"].get("labels") or {}


def matches(selector: Object | None, labels: Object) -> bool:
    """Whether a label selector selects labels; an empty one selects all."""
    selector = selector or {}
    return all(labels.get(k) == v for k, v in (selector.get("matchLabels") or {}).items()) and all(
        _holds(one, labels.get(one["key"])) for one in selector.get("matchExpressions") or []
    )


def _holds(expression: Object, value: Any) -> bool:
    operator = expression["operator"]
    if operator in ("Exists", "DoesNotExist"):
        return (value is not None) is (operator == "Exists")
    return (value in expression["values"]) is (operator == "In")


def names_some(selector: Object | None) -> bool:
    """Whether a selector selects by a value; by a key alone or a negation it may select all."""
    selector = selector or {}
    chosen = [one for one in selector.get("matchExpressions") or [] if one["operator"] == "In"]
    return bool(selector.get("matchLabels") or chosen)
