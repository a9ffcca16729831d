"""What the sandbox service can be told.

- Every default works without root and without an engine, or the service says why it cannot.
"""

from typing import ClassVar, Literal

from pydantic import Field

from regreen.settings import ServiceSettings
from sandbox_svc.backends.base import Limits
from sandbox_svc.sandboxes import PoolLimits
from sandbox_svc.warm import WarmSettings


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
    warm_states: int = Field(default=2, ge=0, le=64)
    """States whose validations find an interpreter started ahead; those used last. 0: none."""
    warm_spares: int = Field(default=1, ge=1, le=16)
    """Sandboxes started ahead for each of them; a validation uses one up."""
    warm_memory_bytes: int = Field(default=2 << 30, ge=64 << 20)
    """Memory of all sandboxes started ahead."""
    warm_check_share: float = Field(default=0.05, ge=0, le=1)
    """Share of their verdicts that a cold run checks in the background."""
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

    def pool(self) -> PoolLimits:
        """How many sandboxes there may be, and for how long."""
        return PoolLimits(
            max_sandboxes=self.max_sandboxes,
            max_validations=self.max_validations,
            default_ttl_s=min(self.default_ttl_s, self.max_ttl_s),
            max_ttl_s=self.max_ttl_s,
        )
