"""What the sandbox service can be told.

- Every default works without root and without an engine, or the service says why it cannot.
"""

from typing import ClassVar, Literal

from pydantic import Field

from regreen.settings import ServiceSettings
from sandbox_svc.actions import ActionLimits
from sandbox_svc.backends.base import Limits
from sandbox_svc.sandboxes import PoolLimits
from sandbox_svc.upkeep import UpkeepLimits


class SandboxSettings(ServiceSettings):
    """Prepared states and disposable sandboxes forked from them."""

    section: ClassVar[str] = "sandbox"

    listen: str = "127.0.0.1:50052"
    """gRPC address: `host:port` or `unix:/path`. Port 0 picks a free one."""
    metrics: str = "127.0.0.1:9052"
    """HTTP address of `/metrics` and `/healthz`."""
    backend: Literal["embedded", "docker"] = "embedded"
    """`embedded`: namespaces and overlayfs of this host; `docker`: a Docker engine."""
    blobs: str = ""
    """Where source trees come from: a directory or `s3://bucket/prefix`; empty is `home`/blobs."""
    docker_image: str = "python:3.11-slim"
    """Base image of the docker backend."""
    docker_runtime: str = ""
    """OCI runtime of the docker backend, for example `runsc`; empty is the engine's default."""
    warm_seats: int = Field(default=4, ge=0, le=64)
    """Sandbox processes kept ready by the embedded backend."""
    max_sandboxes: int = Field(default=64, ge=1)
    """Sandboxes of clients at once; more are answered RESOURCE_EXHAUSTED."""
    max_validations: int = Field(default=4, ge=1)
    """Validations at once; more wait."""
    default_ttl_s: float = Field(default=900.0, gt=0)
    """Life of a sandbox whose request names none and that is not kept alive."""
    max_ttl_s: float = Field(default=86_400.0, gt=0)
    """Longest life that may be asked for."""
    memory_bytes: int = Field(default=4 << 30, ge=64 << 20)
    """Memory of a sandbox whose request names none."""
    pids: int = Field(default=512, ge=8)
    """Processes and threads of a sandbox whose request names none."""
    cpus: float = Field(default=2.0, gt=0)
    """Cores of a sandbox whose request names none."""
    disk_bytes: int = Field(default=8 << 30, ge=1 << 20)
    """Bytes that a sandbox may write when its request names no bound."""
    inodes: int = Field(default=500_000, ge=1000)
    """Files that a sandbox may create when its request names no bound."""
    output_bytes: int = Field(default=1 << 30, ge=1 << 16)
    """A command that prints more than this is stopped."""
    command_s: float = Field(default=3600.0, gt=0)
    """Longest run of one command."""
    import_bytes: int = Field(default=16 << 30, ge=1 << 20)
    """Largest archive that ImportState takes, unpacked."""
    flatten_layers: int = Field(default=30, ge=0, le=120)
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

    def pool(self) -> PoolLimits:
        """How many sandboxes there may be, and for how long."""
        return PoolLimits(
            max_sandboxes=self.max_sandboxes,
            max_validations=self.max_validations,
            default_ttl_s=min(self.default_ttl_s, self.max_ttl_s),
            max_ttl_s=self.max_ttl_s,
        )
