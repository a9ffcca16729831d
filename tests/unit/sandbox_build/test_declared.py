"""What settings declare of tests, and what files of tests say, by their text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.builders.base import FileChange
from sandbox_svc.builders.declared import declared
from sandbox_svc.builders.protect import (
    MAX_SETTINGS_BYTES,
    paths_of,
    pytest_settings,
    split_changes,
)
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
    text = "[tool:pytest]\npython_files = *.py\ntestpaths = a ./b\n"
    found = declared(settings(setup_cfg=text), ())
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


def test_names_of_tests_are_those_that_all_settings_choose() -> None:
    usual = declared(settings(setup_cfg="[tool:pytest]\naddopts = -q\n"), ())
    chosen = declared(
        settings(
            setup_cfg="[tool:pytest]\npython_classes = TestCheck *Spec\n",
            tox_ini="[pytest]\npython_functions = test_* check\n",
        ),
        (),
    )
    names = ("test_a", "testing", "TestCheck::test_a", "TestOther::test_a", "TestSpec::test_a")
    assert all(map(usual.calls_test, names))
    told = [name for name in names if chosen.calls_test(name)]
    assert told == ["test_a", "TestCheck::test_a", "TestSpec::test_a"]


def test_patterns_count_where_tests_lie() -> None:
    files = settings(setup_cfg="[tool:pytest]\npython_files = *test*.py\ntestpaths = spec\n")
    found = declared(files, ())
    assert found.matches("spec/latest.py")
    assert not found.matches("greet/latest.py")
    assert not declared(files, ("a.py",)).matches("greet/latest.py")
    assert declared(files, (".",)).matches("greet/latest.py")


def test_values_of_options_are_no_paths() -> None:
    words = ("-k", "parser", "-m", "slow", "-o", "x=y", "-c", "ci/t.ini", "tests")
    assert paths_of(words) == ("ci/t.ini", "tests")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("setup.cfg", b"[tool:pytest]\na = " + b"b" * MAX_SETTINGS_BYTES),
        ("pyproject.toml", b"[tool.pytest]\na" + b".a" * 1000 + b" = 1\n"),
        ("pytest.toml", b"[" * 3000),
    ],
)
def test_settings_that_take_too_long_are_compared_by_their_bytes(name: str, content: bytes) -> None:
    assert pytest_settings(name, content).startswith("unreadable ")


def test_blanks_in_a_line_are_no_work() -> None:
    line = b"[tool:pytest]\na" + b" " * 200_000
    assert "b" in pytest_settings("setup.cfg", line + b"b\n")
    assert pytest_settings("setup.cfg", b"[pytest]\na =  b = c\n") == pytest_settings(
        "setup.cfg", b"[pytest]\na=b = c\n"
    )


def test_settings_of_one_diff_are_bounded() -> None:
    changes = [FileChange(f"{n}/setup.cfg", b"#" * (200 << 10)) for n in range(6)]
    with pytest.raises(InvalidArgument, match="settings files"):
        split_changes(changes, (), {})


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
@pytest.mark.usefixtures("test_no")
@mock.patch.object(test_a, "x")
def test_used(): pass
@parameterized.expand([1])
def test_expanded(): pass
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
class Mixin(FooTestCase):
    def test_no(self): pass
class TestLess:
    @property
    def test_data(self): pass
    def test_gone(self): pass
    def test_f(self): pass
del TestLess.test_gone
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
        "tests": ["test_a", "test_b", "test_used", "TestC::test_d", "Cases::test_e"],
        "plugins": ["one", "two.three"],
        "chooses": False,
    }
    nothing = {"tests": [], "plugins": [], "chooses": True}
    assert found == {"a.py": found["a.py"], **dict.fromkeys(("b.py", "c.py", "gone.py"), nothing)}


@pytest.mark.parametrize(
    ("source", "chooses"),
    [
        ("x = 1  # type: ignore\n", False),
        ("def pytest_collection_modifyitems(items):\n    items[0].add_marker('x')\n", False),
        ("def pytest_collection_modifyitems(items):\n    items[:] = []\n", True),
        ("def pytest_collection_modifyitems(items):\n    items.remove(items[0])\n", True),
        ("collect_ignore = ['a.py']\n", True),
        ("def pytest_ignore_collect(path): pass\n", True),
    ],
)
def test_whether_a_configuration_may_leave_tests_out(
    tmp_path: Path, source: str, chooses: bool
) -> None:
    (tmp_path / "conftest.py").write_text(source)
    command = [sys.executable, "-I", "-S", str(INBOX / "read_tests.py")]
    done = subprocess.run(
        command, input='["conftest.py"]', cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["conftest.py"]["chooses"] is chooses
