"""What the sandbox service can be told.

- Every default works without root and without an engine, or the service says why it cannot.
"""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from regreen import kube_config
from regreen.allowlist import AllowList, parse_hosts
from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.settings import ServiceSettings
from sandbox_svc.actions import ActionLimits
from sandbox_svc.backends.base import LEAST, Limits
from sandbox_svc.egress import Egress
from sandbox_svc.egress_exchange import Bounds
from sandbox_svc.egress_log import Ledger
from sandbox_svc.egress_route import Upstream
from sandbox_svc.egress_rules import parse_networks
from sandbox_svc.fleet import placement
from sandbox_svc.pool import PoolLimits
from sandbox_svc.upkeep import UpkeepLimits
from sandbox_svc.warm import WarmSettings
from sandbox_svc.workers import WorkerSettings


class SandboxSettings(ServiceSettings):
    """Prepared states and disposable sandboxes forked from them."""

    section: ClassVar[str] = "sandbox"

    listen: str = "127.0.0.1:50052"
    """gRPC address: `host:port` or `unix:/path`. Port 0 picks a free one."""
    metrics: str = "127.0.0.1:9052"
    """HTTP address of `/metrics` and `/healthz`."""
    backend: Literal["embedded", "docker", "kubernetes"] = "embedded"
    """`embedded`: namespaces and overlayfs of this host; `docker`: a Docker engine; `kubernetes`: a
    front for workers in a cluster."""
    blobs: str = ""
    """Where source trees come from: a directory or `s3://bucket/prefix`; empty is `home`/blobs."""
    docker_image: str = "python:3.11-slim"
    """Base image of the docker backend."""
    docker_runtime: str = ""
    """OCI runtime of the docker backend, for example `runsc`; empty is the engine's default."""
    docker_pool: int = Field(default=2, ge=0, le=64)
    """Started containers that the docker backend keeps ready for each state in use."""
    docker_pool_total: int = Field(default=8, ge=0, le=1000)
    """Most containers that it keeps ready in all."""
    warm_seats: int = Field(default=4, ge=0, le=64)
    """Sandbox processes kept ready by the embedded backend."""
    max_sandboxes: int = Field(default=64, ge=1)
    """Sandboxes of clients at once; more are answered RESOURCE_EXHAUSTED."""
    max_validations: int = Field(default=4, ge=1)
    """Validations at once; more wait."""
    warm_states: int = Field(default=2, ge=0, le=64)
    """States whose validations find an interpreter started ahead; those used last. 0: none."""
    warm_spares: int = Field(default=1, ge=1, le=16)
    """Sandboxes started ahead for each of them; a validation uses one up."""
    warm_memory_bytes: int = Field(default=2 << 30, ge=64 << 20)
    """Memory of all sandboxes started ahead."""
    warm_check_share: float = Field(default=0.05, ge=0, le=1)
    """Share of their verdicts, and of those of several workers, that one cold run checks."""
    validation_workers: int = Field(default=1, ge=1, le=64)
    """Forks that one validation may run its test files in at once, within the limits of one
    sandbox, and only for States of which that was shown to be the same. 1: none but the first."""
    default_ttl_s: float = Field(default=900.0, gt=0)
    """Life of a sandbox whose request names none and that is not kept alive."""
    max_ttl_s: float = Field(default=86_400.0, gt=0)
    """Longest life that may be asked for."""
    memory_bytes: int = Field(default=4 << 30, ge=64 << 20)
    """Memory of a sandbox whose request names none."""
    pids: int = Field(default=512, ge=8)
    """Processes and threads of a sandbox whose request names none."""
    cpus: float = Field(default=2.0, ge=LEAST["cpus"])
    """Cores of a sandbox whose request names none."""
    disk_bytes: int = Field(default=8 << 30, ge=1 << 20)
    """Bytes that a sandbox may write when its request names no bound."""
    inodes: int = Field(default=500_000, ge=1000)
    """Files that a sandbox may create when its request names no bound."""
    output_bytes: int = Field(default=1 << 30, ge=1 << 16)
    """A command that prints more than this is stopped."""
    command_s: float = Field(default=3600.0, gt=0)
    """Longest run of one command."""
    max_executions: int = Field(default=32, ge=1, le=1024)
    """Commands of one sandbox that run on their own or are kept; the oldest ended ones go first."""
    import_bytes: int = Field(default=16 << 30, ge=1 << 20)
    """Largest archive that ImportState and ImportImage take, packed or unpacked, and that
    ExportState and ExportImage give."""
    transfer_idle_s: float = Field(default=60.0, gt=0)
    """An archive of which the client sends, or takes, nothing for so long is given up."""
    behind_front: bool = False
    """Believe the tenant that a call's header names, as workers of a front do: where nobody but the
    front can call. The front sets it for its workers."""
    kube_name: str = Field(default="regreen-sandbox", min_length=1, max_length=200)
    """Name of this front in the cluster; one that starts under it takes over what is there."""
    kube_config: Path | None = None
    """Kubeconfig file; without one the pod's own account, `KUBECONFIG` or `~/.kube/config`."""
    kube_namespace: str = ""
    """Namespace of the workers; empty is that of the account or the kubeconfig."""
    kube_workers: int = Field(default=2, ge=1, le=5000)
    """Workers that there should be."""
    kube_image: str = "regreen-sandbox"
    """Image of the workers (infra/docker/sandbox.Dockerfile)."""
    kube_api: Literal["auto", "agent-sandbox", "pods"] = "auto"
    """What makes workers: `agent-sandbox` claims or plain `pods`; `auto`: claims where the cluster
    knows them."""
    kube_runtime_class: str = ""
    """RuntimeClass of the workers, for example `gvisor`; empty is the cluster's default."""
    kube_seccomp: str = ""
    """Localhost seccomp profile of the workers (infra/docker/sandbox.seccomp.json, where the
    kubelet finds it); empty is RuntimeDefault."""
    kube_apparmor: str = ""
    """AppArmor of the workers: `unconfined` or a localhost profile; empty is the node's default."""
    kube_secret: str = ""
    """Secret with `AWS_*` for `blobs`: files of the workers in the folder that `?secrets=` of it
    names, else environment variables; no sandbox sees them."""
    kube_tls_secret: str = ""
    """Secret in the workers' namespace with `ca.crt`, `tls.crt` and `tls.key` of a service named
    `sandbox-worker`: workers serve with it, and the front calls them with its own certificate."""
    kube_index_url: str = ""
    """Package index of the workers, without a password; empty is uv's default."""
    kube_env_secrets: str = ""
    """Secrets in the workers' namespace whose entries become variables of the workers, by comma: an
    index with a password (`REGREEN_INDEX_URL`), a proxy (`HTTPS_PROXY`, and for sandboxes
    `REGREEN_SANDBOX__EGRESS_UPSTREAM`). No sandbox sees them."""
    kube_pull_secrets: str = ""
    """Secrets in the workers' namespace with which their image is pulled, by comma."""
    kube_node_selector: str = ""
    """Labels of the nodes that take workers: `name=value`, by comma."""
    kube_tolerations: str = ""
    """Tolerations of the workers, as JSON."""
    kube_priority_class: str = ""
    """PriorityClass of the workers."""
    kube_cpus: float = Field(default=4.0, gt=0)
    """Cores of one worker."""
    kube_memory_bytes: int = Field(default=16 << 30, ge=256 << 20)
    """Memory of one worker."""
    kube_disk_bytes: int = Field(default=64 << 30, ge=1 << 30)
    """Disk of one worker: its states and sandboxes."""
    kube_start_s: float = Field(default=300.0, gt=0)
    """A front that has no worker after so long does not serve, and says why."""
    kube_keep_workers: bool = False
    """Leave the workers running when the front ends; the next of its name takes them over."""
    fleet_keep: Literal["prepared", "all", "none"] = "prepared"
    """States that a front puts into the blob store as soon as they are made; the others only when
    another worker needs them, so that they go with their worker."""

    egress: bool = True
    """Whether a request may give a sandbox a way out, through the proxy; there is no other."""
    egress_hosts: str = ""
    """Hosts that may be asked for at all, by comma, in the form of `egress.allow`; empty: any that
    the address rules let through."""
    egress_private: str = ""
    """Networks that the proxy may reach though they are private or the host's own, by comma."""
    egress_upstream: str = ""
    """Proxy that the proxy itself goes through, as a URL; its password never enters a sandbox."""
    egress_connections: int = Field(default=32, ge=1, le=1024)
    """Connections of one sandbox to the proxy at once; more wait."""
    egress_bytes: int = Field(default=4 << 30, ge=1)
    """Bytes that one sandbox may send and receive through the proxy in all."""
    egress_idle_s: float = Field(default=60.0, gt=0)
    """A request or tunnel without a byte for this long is ended."""
    egress_kept_s: float = Field(default=3600.0, ge=0)
    """For how long the requests of a deleted sandbox can be listed."""
    prepare_hosts: str = "files.pythonhosted.org"
    """Hosts that preparations may fetch from beside the package indexes of this service, by comma,
    in the form of `egress.allow`: where an index keeps its files elsewhere."""
    self_check_s: float = Field(default=30.0, gt=0)
    """Time between two looks for leaks."""

    @model_validator(mode="after")
    def _check_front(self) -> Self:
        if self.behind_front and (self.tokens or self.backend == "kubernetes"):
            raise ValueError(
                "behind_front: whose a call is is said by its front or by its token; leave out "
                "tokens and the backend kubernetes, or this"
            )
        return self

    @model_validator(mode="after")
    def _check_kube_tls(self) -> Self:
        if self.kube_tls_secret and not (self.tls_cert and self.tls_ca):
            raise ValueError(
                "kube_tls_secret: the front shows its workers a certificate of its own; "
                "set tls_cert, tls_key and tls_ca too"
            )
        return self

    @model_validator(mode="after")
    def _check_placement(self) -> Self:
        for name, read in (
            ("kube_index_url", placement.index_url),
            ("kube_env_secrets", placement.names),
            ("kube_pull_secrets", placement.names),
            ("kube_node_selector", placement.labels),
            ("kube_tolerations", placement.tolerations),
            ("kube_priority_class", placement.names),
        ):
            try:
                read(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if "," in self.kube_priority_class:
            raise ValueError("kube_priority_class: names several; give one")
        return self

    @model_validator(mode="after")
    def _check_egress(self) -> Self:
        try:
            parse_networks(self.egress_private)
        except ValueError as error:
            raise ValueError(
                f"egress_private: {error}; give networks such as 10.0.0.0/8,fd00::/8"
            ) from None
        for name in ("egress_hosts", "prepare_hosts"):
            try:
                parse_hosts(getattr(self, name), name)
            except InvalidArgument as error:
                raise ValueError(error.message) from None
        if self.egress_upstream:
            try:
                Upstream.parse(self.egress_upstream)
            except ValueError as error:
                raise ValueError(f"egress_upstream: {error}") from None
        return self

    def check_host(self) -> None:
        """Refuse a front of a cluster of which nothing is known here.

        Raises:
            InvalidArgument: names the setting and says what to give.
        """
        if self.backend != "kubernetes":
            return
        from sandbox_svc.fleet.kube_api import CONFIGURE

        try:
            kube_config.read(self.kube_config, CONFIGURE)
        except MissingDependency as error:
            field = "backend" if "package" in error.metadata else "kube_config"
            problem, _, remedy = error.message.rpartition("; ")
            raise InvalidArgument(field, problem, remedy) from None

    def make_egress(self) -> Egress:
        """The proxy of sandboxes that were given a way out."""
        return Egress(
            private=parse_networks(self.egress_private),
            upstream=Upstream.parse(self.egress_upstream) if self.egress_upstream else None,
            bounds=Bounds(
                connections=self.egress_connections,
                transfer_bytes=self.egress_bytes,
                idle_s=self.egress_idle_s,
            ),
            ledger=Ledger(kept_s=self.egress_kept_s),
            enabled=self.egress,
            ceiling=parse_hosts(self.egress_hosts, "egress_hosts"),
        )

    def prepared_from(self) -> AllowList:
        """Hosts that preparations may fetch from beside the package indexes."""
        return parse_hosts(self.prepare_hosts, "prepare_hosts") or AllowList(())

    flatten_layers: int = Field(default=30, ge=0, le=60)
    """Snapshots above one another before their layers are merged into one; 0 never."""
    state_bytes: int = Field(default=0, ge=0)
    """Disk budget of all states; over it those used least recently are dropped. 0 means none."""
    snapshot_grace_s: float = Field(default=86_400.0, ge=0)
    """Snapshots used within this time are never dropped for the disk budget."""
    max_actions: int = Field(default=4, ge=1)
    """Actions (Execute) that run at once; more wait."""
    max_queued_actions: int = Field(default=256, ge=0)
    """Actions that wait for a place; more are answered RESOURCE_EXHAUSTED."""
    action_cache_bytes: int = Field(default=1 << 30, ge=0)
    """Results of actions that are kept, on the disk; those used least recently go first."""
    action_rerun_share: float = Field(default=0.02, ge=0, le=1)
    """Share of answers from the action cache that are run again in the background to compare."""

    def upkeep(self) -> UpkeepLimits:
        """When states are flattened and dropped."""
        return UpkeepLimits(
            flatten_layers=self.flatten_layers,
            state_bytes=self.state_bytes,
            snapshot_grace_s=self.snapshot_grace_s,
        )

    def actions(self) -> ActionLimits:
        """How many actions there may be, and what is kept of them."""
        return ActionLimits(
            running=self.max_actions,
            queued=self.max_queued_actions,
            cache_bytes=self.action_cache_bytes,
            rerun_share=self.action_rerun_share,
        )

    def limits(self) -> Limits:
        """Limits of a sandbox whose request names none."""
        return Limits(
            memory_bytes=self.memory_bytes,
            pids=self.pids,
            cpus=self.cpus,
            disk_bytes=self.disk_bytes,
            inodes=self.inodes,
            output_bytes=self.output_bytes,
            wall_s=self.command_s,
        )

    def warm(self) -> WarmSettings:
        """What is started ahead of validations."""
        return WarmSettings(
            states=self.warm_states,
            spares=self.warm_spares,
            memory_bytes=self.warm_memory_bytes,
            check_share=self.warm_check_share,
        )

    def workers(self) -> WorkerSettings:
        """When the tests of a validation are shared among forks."""
        return WorkerSettings(most=self.validation_workers, check_share=self.warm_check_share)

    def pool(self) -> PoolLimits:
        """How many sandboxes there may be, and for how long."""
        return PoolLimits(
            max_sandboxes=self.max_sandboxes,
            max_comparisons=self.max_validations,
            default_ttl_s=min(self.default_ttl_s, self.max_ttl_s),
            max_ttl_s=self.max_ttl_s,
        )
