"""Names and digests of a spec: nothing that could be a path of this host gets through."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from regreen.common.v1 import common_pb2
from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks.model import FileRecord
from sandbox_svc.builders.base import DistFile, EnvironmentSpec, Pin
from sandbox_svc.builders.checked import MAX_PYTHONS, check_spec
from sandbox_svc.builders.interpreters import find_interpreter
from sandbox_svc.specs import changes_from_proto, spec_from_proto
from sandbox_svc.wheelhouse import DistStore, Wheel

SHA = "ab" * 32
NAME = "greet-1.0.tar.gz"
BAD_NAMES = ["/tmp/x/planted", "../x", "a/b", ".part-x", "", "-rf", "a\nb", "a b", "a" * 256]
BAD_SHAS = ["../../../priv/key", "AB" * 32, "", "ab" * 31, SHA + "\n", "/etc/passwd"]
BAD = [(name, SHA) for name in BAD_NAMES] + [(NAME, sha) for sha in BAD_SHAS]


def spec_with(field: str, file: pb.DistFile) -> pb.EnvironmentSpec:
    spec = pb.EnvironmentSpec()
    if field in ("source", "overlay_source"):
        getattr(spec, field).CopyFrom(file)
    else:
        getattr(spec, field).append(pb.Pin(name="a", version="1", files=[file]))
    return spec


@pytest.mark.parametrize("field", ["source", "overlay_source", "pins", "wheelhouse", "build_pins"])
@pytest.mark.parametrize(("name", "sha"), BAD)
def test_no_file_of_a_spec_may_be_a_path(field: str, name: str, sha: str) -> None:
    with pytest.raises(InvalidArgument, match=r"filename|sha256"):
        spec_from_proto(spec_with(field, pb.DistFile(filename=name, sha256=sha)))


@pytest.mark.parametrize(("name", "sha"), BAD)
def test_a_file_cannot_be_made_otherwise(name: str, sha: str) -> None:
    with pytest.raises(InvalidArgument):
        DistFile(name, sha)
    with pytest.raises(ValidationError):
        FileRecord(filename=name, sha256=sha)


def test_the_store_neither_reads_nor_makes_what_is_outside(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"secret")
    (tmp_path / "made").mkdir()
    store = DistStore(tmp_path / "store")
    (tmp_path / NAME).write_bytes(b"x")
    file = store.adopt(tmp_path / NAME)
    with pytest.raises(InvalidArgument):
        store.has("../../../key")
    planted = str(tmp_path / "made" / "planted.whl")
    with pytest.raises(InvalidArgument):
        store.house([Wheel("a", "1", planted, file.sha256)])
    with pytest.raises(InvalidArgument):
        store.record_built("k", "a", "1", planted, b"x")
    assert list((tmp_path / "made").iterdir()) == []


def test_names_of_releases_are_kept() -> None:
    for name in ("A_b-1.0+local.1-cp39-cp39-manylinux_2_17_x86_64.whl", "p-1!2.0.zip"):
        assert DistFile(name, SHA).filename == FileRecord(filename=name, sha256=SHA).filename


@pytest.mark.parametrize("python", ["**", "3.*", "../3.9", "3", "3.9.1", "3.9\n", "٣.٩"])
def test_an_interpreter_is_two_numbers(python: str) -> None:
    source = DistFile(NAME, SHA)
    spec = EnvironmentSpec("python", "greet", "1.0", python, source=source)
    with pytest.raises(InvalidArgument, match="python"):
        check_spec(spec)
    with pytest.raises(InvalidArgument, match="python"):
        find_interpreter(python)


def test_a_plain_spec_is_followed_and_the_interpreters_are_counted() -> None:
    source = DistFile(NAME, SHA)
    check_spec(EnvironmentSpec("python", "greet", "1.0", "3.9", source=source))
    many = tuple(f"3.{n}" for n in range(MAX_PYTHONS + 1))
    with pytest.raises(InvalidArgument, match="pythons"):
        check_spec(EnvironmentSpec("python", "greet", "1.0", "3.1", source=source, pythons=many))
    with pytest.raises(MissingDependency):
        find_interpreter("3.99")


def test_names_of_further_packages_are_checked() -> None:
    for pin in (Pin("../x", "1"), Pin("a", "1\n--index-url http://x")):
        spec = EnvironmentSpec(
            "python", "greet", "1.0", "3.9", source=DistFile(NAME, SHA), wheelhouse=(pin,)
        )
        with pytest.raises(InvalidArgument, match=r"^spec\.wheelhouse\[0\]: "):
            check_spec(spec)


@pytest.mark.parametrize("seconds", [2**62, -(2**62), -1, 2**63 - 1])
def test_a_timeout_beyond_sense_is_refused(seconds: int) -> None:
    spec = pb.EnvironmentSpec()
    spec.test.timeout.seconds = seconds
    with pytest.raises(InvalidArgument, match=r"spec\.test\.timeout"):
        spec_from_proto(spec)


@pytest.mark.parametrize(
    "spec",
    [
        pb.EnvironmentSpec(build_requirements=["setuptools"]),
        pb.EnvironmentSpec(exclude_newer="2024-01-01"),
    ],
)
def test_what_no_builder_follows_is_refused(spec: pb.EnvironmentSpec) -> None:
    with pytest.raises(InvalidArgument, match=r"is not supported; .*build_pins"):
        spec_from_proto(spec)


@pytest.mark.parametrize("kind", [0, 99, -1])
def test_a_change_of_no_known_kind_is_refused(kind: int) -> None:
    good = common_pb2.FileChange(path="a.py", content=b"x", kind=common_pb2.CHANGE_KIND_ADD)
    change = common_pb2.FileChange(path="a.py", content=b"x")
    change.kind = kind  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match=r"^changes\[1\]\.kind: .*say add, modify or delete"):
        changes_from_proto([good, change])
    with pytest.raises(InvalidArgument, match=r"^spec\.overlay\[0\]\.kind: "):
        spec_from_proto(pb.EnvironmentSpec(overlay=[change]))


def _release(name: str, **more: object) -> pb.Pin:
    whole = {"version": "1", "files": [{"filename": NAME, "sha256": SHA}], **more}
    return pb.Pin(name=name, **whole)


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ("pins[1]", {"pins": [_release("a"), _release("b", version="")]}),
        ("pins[1]", {"pins": [_release("a"), _release("# b")]}),
        ("pins[2].name", {"pins": [_release("a.b"), _release("c"), _release("A-B")]}),
        ("pins[1].files", {"pins": [_release("a"), _release("b", files=[])]}),
        (
            "pins[0].files[1].sha256",
            {
                "pins": [
                    _release("a", files=[{"filename": NAME, "sha256": SHA}, {"filename": NAME}])
                ]
            },
        ),
        ("wheelhouse[1]", {"wheelhouse": [_release("a"), _release("b c")]}),
        ("build_pins[0]", {"build_pins": [_release("")]}),
        (
            "overlay[1].path",
            {"overlay": [{"path": "a", "kind": 1}, {"path": "../b", "kind": 1}]},
        ),
    ],
)
def test_a_fault_is_named_by_its_place_in_the_request(field: str, fault: dict) -> None:
    source = pb.DistFile(filename=NAME, sha256=SHA)
    spec = pb.EnvironmentSpec(package="greet", python="3.11", source=source, **fault)
    with pytest.raises(InvalidArgument) as refused:
        check_spec(spec_from_proto(spec))
    assert refused.value.field == f"spec.{field}"
