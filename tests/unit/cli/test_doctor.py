"""`doctor` says what was tried and found, not what a setting promises."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regreen.cli.doctor import Finding, _certificates, _namespaces, _services
from regreen.cli.main import make_app
from regreen.stack import parts
from tests.fixtures.certs import DAY, Certs

LOOK = (
    "from regreen.cli.doctor import _namespaces; found = _namespaces();"
    "print(found.ok, found.found, found.remedy, sep='|')"
)


def test_a_namespace_that_cannot_be_made_is_no_matter_what_is_allowed() -> None:
    # A process whose user is not mapped may not make user namespaces, whatever the settings say.
    unshare = shutil.which("unshare")
    if unshare is None or not _namespaces().ok:
        pytest.skip("user namespaces cannot be made here")
    told = subprocess.run(
        [unshare, "-U", sys.executable, "-c", LOOK], capture_output=True, text=True, check=True
    )
    ok, found, remedy = told.stdout.strip().split("|")
    assert (ok, found.split(",")[0]) == ("False", "unshare: Operation not permitted")
    assert "user.max_user_namespaces=" in found
    assert "docker" in remedy


def test_interpreters_are_listed_without_a_stack(tmp_path: Path) -> None:
    told = CliRunner().invoke(make_app(), ["doctor", "--home", str(tmp_path), "--json"])
    found = {row["name"]: row for row in map(json.loads, told.stdout.splitlines())}
    assert found["stack"]["found"] == "not running"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert here in found["interpreters"]["found"].split(", ")


@pytest.mark.parametrize(
    ("there", "refused"),
    [
        ({"h11", "uvloop"}, set()),
        ({"h11", "uvloop", "torch"}, {"learner"}),
        (
            {"starlette", "uvicorn", "h11", "transformers"},
            {"sandbox", "dataset", "policy", "learner"},
        ),
    ],
    ids=["one service whole", "one without what is usual", "none whole"],
)
def test_a_service_that_is_left_out_is_no_trouble_and_half_a_one_is(monkeypatch, there, refused):
    known = {
        one for table in (parts.NEEDS, parts.USUAL) for names in table.values() for one in names
    }
    real = importlib.util.find_spec

    def find(name: str):
        return (object() if name in there else None) if name in known else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    found = {item.name.removeprefix("service: "): item for item in _services()}
    assert found.keys() == parts.NEEDS.keys()
    assert {name for name, item in found.items() if not item.ok} == refused
    assert all(item.remedy for item in found.values() if item.found != "installed")


def test_a_certificate_that_ends_soon_is_told(tmp_path: Path) -> None:
    def certificates() -> dict[str, Finding]:
        return {found.name: found for found in _certificates(tmp_path)}

    assert certificates() == {}
    certs = Certs.make(tmp_path / "certs")
    assert certificates()["certificates"].ok
    certs.service("policy", age=1.9 * DAY)
    told = certificates()["certificates"]
    assert (told.ok, told.remedy) == (False, "run `regreen certs renew`")
    assert told.found.startswith("policy ends first, at ")
