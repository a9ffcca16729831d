"""The test runner that goes into sandboxes, on this interpreter: what it sees and what it bears."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_svc.backends.base import Captured, EndReason, ExecResult
from sandbox_svc.builders.inbox import run_tests
from sandbox_svc.builders.testrun import TestRun, pytest_arguments, read_run

KEY = b"k" * 32
RUNNER = Path(run_tests.__file__)
PYTHON = os.environ.get("REGREEN_RUNNER_PYTHON", sys.executable)
"""Another interpreter with its own pytest and plugins can be put to the same tests."""
AUTOLOAD = "1" if sys.executable == PYTHON else ""

FORGERIES = {
    "reports": (
        "import sys\n"
        "r = sys.modules['_py' + 'test.reports'].TestReport\n"
        "old = r.from_item_and_call.__func__\n"
        "def forge(cls, item, call):\n"
        "    call.excinfo = None\n"
        "    return old(cls, item, call)\n"
        "r.from_item_and_call = classmethod(forge)\n"
    ),
    "outcome hidden by a property": (
        "import sys\n"
        "r = sys.modules['_pytest.reports'].TestReport\n"
        "r.passed, r.failed = property(lambda s: True), property(lambda s: False)\n"
        "r.outcome = property(lambda s: 'passed', lambda s, v: None)\n"
    ),
    "code exchanged": (
        "import sys\n"
        "def runtest(self): pass\n"
        "sys.modules['_pytest.python'].Function.runtest.__code__ = runtest.__code__\n"
    ),
    "runner": (
        "import sys\n"
        "m = sys.modules['_pytest.runner']\n"
        "old = m.call_and_report\n"
        "def new(item, when, log=True, **k):\n"
        "    item.runtest = lambda: None\n"
        "    return old(item, when, log, **k)\n"
        "m.call_and_report = new\n"
    ),
    "assertions of unittest": (
        "import unittest\nunittest.case.TestCase.assertEqual = lambda *a, **k: None\n"
    ),
    "put back afterwards": (
        "import sys\n"
        "m = sys.modules['_pytest.python']\n"
        "old = m.Function.runtest\n"
        "m.Function.runtest = lambda self: None\n"
        "import atexit, threading\n"
        "def back(self): m.Function.runtest = old\n"
        "m.Function.teardown = back\n"
    ),
    "rewriting of tests": (
        "import sys\n"
        "m = sys.modules['_pytest.assertion.rewrite']\n"
        "old = m.rewrite_asserts\n"
        "m.rewrite_asserts = lambda *a, **k: old(*a, **k)\n"
    ),
    "loading of tests": (
        "import sys\n"
        "m = sys.modules['_pytest.assertion.rewrite']\n"
        "old = m.AssertionRewritingHook.exec_module\n"
        "m.AssertionRewritingHook.exec_module = lambda *a: old(*a)\n"
    ),
    "byte code of tests": (
        "import sys\nsys.modules['_pytest.assertion.rewrite']._read_pyc = lambda *a: None\n"
    ),
    "fixtures": (
        "import sys\n"
        "sys.modules['_pytest.fixtures'].FixtureRequest.getfixturevalue = lambda *a: None\n"
    ),
    "a plugin that comes later": (
        "import sys\nsys.modules['_pytest.doctest'].DoctestItem.runtest = lambda self: None\n"
    ),
    "plugin": (
        "import sys\n"
        "frame = sys._getframe()\n"
        "while frame is not None:\n"
        "    item = frame.f_locals.get('item') or frame.f_locals.get('session')\n"
        "    if hasattr(item, 'config'):\n"
        "        class Evil:\n"
        "            def pytest_pyfunc_call(self, pyfuncitem): return True\n"
        "        item.config.pluginmanager.register(Evil())\n"
        "        break\n"
        "    frame = frame.f_back\n"
    ),
}
TESTS = """
import unittest
import pytest
import subject


@pytest.mark.parametrize("n", range(6))
def test_wrong(n):
    import lazy
    assert n < 0


class TestGroup:
    def test_wrong(self):
        assert False


class Old(unittest.TestCase):
    def test_old(self):
        self.assertEqual(1, 2)
"""


def run(folder: Path, *arguments: str, **environment: str) -> TestRun:
    """One run over `folder`, read as the validator reads it."""
    reading, writing = os.pipe()
    setup = {
        "key": KEY.hex(),
        "arguments": pytest_arguments(arguments),
        "coverage": False,
        "root": str(folder),
        "skip": [],
    }
    plain = {"PYTHONPATH": "", "REGREEN_PYTHONPATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": AUTOLOAD}
    env = {**os.environ, **plain, **environment, "REGREEN_CHANNEL_FD": str(writing)}
    env.pop("PYTEST_ADDOPTS", None)
    try:
        done = subprocess.run(
            [PYTHON, "-S", str(RUNNER)], cwd=folder, env=env, input=json.dumps(setup).encode(),
            capture_output=True, pass_fds=(writing,), timeout=60, check=False,
        )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            channel = stream.read()
    except subprocess.TimeoutExpired:
        os.close(reading)
        raise
    text = Captured(done.stdout + done.stderr, b"", len(done.stdout) + len(done.stderr))
    result = ExecResult(EndReason.EXIT, done.returncode, stdout=text, channel=channel)
    return read_run(result, KEY)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "subject.py").write_text("")
    (tmp_path / "lazy.py").write_text("")
    (tmp_path / "test_subject.py").write_text(TESTS)
    return tmp_path


SEES = """
import os, sys
with open({told!r}, "w") as out:
    print("REGREEN_CHANNEL_FD" in os.environ, os.readlink("/proc/self/fd/0"), file=out)
"""


@pytest.mark.parametrize(
    "path", ["sitecustomize.py", "usercustomize/__init__.py", "json/__init__.py", "site.py"]
)
def test_nothing_of_the_repository_runs_before_the_runner_has_its_key(
    repo: Path, tmp_path: Path, path: str
) -> None:
    told = tmp_path / "told"
    (repo / path).parent.mkdir(exist_ok=True)
    (repo / path).write_text(SEES.format(told=str(told)))
    found = run(repo, REGREEN_PYTHONPATH=str(repo), PYTHONNOUSERSITE="")
    assert found.complete, found.log
    assert not found.tampered
    if path == "sitecustomize.py" or told.exists():
        assert told.read_text() == "False /dev/null\n"


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_run_is_not_believed(repo: Path, name: str) -> None:
    (repo / ("subject.py" if name == "reports" else "lazy.py")).write_text(FORGERIES[name])
    found = run(repo)
    assert found.tampered or found.replaced, found.log


def test_an_honest_run_is_believed_and_shows_no_control(repo: Path) -> None:
    (repo / "test_more.py").write_text("import pytest\n\n\ndef test_right(): pass\n")
    found = run(repo)
    assert (found.tampered, found.replaced, found.complete) == ("", frozenset(), True), found.log
    outcomes = {i.partition("::")[2]: t.outcome for i, t in found.tests.items()}
    assert outcomes == {
        **{f"test_wrong[{n}]": "failed" for n in range(6)},
        "TestGroup::test_wrong": "failed",
        "Old::test_old": "failed",
        "test_right": "passed",
    }
    assert found.status == 1
    assert "8 failed" in found.log
    assert "control" not in found.log


FULL = """
import unittest
import pytest
EVENTS = []


def setup_module(module):
    EVENTS.append("up")


def teardown_module(module):
    assert EVENTS == ["up"], EVENTS


@pytest.fixture(scope="module")
def shared():
    EVENTS.append("shared")
    yield EVENTS
    EVENTS.remove("shared")


@pytest.fixture(autouse=True)
def counted(request):
    assert request.function.__name__.startswith("test_")


@pytest.mark.parametrize("n", range(9))
def test_shared_once(shared, n):
    assert shared == ["up", "shared"]


class TestClass:
    @classmethod
    def setup_class(cls):
        cls.made = getattr(cls, "made", 0) + 1

    @pytest.mark.parametrize("n", range(5))
    def test_made_once(self, n):
        assert self.made == 1


class Old(unittest.TestCase):
    made = 0

    @classmethod
    def setUpClass(cls):
        cls.made += 1

    def test_a(self):
        self.assertEqual(self.made, 1)

    def test_b(self):
        self.assertEqual(self.made, 1)

    test_c = test_d = test_b


@pytest.mark.skip
def test_skipped():
    raise SystemExit(3)


@pytest.mark.xfail
def test_expected():
    assert False
"""


def test_controls_leave_fixtures_and_order_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_runtest_setup(item):\n    assert item.fixturenames is not None\n"
    )
    (tmp_path / "test_full.py").write_text(FULL)
    found = run(tmp_path)
    assert not found.tampered, found.tampered
    assert {t.outcome for t in found.tests.values()} == {"passed", "skipped", "xfailed"}, found.log
    assert found.status == 0, found.log


def test_the_repository_is_not_on_the_path_while_pytest_is_imported(repo: Path) -> None:
    (repo / "iniconfig.py").write_text("raise SystemExit('taken')\n")
    site = repo / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(repo)!r})\n")
    found = run(repo, PYTHONPATH=str(site))
    assert not found.crash
    assert found.tests


INCREMENTAL = """
import pytest


def pytest_runtest_makereport(item, call):
    if call.excinfo is not None:
        item.parent._previousfailed = item


def pytest_runtest_setup(item):
    before = getattr(item.parent, "_previousfailed", None)
    if before is not None:
        pytest.xfail("previous test failed (%s)" % before.name)


def pytest_exception_interact(node):
    node.parent._previousfailed = node
"""


def test_hooks_of_the_repository_see_no_control_beside_a_real_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(INCREMENTAL)
    for name in "abcdef":
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("import pytest\npytestmark = pytest.mark.xfail\n")
        (folder / f"test_{name}.py").write_text(
            "def test_one(): pass\n\n\nclass TestGroup:\n"
            "    def test_two(self): pass\n\n    def test_three(self): pass\n"
        )
    found = run(tmp_path)
    assert (found.tampered, found.replaced, found.status) == ("", frozenset(), 0), found.log
    assert {t.outcome for t in found.tests.values()} <= {"passed", "xpassed"}, found.log
    assert len(found.tests) == 18


def test_controls_leave_the_fixtures_of_a_package_alone(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "conftest.py").write_text(
        "import pytest\nMADE = []\n\n\n@pytest.fixture(scope='package')\n"
        "def once():\n    MADE.append(1)\n    yield len(MADE)\n"
    )
    for number in range(8):
        (package / f"test_{number}.py").write_text("def test_it(once): assert once == 1\n")
    found = run(tmp_path)
    assert (found.tampered, found.status) == ("", 0), found.log


def test_a_repository_that_pytest_needs_is_used_and_named(repo: Path) -> None:
    site = repo / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'pluggy' and {str(repo)!r} not in sys.path:\n"
        "            raise ImportError('pluggy is only in the repository')\n"
        f"sys.meta_path.insert(0, Absent())\nsys.path.append({str(repo)!r})\n"
    )
    found = run(repo, PYTHONPATH=str(site))
    assert found.crash == ""
    assert found.replaced == {"pytest from the repository"}
    assert found.tests
