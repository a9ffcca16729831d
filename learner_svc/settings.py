"""Settings of the learner service."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from regreen.settings import ServiceSettings


class LearnerSettings(ServiceSettings):
    """Optimises policies: DeepSpeed or plain torch, SFT and GRPO."""

    section: ClassVar[str] = "learner"

    listen: str = "127.0.0.1:50055"
    """gRPC address."""
    metrics: str = "127.0.0.1:9055"
    """HTTP address of `/metrics` and `/healthz`."""
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """Engine of runs that name none."""
    processes: int = Field(default=1, ge=1, le=1024)
    """Ranks of a run on each machine; 1 per GPU, or 1 on CPU."""
    nodes: int = Field(default=1, ge=1, le=1024)
    """Machines of a run, this one included; on each of the others runs
    `python -m learner_svc.node` in the same home, which all of them mount."""
    address: str = ""
    """Name or address of this machine for the others; needed with more than one."""
    blobs: str = ""
    """URL of the blob store that batches come from; empty is `<home>/blobs`."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Newest checkpoints kept per run."""
    weight_sync: Literal["path", "full", "delta"] = "path"
    """How policies get weights: by path alone, from a disk that they share; or through `blobs` as
    well, whole each time or as deltas, for policies that do not."""
    sync_dtype: Literal["bf16", "fp32"] = "bf16"
    """Number type of weights in the blob store; deltas need bf16."""
    snapshot_every: int = Field(default=20, ge=1, le=1000)
    """With deltas, versions from one that is whole to the next."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Time a worker gets to load model and engine before it is ended."""
    step_timeout_s: float = Field(default=3600.0, gt=0)
    """Time of one step before its worker is ended."""
    save_timeout_s: float = Field(default=900.0, gt=0)
    """Time of one checkpoint before its worker is ended."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of a run from its last checkpoint after ranks were lost, in a row; one more step
    than ever done begins a new row. 0: the run fails, and whoever drives it starts it again."""
    silence_s: float = Field(default=30.0, ge=1)
    """Time without a sign of life of another machine after which it is lost."""

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        if self.nodes > 1 and not self.address:
            raise ValueError(
                "address: is needed with nodes above 1: a name of this machine that the others know"
            )
        return self

    @model_validator(mode="after")
    def _check_sync(self) -> Self:
        if self.weight_sync == "delta" and self.sync_dtype == "fp32":
            raise ValueError(
                "weight_sync: is delta with sync_dtype fp32, of which a step changes nearly every "
                "element; take bf16, of which it changes few, or full"
            )
        return self
