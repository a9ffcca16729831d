"""What a path is, and that the validator agrees where Python or pytest take up files by name."""

import pytest

from judge_svc.paths import PathKind, kind_of
from sandbox_svc.builders.protect import by_name

STARTUP = [
    *("sitecustomize.py", "a/usercustomize.py", "sitecustomize/__init__.py", "x.pth", "pyvenv.cfg"),
    *("usercustomize.so", "SITECUSTOMIZE/__init__.py", "sitecustomize.pyc", "python3._pth"),
]
SETTINGS = ["pytest.ini", "a/.pytest.ini", "pytest.toml", "a/b/.pytest.toml"]


@pytest.mark.parametrize("path", STARTUP)
def test_start_up_files_are_so_for_both(path: str) -> None:
    assert kind_of(path) is PathKind.STARTUP
    assert by_name(path, ()) == "plugin"


@pytest.mark.parametrize("path", SETTINGS)
def test_settings_of_pytest_are_so_for_both(path: str) -> None:
    assert kind_of(path) is PathKind.INI
    assert by_name(path, ()) == "validation-configuration"


@pytest.mark.parametrize("path", ["docs/sitecustomize.md", "pkg/customize.py", "conf.pth.py"])
def test_other_files_are_neither(path: str) -> None:
    assert kind_of(path) in (PathKind.DATA, PathKind.SOURCE)
    assert by_name(path, ()) == ""
