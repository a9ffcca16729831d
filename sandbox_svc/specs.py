"""Translates environment specs and diffs of the wire into the builder's own.

- Field by field and total: every field of the message is read, none is invented.
- A field that no builder follows is refused, never passed over.
- Order of repeated fields is kept; maps become sorted.
- A file is named by a digest and a plain name; what could be a path is refused, with its field.
"""

from collections.abc import Iterable, Sequence

from regreen.allowlist import AllowList
from regreen.common.v1 import common_pb2
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox.v1 import sandbox_pb2 as pb
from sandbox_svc.builders.base import (
    DistFile,
    EnvironmentSpec,
    FileChange,
    Pin,
    TestSpec,
    check_filename,
    check_sha256,
)
from sandbox_svc.translate import seconds

DEFAULT_TEST_TIMEOUT_S = 300.0
_KINDS = (
    common_pb2.CHANGE_KIND_ADD,
    common_pb2.CHANGE_KIND_MODIFY,
    common_pb2.CHANGE_KIND_DELETE,
)


def changes_from_proto(
    changes: "list[common_pb2.FileChange]", field: str = "changes"
) -> tuple[FileChange, ...]:
    """A diff of the wire as builder changes.

    Raises:
        InvalidArgument: a change does not say what happened.
    """
    found = []
    for number, change in enumerate(changes):
        if change.kind not in _KINDS:
            raise InvalidArgument(
                f"{field}[{number}].kind",
                f"of {change.path[:200]!r} is not set, or not known",
                "say add, modify or delete",
            )
        deleted = change.kind == common_pb2.CHANGE_KIND_DELETE
        content = None if deleted else change.content
        found.append(FileChange(change.path, content, change.mode or 0o644))
    return tuple(found)


def spec_from_proto(spec: pb.EnvironmentSpec) -> EnvironmentSpec:
    """The builder's form of a spec.

    Raises:
        InvalidArgument: a field is malformed.
    """
    for name in ("build_requirements", "exclude_newer"):
        if getattr(spec, name):
            raise InvalidArgument(
                f"spec.{name}", "is not supported", "name what builds the project in build_pins"
            )
    tree = spec.source_tree if spec.HasField("source_tree") else None
    return EnvironmentSpec(
        builder=spec.builder,
        package=spec.package,
        version=spec.version,
        python=spec.python,
        source=_file(spec.source, "source") if spec.HasField("source") else None,
        source_tree=tree.sha256 if tree else "",
        source_tree_bytes=tree.size_bytes if tree else 0,
        pins=_pins(spec.pins, "pins"),
        wheelhouse=_pins(spec.wheelhouse, "wheelhouse"),
        install_mode=spec.install_mode or "editable",
        build_pins=_pins(spec.build_pins, "build_pins"),
        test=_test(spec.test),
        overlay=changes_from_proto(list(spec.overlay), "spec.overlay"),
        overlay_source=(
            _file(spec.overlay_source, "overlay_source")
            if spec.HasField("overlay_source")
            else None
        ),
        overlay_paths=tuple(spec.overlay_paths),
        pythons=tuple(spec.pythons),
        egress=_egress(spec.egress),
    )


def _egress(entries: Sequence[str]) -> tuple[str, ...]:
    AllowList.parse(entries, "spec.egress")
    return tuple(entries)


def _file(file: pb.DistFile, where: str) -> DistFile:
    check_filename(file.filename, f"spec.{where}.filename")
    check_sha256(file.sha256, f"spec.{where}.sha256")
    return DistFile(file.filename, file.sha256)


def _pins(pins: "Iterable[pb.Pin]", where: str) -> tuple[Pin, ...]:
    return tuple(_pin(pin, f"{where}[{number}].files") for number, pin in enumerate(pins))


def _pin(pin: pb.Pin, where: str) -> Pin:
    files = (_file(file, f"{where}[{number}]") for number, file in enumerate(pin.files))
    return Pin(pin.name, pin.version, tuple(files))


def _test(test: pb.TestSpec) -> TestSpec:
    return TestSpec(
        arguments=tuple(test.arguments),
        environment=dict(sorted(test.environment.items())),
        timeout_s=seconds(test.timeout, "spec.test.timeout") or DEFAULT_TEST_TIMEOUT_S,
        protected_paths=tuple(test.protected_paths),
        fail_to_pass=tuple(test.fail_to_pass),
        unstable=tuple(test.unstable),
    )
