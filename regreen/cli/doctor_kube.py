"""`regreen doctor --kube`: what a cluster has of what the chart needs.

- It reads, and asks the API what its user may do; it changes nothing.
- What not every installation needs is told without being called wrong, with the value that asks
  for it. What may not be looked at is said to be so.
- Each look is one request or two; a cluster that does not answer is one line.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regreen import kube_config
from regreen.cli import doctor_kube_needs as needs
from regreen.cli.doctor import Finding
from regreen.rpc.errors import MissingDependency, RegreenError

OLDEST = (1, 33)
"""The first release with user namespaces of pods switched on."""
_CONFIGURE = "set KUBECONFIG or give --kubeconfig"
_DENY = {"Ingress", "Egress"}
_GPU = "nvidia.com/gpu"
_PLUGINS = ("cilium", "calico", "antrea", "kube-router", "canal", "ovnkube", "weave", "aws-node")
"""Network plugins that can enforce policies, by the names of their DaemonSets."""
_WALLS = ("gvisor", "runsc", "kata")
_REFUSING = ("baseline", "restricted")
_RIGHTS = "permissions for workers"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""What is asked for where nothing but names and labels is needed."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind that an operator brings."""

    name: str
    path: str
    plural: str
    asked_by: str
    """Value of the chart that needs it."""
    needed: bool = False
    """Whether the chart's defaults ask for it."""


KINDS = (
    Kind("JobSet", "jobset.x-k8s.io/v1alpha2", "jobsets", "learner.enabled", needed=True),
    Kind("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1", "leaderworkersets", "sglang.nodes > 1"),
    Kind("KEDA", "keda.sh/v1alpha1", "scaledobjects", "rollout.keda.enabled"),
    Kind("CloudNativePG", "postgresql.cnpg.io/v1", "clusters", "postgres.cnpg.enabled"),
    Kind("ServiceMonitor", "monitoring.coreos.com/v1", "servicemonitors", "monitoring.enabled"),
    Kind(
        "agent-sandbox",
        "extensions.agents.x-k8s.io/v1beta1",
        "sandboxclaims",
        "sandbox.settings.kube_api: agent-sandbox",
    ),
)
INSTALLS = (
    *(("apps", "deployments"), ("apps", "statefulsets"), ("batch", "jobs"), ("", "services")),
    *(("", "configmaps"), ("", "serviceaccounts"), ("", "persistentvolumeclaims")),
    *(("", "secrets"), ("policy", "poddisruptionbudgets")),
    *(("networking.k8s.io", "networkpolicies"), ("rbac.authorization.k8s.io", "roles")),
    *(("rbac.authorization.k8s.io", "rolebindings"), ("jobset.x-k8s.io", "jobsets")),
)
"""What `helm install` creates: groups and resources. Its releases are Secrets."""
OPTIONS = (
    ("autoscaling", "horizontalpodautoscalers", "dataset.autoscaling, judge.autoscaling"),
    ("keda.sh", "scaledobjects", "rollout.keda.enabled"),
    ("leaderworkerset.x-k8s.io", "leaderworkersets", "sglang.nodes > 1"),
    ("postgresql.cnpg.io", "clusters", "postgres.cnpg.enabled"),
    ("monitoring.coreos.com", "servicemonitors", "monitoring.enabled"),
    ("monitoring.coreos.com", "podmonitors", "monitoring.enabled"),
    ("monitoring.coreos.com", "prometheusrules", "monitoring.enabled"),
)
"""What it creates besides where a value asks for it: groups, resources, values."""
INSTALLS_FOR_WORKERS = (
    *(("networking.k8s.io", "networkpolicies"), ("policy", "poddisruptionbudgets")),
    *(("rbac.authorization.k8s.io", "roles"), ("rbac.authorization.k8s.io", "rolebindings")),
)
"""And in a namespace of the sandbox workers' own."""


class Denied(Exception):
    """The API does not let this user look."""


class Api:
    """Requests to a cluster, by the configuration that `kubectl` would use."""

    def __init__(self, kubeconfig: Path | None) -> None:
        """Read the configuration.

        Raises:
            MissingDependency: no client library, or no usable configuration.
        """
        found = kube_config.read(kubeconfig, _CONFIGURE)
        import httpx2
        from lightkube.config.client_adapter import AsyncClient, ConnectionParams

        with kube_config.using(_CONFIGURE):
            self._http = AsyncClient(found, ConnectionParams())
        self.server = str(found.cluster.server)
        self.namespace = str(found.namespace or "default")
        self._error = httpx2.HTTPError

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, accept: str = "application/json"
    ) -> dict[str, Any] | None:
        """What is at a path; None if nothing is.

        Raises:
            Denied: the user may not see it.
            RegreenError: no answer, or none that makes sense.
        """
        try:
            if body is None:
                answer = await self._http.get(path, headers={"Accept": accept})
            else:
                answer = await self._http.post(path, json=body)
        except self._error as error:
            raise RegreenError(f"{self.server}: {error or type(error).__name__}") from error
        if answer.status_code == 404:
            return None
        if answer.status_code == 403:
            raise Denied("this user may not look (403)")
        if answer.status_code >= 400:
            raise RegreenError(f"{self.server}{path} answers {answer.status_code}")
        try:
            found: dict[str, Any] = answer.json()
        except ValueError as error:
            raise RegreenError(f"{self.server}{path} answers no JSON") from error
        return found

    async def items(self, path: str, *, metadata_alone: bool = False) -> list[dict[str, Any]]:
        """The entries of a list, all pages of it; with `metadata_alone` nothing else of them.

        Raises:
            As `ask`.
        """
        found: list[dict[str, Any]] = []
        more = ""
        while True:
            accept = _METADATA if metadata_alone else "application/json"
            page = await self.ask(f"{path}?limit=500{more}", accept=accept) or {}
            found += page.get("items") or []
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return found
            more = f"&continue={token}"


async def look(
    kubeconfig: Path | None, namespace: str = "", workers_namespace: str = ""
) -> list[Finding]:
    """Everything that can be told of a cluster before and after the chart is installed."""
    try:
        api = Api(kubeconfig)
    except MissingDependency as error:
        return [Finding("kubernetes api", False, error.message)]
    space = namespace or api.namespace
    workers = workers_namespace or space
    try:
        version = await _version(api)
        if not version[0].ok:
            return version
        looks: list[tuple[str, Callable[[], Awaitable[Sequence[Finding]]]]] = [
            ("kinds", lambda: _kinds(api)),
            ("runtime classes", lambda: _runtime_classes(api)),
            ("nodes", lambda: _nodes(api)),
            (f"namespace {space}", lambda: _namespace(api, space, holds_workers=space == workers)),
            ("secrets", lambda: needs.secrets(api, space, needs.SECRETS, "secrets")),
            (
                "secrets of workers",
                lambda: needs.secrets(api, workers, needs.SECRETS_OF_WORKERS, "secrets of workers"),
            ),
            ("shared storage", lambda: needs.storage(api)),
            ("claims", lambda: needs.claims(api, space)),
            ("queue", lambda: needs.queue(api, space)),
            ("network policies", lambda: _network(api, space, workers)),
            ("network plugin", lambda: _plugin(api)),
            ("permissions", lambda: _permissions(api, space, INSTALLS)),
            ("permissions for options", lambda: _options(api, space)),
        ]
        if workers != space:
            apart = (f"namespace {workers}", lambda: _namespace(api, workers, holds_workers=True))
            looks.insert(4, apart)
            looks.append((_RIGHTS, lambda: _permissions(api, workers, INSTALLS_FOR_WORKERS)))
        found = list(version)
        for name, ask in looks:
            try:
                found += await ask()
            except Denied as error:
                found.append(Finding(name, None, str(error), "ask somebody who may"))
            except RegreenError as error:
                found.append(Finding(name, False, error.message, "try again"))
        return found
    finally:
        await api.close()


async def _version(api: Api) -> list[Finding]:
    remedy = "is it up, and is its certificate the one of the configuration?"
    try:
        told = await api.ask("/version") or {}
    except (Denied, RegreenError) as error:
        return [Finding("kubernetes api", False, str(error), remedy)]
    text = str(told.get("gitVersion", ""))
    parts = re.match(r"v(\d+)\.(\d+)", text)
    if parts is None:
        return [Finding("kubernetes api", False, f"{api.server} tells no version", remedy)]
    reached = Finding("kubernetes api", True, api.server)
    wanted = ".".join(map(str, OLDEST))
    new_enough = (int(parts[1]), int(parts[2])) >= OLDEST
    return [reached, Finding("kubernetes version", new_enough, text, f"use {wanted} or newer")]


async def _kinds(api: Api) -> list[Finding]:
    """By discovery, which every user may read; CRDs themselves few may."""
    found = []
    for kind in KINDS:
        listed = await api.ask(f"/apis/{kind.path}") or {}
        there = any(item.get("name") == kind.plural for item in listed.get("resources") or [])
        told = kind.path if there else f"not installed ({kind.path} is unknown)"
        remedy = "" if there else f"install it for {kind.asked_by}"
        found.append(Finding(f"kind: {kind.name}", there or not kind.needed, told, remedy))
    return found


async def _runtime_classes(api: Api) -> list[Finding]:
    names = {
        item["metadata"]["name"]: str(item.get("handler", ""))
        for item in await api.items("/apis/node.k8s.io/v1/runtimeclasses")
    }
    walls = [n for n, handler in names.items() if any(w in f"{n} {handler}" for w in _WALLS)]
    remedy = "install gVisor or Kata for an outer wall (sandbox.settings.kube_runtime_class)"
    told = ", ".join(sorted(names)) or "none"
    return [Finding("runtime classes", True, told, "" if walls else remedy)]


async def _nodes(api: Api) -> list[Finding]:
    nodes = await api.items("/api/v1/nodes")
    usable = [node for node in nodes if _is_usable(node)]
    gpus = [int(node["status"].get("allocatable", {}).get(_GPU, 0)) for node in usable]
    with_gpus = [count for count in gpus if count]
    told = f"{len(usable)} of {len(nodes)} take pods"
    remedy = "the learner and SGLang of the default values need GPUs; overlay dev needs none"
    return [
        Finding("nodes", bool(usable), told, "" if usable else "add or uncordon some"),
        Finding(
            "gpus",
            True,
            f"{sum(with_gpus)} on {len(with_gpus)} nodes",
            "" if with_gpus else remedy,
        ),
    ]


def _is_usable(node: Mapping[str, Any]) -> bool:
    conditions = {c["type"]: c["status"] for c in node.get("status", {}).get("conditions", [])}
    return conditions.get("Ready") == "True" and not node.get("spec", {}).get("unschedulable")


async def _namespace(api: Api, name: str, *, holds_workers: bool) -> list[Finding]:
    there = await api.ask(f"/api/v1/namespaces/{name}")
    if there is None:
        remedy = f"kubectl create namespace {name}"
        return [Finding(f"namespace {name}", False, "is not there", remedy)]
    labels = there["metadata"].get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce", "")
    told = f"pod security: {level or 'none enforced'}"
    if holds_workers and level in _REFUSING:
        remedy = "refuses workers (procMount); give them a namespace (sandbox.workersNamespace)"
        return [Finding(f"namespace {name}", False, told, remedy)]
    remedy = "" if holds_workers or level == "restricted" else "the services keep to restricted"
    return [Finding(f"namespace {name}", True, told, remedy)]


async def _network(api: Api, space: str, workers: str) -> list[Finding]:
    """Whether pods that run are shut off: those of the release, and the workers."""
    found = []
    for where, app, name in (
        (space, "regreen", "network of services"),
        (workers, "regreen-sandbox", "network of workers"),
    ):
        pods = [
            pod
            for pod in await api.items(f"/api/v1/namespaces/{where}/pods")
            if _labels(pod).get("app.kubernetes.io/name") == app
        ]
        policies = await api.items(f"/apis/networking.k8s.io/v1/namespaces/{where}/networkpolicies")
        walls = [one for one in policies if set(one["spec"].get("policyTypes", ())) == _DENY]
        bare = [pod for pod in pods if not any(_selects(one, pod) for one in walls)]
        told = f"{len(pods) - len(bare)} of {len(pods)} pods are shut off by default"
        names = ", ".join(pod["metadata"]["name"] for pod in bare[:3])
        remedy = f"not so {names}: install the chart's policies" if bare else ""
        found.append(Finding(name, not bare, told, remedy))
    return found


def _labels(pod: Mapping[str, Any]) -> Mapping[str, str]:
    return pod["metadata"].get("labels") or {}


def _selects(policy: Mapping[str, Any], pod: Mapping[str, Any]) -> bool:
    selector = policy["spec"].get("podSelector") or {}
    if selector.get("matchExpressions"):
        return False
    wanted = selector.get("matchLabels") or {}
    return bool(wanted.items() <= _labels(pod).items())


async def _plugin(api: Api) -> list[Finding]:
    """Policies are words where nothing enforces them; only the plugin's name can be seen."""
    names = [
        item["metadata"]["name"]
        for item in await api.items("/apis/apps/v1/namespaces/kube-system/daemonsets")
    ]
    known = sorted(name for name in names if any(plugin in name for plugin in _PLUGINS))
    told = ", ".join(known) or "none that is known in kube-system"
    return [
        Finding("network plugin", True, told, "see that it enforces network policies, and egress")
    ]


async def _permissions(api: Api, space: str, installs: Sequence[tuple[str, str]]) -> list[Finding]:
    """What the user of the configuration may do of what installing the chart takes."""
    lacking = await _lacking(api, space, installs)
    told_of = f"may not create {', '.join(lacking)}" if lacking else "may install the chart"
    remedy = f"in namespace {space}" if lacking else ""
    name = "permissions" if installs is INSTALLS else _RIGHTS
    return [Finding(name, not lacking, told_of, remedy)]


async def _options(api: Api, space: str) -> list[Finding]:
    """And of what values ask for that are off by default; lacking it is no fault by itself."""
    lacking = await _lacking(api, space, [(group, resource) for group, resource, _ in OPTIONS])
    asked = [v for g, r, v in OPTIONS if f"{r}.{g}" in lacking]
    told_of = f"may not create {', '.join(lacking)}" if lacking else "may create all"
    remedy = f"needed in namespace {space} for {', '.join(asked)}" if lacking else ""
    return [Finding("permissions for options", True, told_of, remedy)]


async def _lacking(api: Api, space: str, wanted: Sequence[tuple[str, str]]) -> list[str]:
    """What of these groups and resources this user may not create."""
    lacking = []
    for group, resource in wanted:
        asked = {"namespace": space, "verb": "create", "group": group, "resource": resource}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        told = await api.ask("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body) or {}
        if not told.get("status", {}).get("allowed"):
            lacking.append(f"{resource}.{group}" if group else resource)
    return lacking
