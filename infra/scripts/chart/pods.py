"""What every pod that Regreen runs on a cluster has to keep to.

- The rules of the pod security standard "restricted" are here, and more: read-only roots, limits,
  images by digest, probes, and one token.
- What a container says is held to the same rules as what its pod says: it is what counts.
- Only the sandbox front speaks to the Kubernetes API, so that only it may have a token.
"""

import re
from collections.abc import Iterable, Iterator

from chart.amounts import check_amounts, quantity
from chart.objects import Object, labels_of

_DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
_SECRET = re.compile(
    r"(KEYS?|KEY_ID|TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRETS?|CREDENTIALS?|CREDS|HEADERS"
    r"|DATABASE_URL|(^|_)PASS|(^|_)AUTH)$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"://[^/@]*:[^/@]*@")
_WORD = r"[a-z.]*(([a-z]+-)*api[_-]?key|(access[_-])?token|passw(or)?d|secret)"
_IN_VALUE = re.compile(rf"(^|[\s,;&?])(-{{0,2}}{_WORD}=|--{_WORD}\s+)\S", re.IGNORECASE)
"""As the chart refuses them in `env` (templates/checks.yaml)."""
_LAUNCHERS = {
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "SSLKEYLOGFILE",
}
"""Variables that say who else there is, which a launcher does, or write keys down."""
_VOLUMES = {
    *("configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}
_PROFILES = {"RuntimeDefault", "Localhost"}
_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ping_group_range"),
    *("net.ipv4.ip_local_reserved_ports", "net.ipv4.ip_unprivileged_port_start"),
    *("net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_keepalive_time"),
    *("net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes"),
}
"""Those that Kubernetes calls safe: they reach no other pod of the node."""
_TOKEN_FOR = {"app.kubernetes.io/name": "regreen", "app.kubernetes.io/component": "sandbox"}
"""Labels of the front, which makes and watches the workers."""


def check_pod(at: str, template: Object, *, fleet_worker: bool = False) -> Iterator[str]:
    """What is wrong with a pod; a worker of the fleet may mount a /proc of its own."""
    spec = template["spec"]
    for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if spec.get(field):
            yield f"{at}: {field} is set: leave it out"
    for field in ("automountServiceAccountToken", "enableServiceLinks"):
        if spec.get(field) is not False:
            yield f"{at}: {field} is not false: set it to false"
    if fleet_worker and spec.get("hostUsers") is not False:
        yield f"{at}: hostUsers is not false, so there is no user namespace: set it to false"
    yield from check_identity(at, spec, fleet_worker)
    yield from check_amounts(at, spec.get("resources") or {})
    containers = [
        one
        for field in ("initContainers", "containers", "ephemeralContainers")
        for one in spec.get(field) or []
    ]
    for container in containers:
        yield from check_container(f"{at}: {container['name']}", container, fleet_worker)
    needs_token = _TOKEN_FOR.items() <= labels_of(template).items()
    yield from check_volumes(at, spec.get("volumes") or [], containers, needs_token)


def check_identity(at: str, spec: Object, fleet_worker: bool) -> Iterator[str]:
    """What holds for all containers of a pod: its user, group, profiles and kernel settings."""
    security = spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield f"{at}: securityContext.runAsNonRoot is not true, it may run as root: set it to true"
    for field in ("runAsUser", "runAsGroup"):
        if field not in security:
            yield f"{at}: securityContext.{field} is missing, it may be root's: give one above 0"
    if not (security.get("seccompProfile") or {}).get("type"):
        yield f"{at}: securityContext.seccompProfile is missing: use RuntimeDefault"
    for sysctl in security.get("sysctls") or []:
        if sysctl["name"] not in _SYSCTLS:
            yield f"{at}: securityContext.sysctls has {sysctl['name']}, not a safe one: drop it"
    yield from check_context(at, security, fleet_worker)


def check_context(at: str, security: Object, fleet_worker: bool) -> Iterator[str]:
    """What a pod's security context may not say, and none of its containers'."""
    at = f"{at}: securityContext"
    if security.get("runAsNonRoot") is False:
        yield f"{at}.runAsNonRoot is false: leave it to the pod"
    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        if security.get(field) == 0:
            yield f"{at}.{field} is 0, which is root: give one above 0"
    if 0 in (security.get("supplementalGroups") or []):
        yield f"{at}.supplementalGroups has 0, which is root: leave it out"
    if (security.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{at}.windowsOptions.hostProcess is set: leave it out"
    for field in ("seccompProfile", "appArmorProfile"):
        kind = (security.get(field) or {}).get("type")
        mounts_proc = fleet_worker and field == "appArmorProfile"  # which the default forbids
        if kind and kind not in _PROFILES and not mounts_proc:
            yield f"{at}.{field} is {kind}: use RuntimeDefault"
    linux = security.get("seLinuxOptions") or {}
    if linux.get("user") or linux.get("role") or linux.get("type", "") not in _SELINUX:
        yield f"{at}.seLinuxOptions is {linux}: leave it out"


def check_volumes(
    at: str, volumes: list[Object], containers: list[Object], needs_token: bool
) -> Iterator[str]:
    """Volumes are of harmless kinds, mounted, and bounded where they take memory."""
    for volume in volumes:
        name = f"{at}: volumes[{volume['name']}]"
        if kinds := set(volume) - {"name"} - _VOLUMES:
            yield f"{name} is a {', '.join(sorted(kinds))}: use a claim or an emptyDir"
        sources = (volume.get("projected") or {}).get("sources") or []
        if any("serviceAccountToken" in one for one in sources) and not needs_token:
            yield f"{name} has a serviceAccountToken, which only the front needs: leave it out"
        if (directory := volume.get("emptyDir")) is not None:
            users = [one for one in containers if volume["name"] in _mounted([one])]
            yield from check_directory(name, directory, users)
    for odd in sorted({volume["name"] for volume in volumes} ^ _mounted(containers)):
        yield f"{at}: volumes[{odd}] is not both there and mounted: add what is missing"


def check_directory(at: str, directory: Object, users: list[Object]) -> Iterator[str]:
    """An emptyDir's size, where it has one; what is in memory counts to its containers' limit."""
    in_memory = directory.get("medium") == "Memory"
    if (size := directory.get("sizeLimit")) is None:
        if in_memory:
            yield f"{at} takes memory without a sizeLimit: give one"
        return
    try:
        most = quantity(size)
        bounds = [((one.get("resources") or {}).get("limits") or {}).get("memory") for one in users]
        least = min((quantity(bound) for bound in bounds if bound is not None), default=most)
    except ValueError as error:
        yield f"{at}.emptyDir.sizeLimit or the limit of memory: {error}"
        return
    if most <= 0:
        yield f"{at}.emptyDir.sizeLimit is {size}: give more than 0"
    if in_memory and most > least:
        yield f"{at}.emptyDir.sizeLimit is {size}, above the limit of memory: raise that limit"


def check_container(at: str, container: Object, fleet_worker: bool) -> Iterator[str]:
    """What is wrong with a container."""
    if not _DIGEST.fullmatch(str(container.get("image", ""))):
        yield f"{at}: image {container.get('image')} has no digest: name it by @sha256:"
    security = container.get("securityContext") or {}
    yield from check_context(at, security, fleet_worker)
    if security.get("privileged"):
        yield f"{at}: securityContext.privileged is true: leave it out"
    for field, word in (("allowPrivilegeEscalation", "false"), ("readOnlyRootFilesystem", "true")):
        if security.get(field) is not (word == "true"):
            yield f"{at}: securityContext.{field} is not {word}: set it to {word}"
    capabilities = security.get("capabilities") or {}
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield f"{at}: securityContext.capabilities keeps some: drop ALL, add none"
    if security.get("procMount", "Default") != "Default" and not fleet_worker:
        yield f"{at}: securityContext.procMount does not mask /proc: leave it out"
    resources = container.get("resources") or {}
    for side, names in (
        ("limits", ("memory", "ephemeral-storage")),
        ("requests", ("cpu", "memory")),
    ):
        for name in names:
            if name not in (resources.get(side) or {}):
                yield f"{at}: resources.{side} has no {side[:-1]} of {name}: give one"
    yield from check_amounts(at, resources)
    for port in container.get("ports") or []:
        if "hostPort" in port:
            yield f"{at}: ports has {port['hostPort']} of the host: leave hostPort out"
    for entry in container.get("env") or []:
        yield from check_variable(f"{at}: env {entry['name']}", entry)
    yield from check_probes(at, container)


def check_variable(at: str, entry: Object) -> Iterator[str]:
    """A variable holds no secret: other processes of the user read it, and children inherit it."""
    secret = _SECRET.search(entry["name"])
    if entry["name"] in _LAUNCHERS:
        yield f"{at} is for a launcher or a debugger to set: leave it out"
    value = str(entry.get("value", ""))
    if "value" in entry and (secret or _IN_URL.search(value) or _IN_VALUE.search(value)):
        yield f"{at} is in plain sight: use a mounted file"
    by_reference = "secretKeyRef" in (entry.get("valueFrom") or {})
    if by_reference and (secret or entry["name"].startswith("REGREEN_")):
        yield f"{at} is a secret by secretKeyRef: use a mounted file"


def check_probes(at: str, container: Object) -> Iterator[str]:
    """What serves a port is probed there; our own services always, by gRPC, or by HTTP where that
    shows none of the certificates that they ask for."""
    ours = any(str(word).endswith("_svc") for word in container.get("command") or ())
    tls = any(str(word).startswith("--tls-cert") for word in container.get("args") or ())
    for probe in ("readinessProbe", "livenessProbe"):
        found = container.get(probe)
        if (container.get("ports") or ours) and not found:
            yield f"{at}: no {probe}: give one, as it serves a port"
        elif ours and found and ("httpGet" if tls else "grpc") not in found:
            yield f"{at}: {probe} is not by {'HTTP' if tls else 'gRPC'}: ask for health by that"
    ports = [one for one in container.get("ports") or [] if one.get("protocol", "TCP") == "TCP"]
    declared = {one.get(key) for one in ports for key in ("containerPort", "name")} - {None}
    handlers = {f: container.get(f) for f in ("startupProbe", "readinessProbe", "livenessProbe")}
    handlers |= {f"lifecycle.{f}": v for f, v in (container.get("lifecycle") or {}).items()}
    for field, handler in handlers.items():
        if not isinstance(handler, dict):
            continue
        for way in ("grpc", "httpGet", "tcpSocket"):
            asked = handler.get(way) or {}
            if "port" in asked and asked["port"] not in declared:
                where = f"{at}: {field}.{way}.port is {asked['port']}"
                yield f"{where}, which the container does not declare: add it to ports"
            if asked.get("host"):
                yield f"{at}: {field}.{way}.host is {asked['host']}: leave it out"


def _mounted(containers: Iterable[Object]) -> set[str]:
    return {mount["name"] for one in containers for mount in one.get("volumeMounts") or []}
