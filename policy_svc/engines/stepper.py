"""The seam between a worker process and what computes: a batch of samples moved on step by step.

- A stepper is used by one thread only; only `prepare` and `check` may run on others, one each.
- `step` moves every running sample on by at most one token and reports what came out.
- Weights change in two halves: `prepare` reads and builds without touching what runs,
  `switch` puts it to use; a failed `prepare` changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from policy_svc.engines.base import Request

REFUSED = "refused"
"""The sample cannot be computed: its keys and values do not fit the cache."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sample; with the last one `finish` is "stop", "length" or `REFUSED`."""

    request_id: str
    sample: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    version: int
    finish: str | None = None


class WeightsError(ValueError):
    """Weights cannot be read or do not fit the model."""


class StructureError(ValueError):
    """What samples have to be cannot be followed."""


class Stepper(Protocol):
    """Computes next tokens for all running samples."""

    version: int
    dtype: str
    structures: bool
    """Whether samples can be bound by a regular expression or a schema."""

    def check(self, request: Request) -> None:
        """See that what a request's samples have to be can be followed; may take seconds.

        Raises: StructureError.
        """
        ...

    def add(self, request: Request) -> int:
        """Take a request; its cached prompt tokens where known, else 0."""
        ...

    def step(self) -> list[Chunk]:
        """Compute once and report new tokens."""
        ...

    def busy(self) -> bool:
        """Whether `step` has something to do."""
        ...

    def end_sample(self, request_id: str, sample: int) -> None:
        """Compute no more for a sample that ended on a stop text."""
        ...

    def cancel(self, request_id: str) -> list[Chunk]:
        """Drop a request; tokens that it had sampled and not reported yet."""
        ...

    def prepare(self, version: int, path: Path) -> object:
        """Read weights. Raises: WeightsError."""
        ...

    def switch(self, version: int, prepared: object) -> None:
        """Use prepared weights for what is sampled next."""
        ...
