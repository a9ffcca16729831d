"""What the learner remembers of a run on disk: its spec, its state, and every step it did.

- `run.json` is replaced whole; `steps.jsonl` grows by one flushed line per step.
- A line cut short by a crash is dropped when read, alone; its step is simply done again.
- Batches of steps that no checkpoint contains lie beside them, for a restart.
- After a resume only the steps that the checkpoint contains are kept.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from learner_svc.checkpoint import disk_errors
from learner_svc.spec import RunSpec
from regreen.rpc.errors import DataLoss


class RunState(StrEnum):
    """Where a run stands."""

    ACTIVE = "active"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step that was done."""

    step: int
    batch_sha256: str
    group_ids: tuple[str, ...]
    metrics: dict[str, float]
    duration_s: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run without its steps."""

    spec: RunSpec
    state: RunState
    created: str
    error: str = ""
    engine: str = ""
    trainable_parameters: int = 0
    parameters: int = 0
    estimated_memory_bytes: int = 0
    tenant: str = ""
    """Whose it is; empty: nobody's."""


@dataclass(slots=True)
class RunFiles:
    """The directory of one run."""

    directory: Path
    steps: list[StepRecord] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.directory / "checkpoints"

    @property
    def log(self) -> Path:
        """Output of the run's workers."""
        return self.directory / "worker.log"

    def batch(self, step: int) -> Path:
        """Where the batch of a step lies until a checkpoint contains it."""
        return self.directory / f"batch-{step:08d}"

    def drop_batches(self, through: int | None = None) -> None:
        """Remove the batches of the steps up to one, or of all."""
        for path in self.directory.glob("batch-*"):
            if through is None or path.name <= self.batch(through).name:
                path.unlink(missing_ok=True)

    def write(self, record: RunRecord) -> None:
        """Replace the run's record. Raises: DiskFull when there is no space."""
        raw = asdict(record) | {"spec": record.spec.to_json()}
        replace_text(self.directory / "run.json", json.dumps(raw, indent=1))

    def read(self) -> RunRecord:
        """The run's record and, into `steps`, its steps.

        Raises:
            DataLoss: the record is unreadable.
        """
        path = self.directory / "run.json"
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            spec, state = RunSpec.from_json(raw.pop("spec")), RunState(raw.pop("state"))
            record = RunRecord(spec=spec, state=state, **raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataLoss(f"{path} is unreadable: {error}") from error
        self.steps = list(self._read_steps())
        return record

    def _read_steps(self) -> list[StepRecord]:
        try:
            lines = (self.directory / "steps.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found: list[StepRecord] = []
        for line in lines:
            try:
                raw = json.loads(line)
                raw["group_ids"] = tuple(raw["group_ids"])
                found.append(StepRecord(**raw))
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def append(self, record: StepRecord) -> None:
        """Add a step and flush it to disk.

        Raises:
            DiskFull: no space; the step is not recorded.
        """
        path = self.directory / "steps.jsonl"
        with disk_errors(path), path.open("a") as target:
            target.write(json.dumps(asdict(record)) + "\n")
            target.flush()
            os.fsync(target.fileno())
        self.steps.append(record)

    def cut(self, step: int) -> None:
        """Forget the steps after `step`: they are not in the checkpoint."""
        self.steps = [record for record in self.steps if record.step <= step]
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in self.steps)
        replace_text(self.directory / "steps.jsonl", lines)


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w") as target:
            target.write(text)
            target.flush()
            os.fsync(target.fileno())
        partial.replace(path)
