"""Interpreters of the host: found when they come, gone when they go, asked once."""

import json
from pathlib import Path

import pytest

from regreen.rpc.errors import MissingDependency
from sandbox_svc.builders.interpreters import find_all, find_interpreter

VERSION = "3.98"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The versions of a pyenv that holds none yet."""
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    (tmp_path / "versions").mkdir()
    return tmp_path / "versions"


def install(root: Path, full: str = "3.98.1", *, exit_code: int = 0) -> Path:
    """A program that answers as a CPython would and counts how often it was asked."""
    program = root / full / "bin" / f"python{VERSION}"
    program.parent.mkdir(parents=True, exist_ok=True)
    prefix = str(root / full)
    answer = [[*map(int, full.split("."))], prefix, prefix, "cpython", str(program)]
    asked = root / full / "asked"
    program.write_text(
        f"#!/bin/sh\necho >> {asked}\necho '{json.dumps(answer)}'\nexit {exit_code}\n"
    )
    program.chmod(0o755)
    return asked


def test_one_installed_meanwhile_is_found_and_asked_once(root: Path) -> None:
    with pytest.raises(MissingDependency):
        find_interpreter(VERSION)
    asked = install(root)
    assert find_interpreter(VERSION).full_version == "3.98.1"
    assert find_interpreter(VERSION).prefix == root / "3.98.1"
    assert len(asked.read_text().splitlines()) == 1


def test_one_that_failed_is_asked_again(root: Path) -> None:
    asked = install(root, exit_code=1)
    for _ in range(2):
        with pytest.raises(MissingDependency):
            find_interpreter(VERSION)
    assert len(asked.read_text().splitlines()) == 2


def test_one_removed_or_replaced_is_not_believed(root: Path) -> None:
    asked = install(root)
    assert find_interpreter(VERSION).full_version == "3.98.1"
    install(root, "3.98.2")
    assert find_interpreter(VERSION).full_version == "3.98.2"
    (root / "3.98.2" / "bin" / f"python{VERSION}").unlink()
    (root / "3.98.1" / "bin" / f"python{VERSION}").unlink()
    with pytest.raises(MissingDependency):
        find_interpreter(VERSION)
    assert len(asked.read_text().splitlines()) == 1


def test_a_missing_one_names_where_it_was_looked_for(root: Path) -> None:
    with pytest.raises(MissingDependency) as caught:
        find_interpreter(VERSION)
    for place in (root, "/usr/local/bin", f"/opt/python{VERSION}/bin", "PATH"):
        assert str(place) in str(caught.value)
    for version in find_all():
        assert version in str(caught.value)
