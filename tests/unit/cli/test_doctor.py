"""`doctor` says what was tried and found, not what a setting promises."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regreen.cli.doctor import _namespaces
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
