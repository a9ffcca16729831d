"""The settings of a training run as they were recorded, to go on with exactly these.

- `settings` of a run's config is what must not change; numbers there are 64-bit floats.
- `exact` holds all that the run was asked for, as JSON: whole numbers of any size, and what only
  says how a process works on it (`concurrency`, waits, whether the result is served).
- Runs of before `exact` was kept go on by `settings`; what these lack is said, never guessed where
  it would change what is learned.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_origin

from google.protobuf.json_format import MessageToDict

from regreen.client.dataset import struct
from regreen.dataset import v1 as dataset_pb
from regreen.rpc.errors import DataLoss, FailedPrecondition, RegreenError
from regreen.train.config import OPERATIONAL, GrpoConfig, SftConfig

KINDS: Mapping[str, type[SftConfig] | type[GrpoConfig]] = {"sft": SftConfig, "grpo": GrpoConfig}
"""Kinds of runs that can be gone on with from their record."""
_EXACT = 2.0**53
"""Whole numbers up to here survive in a float."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The config of a run, and what its record did not hold."""

    config: SftConfig | GrpoConfig
    assumed: tuple[str, ...]
    """Fields that the record lacks and that take their defaults; none changes what is learned."""


def exact_settings(config: SftConfig | GrpoConfig) -> str:
    """All settings but the name, as they were given."""
    return json.dumps({name: value for name, value in asdict(config).items() if name != "name"})


def recorded_config(run: dataset_pb.Run) -> Recorded:
    """What `run` was created with.

    Raises:
        FailedPrecondition: runs of its kind cannot be gone on with; says which can.
        DataLoss: its record is not that of a run, or of another version of Regreen.
    """
    kind = KINDS.get(run.kind)
    if kind is None:
        raise FailedPrecondition(
            f"run {run.name!r} is of kind {run.kind}; those that can be resumed are "
            f"{' and '.join(KINDS)}, and an evaluation goes on with `regreen eval --name "
            f"{run.name}` and the options that it was made with"
        )
    settings = settings_of(run)
    if not settings or not resolved_of(run):
        raise _unreadable(run, "holds no settings")
    given = _exact(run, settings)
    known = {field.name for field in fields(kind)} - {"name"}
    if unknown := given.keys() - known:
        raise _unreadable(run, f"has {_listed(unknown)}, which this version does not know")
    lacking = known - given.keys()
    if needed := lacking - OPERATIONAL:
        raise _unreadable(run, f"lacks {_listed(needed)}")
    types = {field.name: field.type for field in fields(kind)}
    try:
        values = {name: _typed(name, value, types[name]) for name, value in given.items()}
        config = kind(name=run.name, **values)
    except (RegreenError, TypeError, ValueError) as error:
        raise _unreadable(run, f"cannot be taken: {error}") from error
    if struct(config.settings()) != run.config.fields["settings"].struct_value:
        raise _unreadable(run, "contradicts itself")
    return Recorded(config, tuple(sorted(lacking)))


def settings_of(run: dataset_pb.Run) -> dict[str, Any]:
    """The settings that a run was created with; whole numbers come back as floats."""
    return _part(run, "settings")


def all_settings(run: dataset_pb.Run) -> dict[str, Any]:
    """`settings_of`, with whole numbers as such and what only says how a process works on it."""
    settings = settings_of(run)
    try:
        return settings | _exact(run, settings)
    except DataLoss:  # told to who goes on with it
        return settings


def resolved_of(run: dataset_pb.Run) -> dict[str, Any]:
    """What was worked out when a run was created."""
    return _part(run, "resolved")


def _part(run: dataset_pb.Run, name: str) -> dict[str, Any]:
    found = MessageToDict(run.config).get(name)
    return found if isinstance(found, dict) else {}


def _exact(run: dataset_pb.Run, settings: dict[str, Any]) -> dict[str, Any]:
    text = run.config.fields["exact"].string_value if "exact" in run.config.fields else ""
    if not text:
        return settings
    try:
        given = json.loads(text)
    except ValueError as error:
        raise _unreadable(run, f"cannot be read ({error})") from error
    if not isinstance(given, dict):
        raise _unreadable(run, "holds no settings")
    return given


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the field has it: tuples for lists, whole numbers for floats that were such."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"{name} is no list of words")
        return tuple(value)
    if kind is int and isinstance(value, float):
        return _whole(name, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise TypeError(f"{name} is no mapping")
        return {key: _number(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(kind, type) and type(value) is not kind:
        raise TypeError(f"{name} is {value!r}")
    return value


def _number(name: str, value: Any) -> Any:
    return _whole(name, value) if isinstance(value, float) and value.is_integer() else value


def _whole(name: str, value: float) -> int:
    if not value.is_integer():
        raise ValueError(f"{name} is {value}, which is no whole number")
    if abs(value) > _EXACT:
        raise ValueError(f"{name} is {value:.0f}, which older versions recorded rounded")
    return int(value)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def _unreadable(run: dataset_pb.Run, problem: str) -> DataLoss:
    return DataLoss(
        f"the record of run {run.name!r} {problem}; go on with `regreen train {run.kind} --name "
        f"{run.name}` and the options that it was made with, or choose another name"
    )
