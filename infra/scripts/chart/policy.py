"""What is wrong with the objects of a release, or with those that a front makes.

- Each rule yields what breaks it, in words that name object, field and remedy (objects.py).
- Rules for pods, network policies and roles have files of their own; here is what objects owe to
  each other.
"""

from collections.abc import Callable, Iterator

from chart.alerts import check_expressions
from chart.amounts import check_amounts
from chart.budgets import check_budgets
from chart.objects import Object, check_kind, fronts, label, labels_of, matches, pods_of
from chart.pods import check_pod
from chart.rights import check_rights
from chart.tokens import check_certificates, check_tokens
from chart.walls import check_network

_OF_CLUSTERS = ("ClusterRole", "ClusterRoleBinding", "Namespace", "PriorityClass")
_SELECTING = ("DaemonSet", "Deployment", "StatefulSet")
_UNCOUNTED = ("CronJob", "DaemonSet", "Job", "Pod")
"""Kinds whose pods no budget for disruptions keeps up."""


def check_fleet(objects: list[Object]) -> Iterator[str]:
    """What is wrong with the objects that a front makes for its workers."""
    for obj in objects:
        yield from check_kind(obj)
        for template in pods_of(obj):
            yield from check_pod(label(obj), template, fleet_worker=True)


def check_release(objects: list[Object]) -> Iterator[str]:
    """What is wrong with the objects of a release as a whole."""
    pods = []
    for obj in objects:
        if not obj["metadata"].get("namespace") and obj["kind"] not in _OF_CLUSTERS:
            yield f"{label(obj)}: metadata has no namespace: give the release's"
        yield from check_kind(obj)
        yield from check_amounts(label(obj), (obj.get("spec") or {}).get("resources") or {})
        for template in pods_of(obj):
            yield from check_pod(label(obj), template)
            pods.append((obj, template))
    for obj, template in pods:
        yield from check_guarded(obj, labels_of(template), objects)
    yield from check_selectors(objects)
    yield from check_budgets(objects)
    yield from check_services(objects, pods)
    yield from check_references(objects, pods)
    yield from check_workers(objects, pods)
    yield from check_tokens(pods)
    yield from check_certificates(pods)
    yield from check_rights(objects)
    for kind, check in _OF_KINDS.items():
        for obj in (obj for obj in objects if obj["kind"] == kind):
            yield from check(obj)


def check_guarded(obj: Object, labels: Object, objects: list[Object]) -> Iterator[str]:
    """Each pod is shut off by default, and what stays up has a budget for disruptions."""
    space = obj["metadata"].get("namespace")

    def selecting(kind: str, field: str) -> list[Object]:
        return [
            one
            for one in objects
            if one["kind"] == kind
            and one["metadata"].get("namespace") == space
            and matches(one["spec"].get(field), labels)
        ]

    if not any(shuts_off(wall) for wall in selecting("NetworkPolicy", "podSelector")):
        yield f"{label(obj)}: no network policy shuts it off: let one of both policyTypes do so"
    budgets = len(selecting("PodDisruptionBudget", "selector"))
    if obj["kind"] not in _UNCOUNTED and budgets != 1:
        yield f"{label(obj)}: has {budgets} disruption budgets: let one select its pods"


def shuts_off(wall: Object) -> bool:
    """Whether a network policy closes both directions."""
    return set(wall["spec"].get("policyTypes") or ()) == {"Ingress", "Egress"}


def check_workers(objects: list[Object], pods: list[tuple[Object, Object]]) -> Iterator[str]:
    """Workers, which a front makes and no release holds, are shut off where they will be."""
    for obj, template in pods:
        for workers in fronts(template):
            if not any(
                shuts_off(one)
                for one in objects
                if one["kind"] == "NetworkPolicy"
                and one["metadata"].get("namespace") == workers.namespace
                and matches(one["spec"].get("podSelector"), workers.labels)
            ):
                yield (
                    f"{label(obj)}: no network policy shuts its workers off:"
                    " let one of both policyTypes do so in their namespace"
                )


def check_selectors(objects: list[Object]) -> Iterator[str]:
    """What makes pods selects those that it makes."""
    for obj in objects:
        spec = obj.get("spec") or {}
        if obj["kind"] in _SELECTING and not matches(
            spec["selector"], spec["template"]["metadata"].get("labels") or {}
        ):
            yield f"{label(obj)}: selector does not select its own pods: name their labels"


def check_services(objects: list[Object], pods: list[tuple[Object, Object]]) -> Iterator[str]:
    """Services lead to ports that pods have; gRPC ones are headless; monitors find a port."""
    services = [obj for obj in objects if obj["kind"] == "Service"]
    for service in services:
        spec = service["spec"]
        if (kind := spec.get("type", "ClusterIP")) != "ClusterIP" or spec.get("externalIPs"):
            yield f"{label(service)}: type is {kind}, open beyond the cluster: use ClusterIP alone"
        behind = [
            {port["containerPort"] for c in t["spec"]["containers"] for port in c.get("ports", [])}
            for _, t in pods
            if spec["selector"].items() <= labels_of(t).items()
        ]
        if len(behind) != 1:
            yield f"{label(service)}: selector finds {len(behind)} workloads: let it select one"
        for port in spec["ports"]:
            if behind and port["targetPort"] not in behind[0]:
                at = f"{label(service)}: ports[{port['name']}].targetPort"
                yield f"{at}: nothing listens on {port['targetPort']}: name a port of the pod"
        grpc = any(port["name"] == "grpc" for port in spec["ports"])
        if grpc and spec.get("clusterIP") != "None":
            yield f"{label(service)}: clusterIP is not None, it is not headless: set it to None"
    for monitor in (obj for obj in objects if obj["kind"] == "ServiceMonitor"):
        found = [
            s for s in services if matches(monitor["spec"]["selector"], s["metadata"]["labels"])
        ]
        names = {port["name"] for service in found for port in service["spec"]["ports"]}
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        if len(found) != 1 or not wanted <= names:
            at = f"{label(monitor)}: selector finds {len(found)} services"
            yield f"{at} with ports {sorted(wanted)}: let it find one that has them"


def check_references(objects: list[Object], pods: list[tuple[Object, Object]]) -> Iterator[str]:
    """What pods and scalers name of the release is in it."""
    there = {(obj["kind"], obj["metadata"]["name"]) for obj in objects}
    for obj, template in pods:
        spec = template["spec"]
        wanted = [("ServiceAccount", spec.get("serviceAccountName"))]
        wanted += [
            ("ConfigMap", (volume.get("configMap") or {}).get("name"))
            for volume in spec.get("volumes") or []
        ]
        for kind, name in wanted:
            if name and (kind, name) not in there:
                yield f"{label(obj)}: there is no {kind} {name}: name one of the release"
    for obj in objects:
        spec = obj.get("spec") or {}
        if not (target := spec.get("scaleTargetRef")):
            continue
        named = (target.get("kind", "Deployment"), target["name"])
        if named not in there:
            at = f"{label(obj)}: scaleTargetRef is {'/'.join(named)}"
            yield f"{at}, which is not there: name an object of the release"
        for least, most in (("minReplicas", "maxReplicas"), ("minReplicaCount", "maxReplicaCount")):
            if spec.get(least, 0) > spec.get(most, spec.get(least, 0)):
                yield f"{label(obj)}: {least} is above {most}: raise the latter"


_OF_KINDS: dict[str, Callable[[Object], Iterator[str]]] = {
    "NetworkPolicy": check_network,
    "PrometheusRule": check_expressions,
}
"""Rules for one object of a kind."""
