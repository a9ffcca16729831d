"""`doctor` says what was tried and found, not what a setting promises."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regreen.cli.doctor import _PACKAGES, _namespaces, _packages
from regreen.cli.main import make_app

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
        ({"h11", "uvloop", "torch"}, {"learner: deepspeed"}),
        (
            set(),
            {f"{service}: {name}" for service, names in _PACKAGES.items() for name in names},
        ),
    ],
    ids=["one service whole", "one in part", "none"],
)
def test_a_service_that_is_left_out_is_no_trouble_and_half_a_one_is(monkeypatch, there, refused):
    known = {name for names in _PACKAGES.values() for name in names}
    real = importlib.util.find_spec

    def find(name: str):
        return (object() if name in there else None) if name in known else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    found = {item.name: item for item in _packages()}
    assert {name for name, item in found.items() if not item.ok} == refused
    assert all(item.remedy for item in found.values() if item.found != "installed")
