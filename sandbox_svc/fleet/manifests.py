"""What a front asks a cluster for: worker pods, or agent-sandbox's objects around the same pod.

- A worker is one pod that serves the embedded runtime; it holds no token, runs as an ordinary
  user of a user namespace, mounts nothing of its node and writes only to its own volumes.
- Every object carries the labels of its front, by which it is found and swept, and is owned by the
  front's anchor, a ConfigMap: deleting that removes everything.
- Equal settings give equal specs; the digest of the spec is a label, so a changed one shows.
- Names are valid whatever the front is called: what is no DNS label is replaced and hashed.
- Workers get every setting that is not the front's own, in words: a new one needs no code here.
- A secret is never part of a spec: it is named, and read by the cluster.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from regreen.bucket import secrets_folder
from regreen.rpc.certificates import CA, CERT, KEY
from regreen.settings import PLACES
from sandbox_svc.fleet import placement
from sandbox_svc.settings import SandboxSettings

GRPC_PORT = 50052
METRICS_PORT = 9052
INSTANCE = "regreen.dev/instance"
SPEC = "regreen.dev/spec"
WORKER = "regreen.dev/worker"
CONTAINER = "sandbox"
AGENT_GROUP, AGENT_VERSION = "extensions.agents.x-k8s.io", "v1beta1"
_USER = 10_001
_HOME = "/home/regreen/data"
_TLS = PurePosixPath("/var/run/regreen/tls")
_TLS_FILES = (("ca", CA), ("cert", CERT), ("key", KEY))
TLS_NAME = "sandbox-worker"
"""Name in the workers' certificate: their addresses are not known before they start."""
_SLUG = 40
_PROBES = 64
"""Calls that a worker takes beyond those of its front: probes, and the front's own questions."""
_CLEAN_UP_S = 20
"""Time that a worker has after its calls are drained, to leave nothing behind."""
_OWN = PLACES | {"backend", "behind_front", "blobs", "egress_upstream", "max_rpcs"}
_OWN_PREFIXES = ("kube_", "docker_", "fleet_")
"""Settings that are the front's own, or given to its workers in another form; all others are
theirs too."""
Manifest = dict[str, Any]


def slug(name: str) -> str:
    """`name` as a DNS label of at most 40 characters; two names never give one slug."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain == name and len(plain) <= _SLUG and plain[0].isalpha():
        return plain
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"x{plain[: _SLUG - 10].strip('-')}-{mark}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a front asks for, made from its settings."""

    settings: SandboxSettings

    @property
    def instance(self) -> str:
        """The front's name as a label."""
        return slug(self.settings.kube_name)

    @property
    def digest(self) -> str:
        """Changes with the pod's spec."""
        text = json.dumps(self.pod_spec(), sort_keys=True).encode()
        return hashlib.sha256(text).hexdigest()[:12]

    def labels(self, **more: str) -> Mapping[str, str]:
        """Labels of every object of this front."""
        return {
            "app.kubernetes.io/name": "regreen-sandbox",
            "app.kubernetes.io/managed-by": "regreen",
            INSTANCE: self.instance,
            **more,
        }

    def anchor(self, claims: bool) -> Manifest:
        """The object that owns all others, and says what the front wants there to be."""
        made = self._object("v1", "ConfigMap", self.instance, {}, owner=None)
        kind = "claims" if claims else "pods"
        wanted = {"spec": self.digest, "workers": str(self.settings.kube_workers), "kind": kind}
        return made | {"data": wanted}

    def pod(self, name: str, owner: Manifest) -> Manifest:
        """One worker as a plain pod."""
        labels = {WORKER: "true", SPEC: self.digest}
        made = self._object("v1", "Pod", name, labels, owner=owner)
        return made | {"spec": self.pod_spec()}

    def template(self, owner: Manifest) -> Manifest:
        """The SandboxTemplate of the workers."""
        made = self._agent("SandboxTemplate", self.pool_name, {SPEC: self.digest}, owner)
        labels = dict(self.labels(**{SPEC: self.digest}))
        return made | {
            "spec": {
                "podTemplate": {"metadata": {"labels": labels}, "spec": self.pod_spec()},
                # Its default would shut out the front; who may reach the workers is the cluster's
                # to say (docs/operations/kubernetes.md).
                "networkPolicyManagement": "Unmanaged",
                "service": False,
            }
        }

    def warm_pool(self, owner: Manifest) -> Manifest:
        """The SandboxWarmPool that claims take from: one spare worker."""
        made = self._agent("SandboxWarmPool", self.pool_name, {SPEC: self.digest}, owner)
        return made | {"spec": {"replicas": 1, "sandboxTemplateRef": {"name": self.pool_name}}}

    def claim(self, name: str, owner: Manifest) -> Manifest:
        """One worker as a SandboxClaim.

        It asks for no labels: controllers refuse those of domains that they were not told of.
        """
        made = self._agent("SandboxClaim", name, {SPEC: self.digest}, owner)
        return made | {"spec": {"warmPoolRef": {"name": self.pool_name}}}

    @property
    def pool_name(self) -> str:
        """Name of template and pool; another spec has another."""
        return f"{self.instance}-{self.digest}"

    def _agent(self, kind: str, name: str, labels: Mapping[str, str], owner: Manifest) -> Manifest:
        return self._object(f"{AGENT_GROUP}/{AGENT_VERSION}", kind, name, labels, owner=owner)

    def _object(
        self,
        version: str,
        kind: str,
        name: str,
        labels: Mapping[str, str],
        *,
        owner: Manifest | None,
    ) -> Manifest:
        metadata: Manifest = {"name": name, "labels": dict(self.labels(**labels))}
        if owner is not None:
            metadata["ownerReferences"] = [owner]
        return {"apiVersion": version, "kind": kind, "metadata": metadata}

    def pod_spec(self) -> Manifest:
        """The spec of a worker's pod."""
        settings = self.settings
        seccomp: Manifest = {"type": "RuntimeDefault"}
        if settings.kube_seccomp:
            seccomp = {"type": "Localhost", "localhostProfile": settings.kube_seccomp}
        spec: Manifest = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostUsers": False,
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": math.ceil(settings.drain_s) + _CLEAN_UP_S,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": seccomp,
            },
            "containers": [self._container()],
            "volumes": [
                {"name": "home", "emptyDir": {"sizeLimit": str(settings.kube_disk_bytes)}},
                {"name": "tmp", "emptyDir": {"sizeLimit": str(1 << 30)}},
                *self._secret_volumes(),
            ],
        }
        if settings.kube_runtime_class:
            spec["runtimeClassName"] = settings.kube_runtime_class
        return spec | self._placement()

    def _placement(self) -> Manifest:
        """Where the pod may run, before whom, and how its image is pulled."""
        settings = self.settings
        pull = [{"name": name} for name in placement.names(settings.kube_pull_secrets)]
        asked: Manifest = {
            "imagePullSecrets": pull,
            "nodeSelector": placement.labels(settings.kube_node_selector),
            "tolerations": placement.tolerations(settings.kube_tolerations),
            "priorityClassName": settings.kube_priority_class,
        }
        return {name: value for name, value in asked.items() if value}

    def _secret_volumes(self) -> list[Manifest]:
        named = {"tls": self.settings.kube_tls_secret}
        if self._blob_folder:
            named["blobs"] = self.settings.kube_secret
        return [
            {"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}}
            for name, secret in named.items()
            if secret
        ]

    @property
    def _blob_folder(self) -> str:
        """Where workers find the credentials of `blobs` in files."""
        return secrets_folder(self.settings.blobs) if "://" in self.settings.blobs else ""

    def _container(self) -> Manifest:
        settings = self.settings
        amounts = {
            "cpu": f"{int(settings.kube_cpus * 1000)}m",
            "memory": str(settings.kube_memory_bytes),
            "ephemeral-storage": str(settings.kube_disk_bytes + (1 << 30)),
        }
        probe: Manifest = {"grpc": {"port": GRPC_PORT}, "timeoutSeconds": 2}
        mounts: list[Manifest] = [
            {"name": "home", "mountPath": _HOME},
            {"name": "tmp", "mountPath": "/tmp"},
        ]
        if settings.kube_tls_secret:  # a kubelet's probes by gRPC show no certificate
            probe = {"httpGet": {"path": "/healthz", "port": METRICS_PORT}, "timeoutSeconds": 2}
            mounts.append({"name": "tls", "mountPath": str(_TLS), "readOnly": True})
        security: Manifest = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            # A sandbox mounts a /proc of its own, which the kernel refuses where parts of the
            # outer one are hidden. The pod's user is nobody there, and its namespace is its own.
            "procMount": "Unmasked",
        }
        if settings.kube_apparmor:
            security["appArmorProfile"] = (
                {"type": "Unconfined"}
                if settings.kube_apparmor == "unconfined"
                else {"type": "Localhost", "localhostProfile": settings.kube_apparmor}
            )
        variables = placement.names(settings.kube_env_secrets)
        if settings.kube_secret and self._blob_folder:
            mounts.append({"name": "blobs", "mountPath": self._blob_folder, "readOnly": True})
        elif settings.kube_secret:
            variables.insert(0, settings.kube_secret)
        given: Manifest = {"envFrom": [{"secretRef": {"name": name}} for name in variables]}
        return (given if variables else {}) | {
            "name": CONTAINER,
            "image": settings.kube_image,
            "command": ["python3", "-m", "sandbox_svc"],
            "args": self._arguments(),
            "env": [
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "HOME", "value": "/home/regreen"},
                *self._index(),
            ],
            "ports": [
                {"name": "grpc", "containerPort": GRPC_PORT},
                {"name": "metrics", "containerPort": METRICS_PORT},
            ],
            "resources": {"requests": amounts, "limits": amounts},
            "securityContext": security,
            "readinessProbe": probe | {"periodSeconds": 2, "failureThreshold": 2},
            "livenessProbe": probe
            | {"periodSeconds": 10, "failureThreshold": 6, "initialDelaySeconds": 60},
            "volumeMounts": mounts,
        }

    def _index(self) -> list[Manifest]:
        """Where preparations have packages from, if it is said."""
        url = self.settings.kube_index_url
        return [{"name": "REGREEN_INDEX_URL", "value": _literal(url)}] if url else []

    def _arguments(self) -> list[str]:
        settings = self.settings
        given = ["--backend=embedded", f"--home={_HOME}", "--insecure", "--behind-front"]
        given += [f"--listen=$(POD_IP):{GRPC_PORT}", f"--metrics=$(POD_IP):{METRICS_PORT}"]
        if settings.kube_tls_secret:
            given += [f"--tls-{name}={_TLS / file}" for name, file in _TLS_FILES]
        # Probes count as calls: refused by a busy worker, they would end it with all that it runs.
        given.append(f"--max-rpcs={settings.max_rpcs + _PROBES}")
        if "://" in settings.blobs:
            given.append(f"--blobs={_literal(settings.blobs)}")
        if not settings.state_bytes:
            # The kubelet evicts a pod that outgrows its volume, with all that runs in it.
            given.append(f"--state-bytes={settings.kube_disk_bytes // 2}")
        for name, field in type(settings).model_fields.items():
            value = getattr(settings, name)
            if name in _OWN or name.startswith(_OWN_PREFIXES) or value == field.default:
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                given.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                given.append(f"--{flag}={_literal(str(value))}")
        return given


def _literal(text: str) -> str:
    """`text` as an argument in which the kubelet expands nothing."""
    return text.replace("$", "$$")
