"""The runner under pytest releases from before 3.6, whose tests know their marks otherwise."""

import subprocess
from pathlib import Path

import pytest

from regreen.pkgindex import find_uv
from regreen.rpc.errors import MissingDependency
from sandbox_svc.builders.interpreters import find_interpreter
from tests.unit.sandbox_build import test_runner

PYTHON = "3.7"
"""The newest that these releases rewrite assertions on."""
MARKED = """
import sys
import unittest
import pytest
import subject


@pytest.mark.skip(reason="by a mark")
def test_skipped(): pass


@pytest.mark.skipif(sys.version_info > (3,), reason="by a condition")
class TestSkipped:
    def test_inside(self): pass


@pytest.mark.xfail
def test_expected():
    assert False


def test_elsewhere():
    subject.skip()


@unittest.skip("by unittest")
class Old(unittest.TestCase):
    def test_old(self): pass


@pytest.mark.parametrize("n", [1, 2])
def test_plain(n):
    assert n == 1
"""


def old_python(folder: Path, release: str) -> str:
    """An interpreter with an old pytest, made from the package registry."""
    uv, home = find_uv(), folder / "env"
    try:
        python = find_interpreter(PYTHON).executable
    except MissingDependency as error:
        pytest.skip(str(error))
    for command in (
        ["venv", "--quiet", "--python", str(python), str(home)],
        ["pip", "install", "--quiet", "--python", str(home), f"pytest=={release}", "setuptools<60"],
    ):
        done = subprocess.run([uv, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return str(home / "bin" / "python")


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("release", ["3.0.7", "3.5.1"])
def test_who_passed_a_test_over_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    monkeypatch.setattr(test_runner, "PYTHON", old_python(tmp_path, release))
    monkeypatch.setattr(test_runner, "AUTOLOAD", "")
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "subject.py").write_text("def skip():\n    import pytest\n    pytest.skip('no')\n")
    (repo / "test_marked.py").write_text(MARKED)
    found = test_runner.run(repo, "test_marked.py")
    assert (found.tampered, found.crash, found.complete) == ("", "", True), found.log
    told = {id.partition("::")[2]: (test.outcome, test.own) for id, test in found.tests.items()}
    own = {name: outcome for name, (outcome, own) in told.items() if own}
    assert own == {
        "test_skipped": "skipped", "TestSkipped::()::test_inside": "skipped",
        "test_expected": "xfailed", "Old::test_old": "skipped",
        "test_plain[1]": "passed", "test_plain[2]": "failed",
    }  # fmt: skip
    assert told["test_elsewhere"] == ("skipped", False)
    assert found.status == 1
