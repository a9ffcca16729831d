"""Weights by reference: which ones a name means, and which version numbers they get.

- A version number names one set of weights for ever: each training run owns a block of
  `VERSION_BLOCK` numbers, fixed when the run is created; 0 is the base model.
- Nothing here reads or moves weights.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from google.protobuf.json_format import MessageToDict

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as dataset_pb
from regreen.learner import v1 as learner_pb
from regreen.policy import v1 as policy_pb
from regreen.rpc.errors import DataLoss, InvalidArgument
from regreen.train.rows import all_runs, find_run, last_checkpoint

BASE = "base"
"""Name of the model before any training."""
_TRAINING = ("sft", "grpo")
"""Kinds of runs that make weights."""
VERSION_BLOCK = 10_000
"""Version numbers, hence driver steps, of one run."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A policy's weights by reference."""

    uri: str
    version: int = 0
    sha256: str = ""
    size_bytes: int = 0
    run_id: str = ""
    step: int = 0

    def to_policy(self) -> policy_pb.PolicyVersion:
        """As the policy service wants it."""
        found = policy_pb.PolicyVersion(
            version=self.version, uri=self.uri, run_id=self.run_id, step=self.step
        )
        if self.sha256:
            found.digest.CopyFrom(common_pb.Digest(sha256=self.sha256, size_bytes=self.size_bytes))
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain values; sizes stay below 2^53."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Weights":
        """What `to_json` gave, also after a trip through a protobuf struct."""
        return cls(
            uri=str(values["uri"]),
            version=int(values["version"]),
            sha256=str(values["sha256"]),
            size_bytes=int(values["size_bytes"]),
            run_id=str(values["run_id"]),
            step=int(values["step"]),
        )

    def stamped(self, version: int) -> "Weights":
        """The same weights under another version number."""
        return replace(self, version=version)


def started_from(resolved: Mapping[str, Any]) -> Weights:
    """The weights that a run began with, by what it worked out when it was created.

    Raises:
        DataLoss: that is not on record.
    """
    try:
        return Weights.from_json(resolved["start"]).stamped(int(resolved["base_version"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataLoss(
            "the record of the run does not say which weights it began with; choose another name"
        ) from error


def weights_of(record: dataset_pb.CheckpointRecord) -> Weights:
    """The weights of a recorded checkpoint."""
    return Weights(
        uri=record.uri,
        version=record.policy_version,
        sha256=record.digest.sha256,
        size_bytes=record.digest.size_bytes,
        run_id=record.run_id,
        step=record.step,
    )


def weights_published(published: learner_pb.PublishedWeights) -> Weights:
    """The weights that a learner has published."""
    return Weights(
        uri=published.uri,
        version=published.policy_version,
        sha256=published.digest.sha256,
        size_bytes=published.digest.size_bytes,
        run_id=published.run_id,
        step=published.driver_step,
    )


async def resolve_weights(
    stack: Stack, name: str, field: str = "policy", *, base_uri: str = ""
) -> Weights:
    """The weights that `name` means: "base", or the newest checkpoint of the run of that name.

    Raises:
        InvalidArgument: no run of that name, or it has no checkpoint yet; names `field`.
    """
    if name in ("", BASE):
        return Weights(base_uri or await _base_uri(stack))
    run = await find_run(stack, name)
    if run is None or run.kind not in _TRAINING:
        known = ", ".join([BASE, *await _trained(stack)])
        problem = f"{name!r} is neither {BASE!r} nor the name of a run that trains"
        raise InvalidArgument(field, problem, f"give one of {known}")
    record = await last_checkpoint(stack, run.id)
    if record is not None:
        return weights_of(record)
    if run.state != "done":
        raise InvalidArgument(field, f"run {name!r} has no checkpoint yet", "train it first")
    # Every step was skipped (no group had a spread of rewards): the weights did not change.
    kept = MessageToDict(run.config.fields["resolved"].struct_value)
    return started_from(kept)


async def name_served(stack: Stack) -> str:
    """What the policy service serves: "base", or the name of the run that made it."""
    served = (await stack.policy.get_policy()).policy
    if not served.run_id:
        return BASE
    run = await find_run(stack, served.run_id)
    return run.name if run else f"v{served.version}"


async def next_version_block(stack: Stack) -> int:
    """First version number of the block of a new run."""
    highest = (await stack.policy.get_policy()).policy.version
    async for resolved in _resolved_configs(stack):
        highest = max(highest, int(resolved.get("base_version", 0)))
    return (highest // VERSION_BLOCK + 1) * VERSION_BLOCK


async def _trained(stack: Stack, most: int = 10) -> list[str]:
    """Names of the newest training runs."""
    found: list[str] = []
    for kind in _TRAINING:
        page = await stack.runs.list_runs(kind=kind, page_size=most)
        found += [run.name for run in page.runs]
    return found


async def _base_uri(stack: Stack) -> str:
    serving = (await stack.policy.get_policy()).policy
    if serving.uri and not serving.run_id:  # no run made it: the base, whatever its number
        return serving.uri
    async for resolved in _resolved_configs(stack):
        if resolved.get("base_uri"):
            return str(resolved["base_uri"])
    raise InvalidArgument(
        "base_uri", "is not given and the policy serves a trained version", "give the model folder"
    )


async def _resolved_configs(stack: Stack) -> AsyncIterator[Mapping[str, Any]]:
    async for run in all_runs(stack):
        yield MessageToDict(run.config).get("resolved", {})
