"""The words people write for enum values: "any_fix", "simplified", "build_gates"; and splits.

- A word and its enum value determine each other; unknown words are refused with the list of known.
"""

from collections.abc import Iterable

from regreen.common import v1 as pb
from regreen.rpc.errors import InvalidArgument

MODES = {"any_fix": pb.MODE_ANY_FIX, "keep_new": pb.MODE_KEEP_NEW}
PIPELINES = {"simplified": pb.PIPELINE_SIMPLIFIED, "full": pb.PIPELINE_FULL}
GRADERS = {
    "build": pb.GRADER_BUILD,
    "build_gates": pb.GRADER_BUILD_GATES,
    "build_gates_judge": pb.GRADER_BUILD_GATES_JUDGE,
}
SPLITS = ("train", "validation", "test")
_MODE_NAMES = {value: name for name, value in MODES.items()}
_PIPELINE_NAMES = {value: name for name, value in PIPELINES.items()}
_GRADER_NAMES = {value: name for name, value in GRADERS.items()}


def mode_of(name: str, field: str = "mode") -> pb.Mode.ValueType:
    """The mode of that name.

    Raises:
        InvalidArgument: there is none; names `field`.
    """
    if name not in MODES:
        raise _unknown(field, name, MODES)
    return MODES[name]


def pipeline_of(name: str, field: str = "pipeline") -> pb.Pipeline.ValueType:
    """The pipeline of that name; raises as `mode_of`."""
    if name not in PIPELINES:
        raise _unknown(field, name, PIPELINES)
    return PIPELINES[name]


def grader_of(name: str, field: str = "grader") -> pb.Grader.ValueType:
    """The grader of that name; raises as `mode_of`."""
    if name not in GRADERS:
        raise _unknown(field, name, GRADERS)
    return GRADERS[name]


def split_of(name: str, field: str = "split") -> str:
    """`name` if it is a split; raises as `mode_of`."""
    if name not in SPLITS:
        raise _unknown(field, name, SPLITS)
    return name


def mode_name(value: int) -> str:
    """The word for a mode; "unspecified" for none."""
    return _MODE_NAMES.get(pb.Mode.ValueType(value), "unspecified")


def pipeline_name(value: int) -> str:
    """The word for a pipeline; "unspecified" for none."""
    return _PIPELINE_NAMES.get(pb.Pipeline.ValueType(value), "unspecified")


def grader_name(value: int) -> str:
    """The word for a grader; "unspecified" for none."""
    return _GRADER_NAMES.get(pb.Grader.ValueType(value), "unspecified")


def _unknown(field: str, name: str, known: Iterable[str]) -> InvalidArgument:
    return InvalidArgument(field, f"{name!r} is unknown", f"use one of {', '.join(known)}")
