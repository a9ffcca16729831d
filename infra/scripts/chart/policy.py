"""What every pod that Regreen runs on a cluster has to keep to.

- Each rule yields what breaks it, in words that name object and field; no rule knows the chart.
- The rules of the pod security standard "restricted" are here, and more: read-only roots, limits,
  images by digest, probes, no token.
"""

import re
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]
_DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}
_OF_CLUSTERS = ("Namespace", "PriorityClass")
_SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET|DATABASE_URL)$")


def label(obj: Object) -> str:
    """How an object is named in messages."""
    return f"{obj['kind']}/{obj['metadata']['name']}"


def pods_of(obj: Object) -> list[Object]:
    """The templates of an object's pods: metadata and spec."""
    spec = obj.get("spec", {})
    kind = obj["kind"]
    if kind == "Pod":
        return [obj]
    if kind in ("Deployment", "StatefulSet", "Job"):
        return [spec["template"]]
    if kind == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"]["workerTemplate"]]
    if kind == "JobSet":
        return [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    if kind == "SandboxTemplate":
        return [spec["podTemplate"]]
    return []


def check_pod(name: str, spec: Object, *, fleet_worker: bool = False) -> Iterator[str]:
    """What is wrong with a pod; a worker of the fleet may mount a /proc of its own."""
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"{name}: {field} is set"
    for field in ("automountServiceAccountToken", "enableServiceLinks"):
        if spec.get(field) is not False:
            yield f"{name}: {field} is not false"
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield f"{name}: may run as root"
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name}: no seccomp profile"
    if fleet_worker and spec.get("hostUsers") is not False:
        yield f"{name}: has no user namespace"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for volume in spec.get("volumes", []):
        if kinds := set(volume) - {"name"} - _VOLUMES:
            yield f"{name}: volume {volume['name']} is a {', '.join(sorted(kinds))}"
    mounted = set()
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        yield from check_container(f"{name}: {container['name']}", container, fleet_worker)
        mounted |= {mount["name"] for mount in container.get("volumeMounts", [])}
    for odd in sorted(volumes ^ mounted):
        yield f"{name}: volume {odd} is not both there and mounted"


def check_container(name: str, container: Object, fleet_worker: bool) -> Iterator[str]:
    """What is wrong with a container."""
    if not _DIGEST.fullmatch(str(container.get("image", ""))):
        yield f"{name}: image {container.get('image')} has no digest"
    security = container.get("securityContext", {})
    if security.get("privileged"):
        yield f"{name}: is privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: may gain privileges"
    if security.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: root file system can be written"
    capabilities = security.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield f"{name}: keeps capabilities"
    if security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False:
        yield f"{name}: runs as root"
    if security.get("procMount", "Default") != "Default" and not fleet_worker:
        yield f"{name}: /proc is not masked"
    resources = container.get("resources", {})
    for amount in ("memory", "ephemeral-storage"):
        if amount not in resources.get("limits", {}):
            yield f"{name}: no limit of {amount}"
    for amount in ("cpu", "memory"):
        if amount not in resources.get("requests", {}):
            yield f"{name}: no request of {amount}"
    for port in container.get("ports", []):
        if "hostPort" in port:
            yield f"{name}: port {port['hostPort']} of the host"
    for entry in container.get("env", []):
        if _SECRET.search(entry["name"]) and "value" in entry:
            yield f"{name}: {entry['name']} is in plain sight"
    yield from check_probes(name, container)


def check_probes(name: str, container: Object) -> Iterator[str]:
    """What serves a port is probed; our own services by gRPC, or by HTTP where that shows none of
    the certificates that they ask for."""
    ours = any(str(word).endswith("_svc") for word in container.get("command", []))
    tls = any(str(word).startswith("--tls-cert") for word in container.get("args") or ())
    for probe in ("readinessProbe", "livenessProbe"):
        found = container.get(probe)
        if container.get("ports") and not found:
            yield f"{name}: no {probe}"
        elif ours and found and ("httpGet" if tls else "grpc") not in found:
            yield f"{name}: {probe} is not by {'HTTP' if tls else 'gRPC'}"


def matches(selector: Object | None, labels: Object) -> bool:
    """Whether a label selector without expressions selects labels."""
    wanted = (selector or {}).get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def check_release(objects: list[Object]) -> Iterator[str]:
    """What is wrong with the objects of a release as a whole."""
    pods = []
    for obj in objects:
        if not obj["metadata"].get("namespace") and obj["kind"] not in _OF_CLUSTERS:
            yield f"{label(obj)}: has no namespace"
        for template in pods_of(obj):
            yield from check_pod(label(obj), template["spec"])
            pods.append((obj, template))
    for obj, template in pods:
        yield from check_guarded(obj, template["metadata"].get("labels", {}), objects)
    yield from check_services(objects, pods)
    yield from check_references(objects, pods)
    for policy in (obj for obj in objects if obj["kind"] == "NetworkPolicy"):
        yield from check_network(policy)


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

    walls = selecting("NetworkPolicy", "podSelector")
    if not any(set(w["spec"].get("policyTypes", ())) == {"Ingress", "Egress"} for w in walls):
        yield f"{label(obj)}: no network policy shuts it off"
    budgets = len(selecting("PodDisruptionBudget", "selector"))
    if obj["kind"] not in ("Job", "Pod") and budgets != 1:
        yield f"{label(obj)}: has {budgets} disruption budgets"


def check_network(policy: Object) -> Iterator[str]:
    """A rule without peers lets everybody through."""
    for way, side in (("ingress", "from"), ("egress", "to")):
        for rule in policy["spec"].get(way, []):
            if not rule.get(side) or {} in rule[side]:
                yield f"{label(policy)}: {way} from or to anybody"


def check_services(objects: list[Object], pods: list[tuple[Object, Object]]) -> Iterator[str]:
    """Services lead to ports that pods have; gRPC ones are headless; monitors find a port."""
    services = [obj for obj in objects if obj["kind"] == "Service"]
    for service in services:
        spec = service["spec"]
        behind = [
            {port["containerPort"] for c in t["spec"]["containers"] for port in c.get("ports", [])}
            for _, t in pods
            if spec["selector"].items() <= t["metadata"].get("labels", {}).items()
        ]
        if len(behind) != 1:
            yield f"{label(service)}: selects {len(behind)} workloads"
        for port in spec["ports"]:
            if behind and port["targetPort"] not in behind[0]:
                yield f"{label(service)}: nothing listens on {port['targetPort']}"
        grpc = any(port["name"] == "grpc" for port in spec["ports"])
        if grpc and spec.get("clusterIP") != "None":
            yield f"{label(service)}: is not headless"
    for monitor in (obj for obj in objects if obj["kind"] == "ServiceMonitor"):
        found = [
            s for s in services if matches(monitor["spec"]["selector"], s["metadata"]["labels"])
        ]
        names = {port["name"] for service in found for port in service["spec"]["ports"]}
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        if len(found) != 1 or not wanted <= names:
            yield f"{label(monitor)}: finds {len(found)} services with {sorted(wanted)}"


def check_references(objects: list[Object], pods: list[tuple[Object, Object]]) -> Iterator[str]:
    """What pods and scalers name of the release is in it."""
    there = {(obj["kind"], obj["metadata"]["name"]) for obj in objects}
    own = {obj["metadata"]["name"] for obj in objects}
    for obj, template in pods:
        spec = template["spec"]
        wanted = [("ServiceAccount", spec.get("serviceAccountName"))]
        wanted += [
            ("ConfigMap", volume.get("configMap", {}).get("name")) for volume in spec["volumes"]
        ]
        for kind, name in wanted:
            if name and (kind, name) not in there:
                yield f"{label(obj)}: there is no {kind} {name}"
    for obj in objects:
        target = obj.get("spec", {}).get("scaleTargetRef")
        if target and target["name"] not in own:
            yield f"{label(obj)}: scales {target['name']}, which is not there"
