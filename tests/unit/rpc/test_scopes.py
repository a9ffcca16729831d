"""The table of scopes: every method of every contract stands in it, and nothing else."""

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from regreen.rpc.scopes import AREAS, KNOWN, SCOPES, covers

ROOT = Path(__file__).resolve().parents[3]


def methods() -> dict[str, str]:
    """Idempotency prose aside, what the golden descriptors and the protos hold: name to area."""
    golden = descriptor_pb2.FileDescriptorSet.FromString(
        (ROOT / "proto/golden/v1.binpb").read_bytes()
    )
    return {
        f"{file.package}.{service.name}/{method.name}": file.package.split(".")[1]
        for file in golden.file
        if file.package.startswith("regreen.")
        for service in file.service
        for method in service.method
    }


def stubs() -> set[str]:
    """Methods that servers of this checkout really add."""
    found = set()
    for path in sorted((ROOT / "regreen").glob("*/v1/*_pb2.py")):
        module = __import__(
            ".".join(path.relative_to(ROOT).with_suffix("").parts), fromlist=["DESCRIPTOR"]
        )
        for service in module.DESCRIPTOR.services_by_name.values():
            found |= {f"{service.full_name}/{method.name}" for method in service.methods}
    return found


def test_every_method_has_a_scope_and_no_other_has():
    assert set(SCOPES) == stubs()
    assert methods().keys() <= SCOPES.keys()
    assert len(SCOPES) >= 80


def test_scopes_are_of_the_service_that_is_called():
    for method, scope in SCOPES.items():
        assert scope in KNOWN, method
        assert scope.partition(":")[0] == method.split(".")[1]
    assert {scope.partition(":")[0] for scope in SCOPES.values()} == set(AREAS)


@pytest.mark.parametrize("method", sorted(SCOPES))
def test_what_is_called_a_read_is_one(method):
    verb = method.partition("/")[2]
    reads = ("Get", "List", "Read", "Find", "Diff", "Export", "Search", "Watch", "Estimate")
    harmless = verb.startswith((*reads, "Render", "Tokenize"))
    assert SCOPES[method].endswith(":read") == harmless


def test_levels_cover_those_below_in_their_service_alone():
    assert covers(["sandbox:write"], "sandbox:read")
    assert covers(["sandbox:admin"], "sandbox:write")
    assert not covers(["sandbox:read"], "sandbox:write")
    assert not covers(["dataset:admin", "policy:admin"], "sandbox:read")
    assert not covers([], "sandbox:read")
