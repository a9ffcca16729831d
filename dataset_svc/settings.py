"""What the dataset service can be told.

- Everything has a default that needs nothing: a private Postgres and local blobs under `home`.
"""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from regreen.settings import ServiceSettings


class DatasetSettings(ServiceSettings):
    """Tasks, runs, rollouts and trajectories in Postgres."""

    section: ClassVar[str] = "dataset"
    with_secrets: ClassVar[tuple[str, ...]] = ("database_url",)

    listen: str = "127.0.0.1:50051"
    """gRPC address: `host:port` or `unix:/path`. Port 0 picks a free one."""
    metrics: str = "127.0.0.1:9051"
    """HTTP address of `/metrics` and `/healthz`."""
    database_url: str = ""
    """Postgres 15 or newer, `postgresql://user:password@host/name`; empty runs a private one.
    With a password better as `file:/path`; over a network with `?sslmode=verify-full`."""
    blobs: str = ""
    """Where tokens go: a directory, `s3://bucket/prefix` or `memory://`; empty is `home`/blobs."""
    pg_bin: Path | None = None
    """Directory with `initdb` and `postgres`; by default one is looked for."""
    pg_user: str = ""
    """User that runs the server when root starts it; by default `postgres`, then `nobody`."""
    fsync: bool = True
    """Off only for throw-away data: a power cut may then lose what was committed."""
    database_wait_s: float = Field(default=30.0, ge=0, le=3600.0)
    """How long `database_url` may take to answer when the service starts."""
    pool_size: int = Field(default=16, ge=1, le=200)
    """Database connections of this process."""
    lease_s: float = Field(default=120.0, gt=0)
    """Length of a rollout lease whose request names none."""
    max_lease_s: float = Field(default=21600.0, gt=0)
    """Longest rollout lease that may be asked for."""
    max_attempts: int = Field(default=4, ge=1)
    """Failures of a rollout after which it counts as lost to infrastructure, outages left out."""
    max_outages: int = Field(default=50, ge=1)
    """Outages (a service away, its sandbox or worker killed) after which a rollout is lost."""
    retry_s: float = Field(default=2.0, ge=0, le=60.0)
    """Pause before a rollout that failed is tried again; doubles each time, up to a minute."""
    park_after: int = Field(default=3, ge=0)
    """Rollouts of a task lost in a row, while others succeed, that set it aside; 0: never."""
    max_waiting: int = Field(default=1_000_000, ge=1)
    """Rollouts of a run that may wait; more are refused until some are leased."""
    idle_asks_per_s: float = Field(default=50.0, gt=0)
    """Calls a second that all workers without work make together."""
    remember_s: float = Field(default=48 * 3600.0, ge=24 * 3600.0)
    """How long the answer to a request id is kept."""
    blob_grace_s: float = Field(default=6 * 3600.0, ge=0)
    """How long tokens that no trajectory names are kept; longer than any commit takes."""
    upkeep_s: float = Field(default=10.0, gt=0)
    """Pause between sweeps of leases that ran out."""
