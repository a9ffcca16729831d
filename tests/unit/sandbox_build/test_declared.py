"""What settings declare of tests, and what files of tests say, by their text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_svc.builders.declared import declared
from sandbox_svc.builders.protect import pytest_settings
from sandbox_svc.builders.python import INBOX


def settings(**files: str) -> dict[str, str]:
    """By path, with two underscores for a slash."""
    names = {name: name.replace("__", "/").replace("_", ".", 1) for name in files}
    return {
        path: pytest_settings(path.rpartition("/")[2], files[name].encode())
        for name, path in names.items()
    }


@pytest.mark.parametrize(
    "files",
    [
        {"setup_cfg": "[tool:pytest]\npython_files =\n    check_*.py\n    spec/*.py\n"},
        {"tox_ini": "[pytest]\npython_files = check_*.py spec/*.py\n"},
        {"pytest_ini": "[pytest]\npython_files: check_*.py spec/*.py\n"},
        {"pyproject_toml": "[tool.pytest.ini_options]\npython_files = 'check_*.py spec/*.py'\n"},
        {"pyproject_toml": "[tool.pytest]\npython_files = ['check_*.py', 'spec/*.py']\n"},
        {"pytest_toml": "[pytest]\npython_files = ['check_*.py', 'spec/*.py']\n"},
    ],
)
def test_patterns_of_every_settings_file_are_read(files: dict[str, str]) -> None:
    found = declared(settings(**files), ())
    for path in ("check_a.py", "deep/er/check_a.py", "spec/a.py", "deep/spec/a.py"):
        assert found.matches(path)
    for path in ("a.py", "check_a.txt", "spec.py"):
        assert not found.matches(path)


def test_a_pattern_for_everything_leaves_it_to_the_text() -> None:
    found = declared(
        settings(setup_cfg="[tool:pytest]\npython_files = *.py\ntestpaths = a ./b\n"), ()
    )
    assert found.roots == ("a", "b")
    assert not found.matches("a/x.py")
    assert found.may_match("a/x.py")
    assert not found.may_match("c/x.py")


def test_settings_count_where_pytest_may_take_them() -> None:
    files = settings(
        sub__tox_ini=(
            "[pytest]\npythonpath = . ../python /work/repo/abs /other\naddopts = -q '-k a'\n"
        ),
        other__tox_ini="[pytest]\npythonpath = no\n",
    )
    assert declared(files, ()).places == ()
    found = declared(files, ("sub/checks", "-p", "one.two", "-pthree", "-p", "no:four"))
    assert found.places == ("sub", "python", "abs", ".")
    assert found.addopts == {"sub/tox.ini": "-q '-k a'"}
    assert found.plugins == ("one.two", "three")
    assert found.roots == ("sub/checks",)
    assert declared(files, ("-c", "other/tox.ini")).places == ("other/no",)


def test_names_that_settings_choose_are_no_usual_ones() -> None:
    assert declared(settings(setup_cfg="[tool:pytest]\naddopts = -q\n"), ()).usual
    assert not declared(settings(setup_cfg="[tool:pytest]\npython_classes = Check\n"), ()).usual


def test_bytes_that_are_no_settings_declare_nothing() -> None:
    for content in (b"\xff", b"[tool.pytest", b"[tool]\npytest = 1\n", b"[tool.pytest]\nx = 1\n"):
        text = pytest_settings("pyproject.toml", content)
        assert declared({"pyproject.toml": text}, ()).patterns == ()


SOURCE = """
import pytest
pytest_plugins = ["one", "two.three"]
def test_a(): pass
@pytest.mark.skip
async def test_b(): pass
@pytest.fixture
def test_no(): pass
def test_twice(): pass
def test_twice(): pass
def test_gone(): pass
del test_gone
test_bound = test_over = None
def test_over(): pass
if pytest:
    def test_inside(): pass
class TestC(Anything):
    def test_d(self): pass
    def helper(self): pass
class Cases(unittest.TestCase):
    def test_e(self): pass
class TestMade:
    def __init__(self): pass
    def test_no(self): pass
class TestNot:
    __test__ = False
    def test_no(self): pass
class Helper:
    def test_no(self): pass
"""


def test_what_is_in_a_file_for_certain(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_bytes(b"\x00\xff(" * 100)
    (tmp_path / "c.py").write_text("collect_ignore = []\n" + "(" * 5000)
    asked = json.dumps(["a.py", "b.py", "c.py", "gone.py"])
    command = [sys.executable, "-I", "-S", str(INBOX / "read_tests.py")]
    done = subprocess.run(
        command, input=asked, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["a.py"] == {
        "tests": ["test_a", "test_b", "TestC::test_d", "Cases::test_e"],
        "plugins": ["one", "two.three"],
        "chooses": False,
    }
    nothing = {"tests": [], "plugins": [], "chooses": False}
    assert (found["b.py"], found["gone.py"]) == (nothing, nothing)
    assert found["c.py"] == {**nothing, "chooses": True}
