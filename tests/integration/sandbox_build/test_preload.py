"""What the test runner may load ahead, and when it hands it out: real processes, no sandbox."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sandbox_svc.builders.testrun import pytest_arguments

RUNNER = Path(__file__).parents[3] / "sandbox_svc/builders/inbox/run_tests.py"
PLUGINS = ("xdist", "asyncio", "timeout", "anyio", "hypothesispytest", "cacheprovider")
PLAIN = "VALUE = 41\n"


def frames(data: bytes) -> list[dict[str, Any]]:
    found, offset = [], 0
    while offset < len(data):
        (length,) = struct.unpack_from(">I", data, offset)
        found.append(json.loads(data[offset + 36 : offset + 36 + length]))
        offset += 36 + length
    return found


@dataclass(slots=True)
class Case:
    """A repository, and packages beside it that it imports."""

    home: Path
    names: list[Any] = field(default_factory=list)

    def write(self, path: str, text: str) -> None:
        target = self.home / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def _start(self) -> tuple["subprocess.Popen[bytes]", int]:
        read, write = os.pipe()
        env = {
            "PATH": "/usr/bin:/bin", "PYTHONPATH": str(self.home / "packages"),
            "PYTHONHASHSEED": "0", "REGREEN_CHANNEL_FD": str(write),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, str(RUNNER)], cwd=self.home / "repo", env=env, pass_fds=[write],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(write)
        return process, read

    def _setup(self, *more: str, **options: Any) -> bytes:
        arguments = pytest_arguments([*(a for p in PLUGINS for a in ("-p", f"no:{p}")), *more])
        return json.dumps(
            {
                "key": "00" * 32, "arguments": [*arguments, "tests"], "coverage": False,
                "root": str(self.home / "repo"), "skip": [], "survey": False, **options,
            }
        ).encode()  # fmt: skip

    def cold(self, *more: str, **options: Any) -> list[dict[str, Any]]:
        process, read = self._start()
        with os.fdopen(read, "rb") as channel:
            process.communicate(self._setup(*more, **options))
            return frames(channel.read())

    def survey(self) -> list[str]:
        (told,) = [f for f in self.cold("--collect-only", survey=True) if f["t"] == "survey"]
        self.names = told["names"]
        return [name for name, _ in self.names]

    def ahead(self, before: Any = lambda: None) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """What is refused, and what a run says that goes on after `before` was called."""
        process, read = self._start()
        first = {"key": "00" * 32, "names": self.names, "deep": True}
        assert process.stdin is not None
        process.stdin.write(json.dumps({**first, "root": str(self.home / "repo")}).encode() + b"\n")
        process.stdin.flush()
        with os.fdopen(read, "rb", buffering=0) as channel:
            (report,) = frames(channel.read(1 << 20))
            before()
            process.communicate(b"" if report["refused"] else self._setup())
            return report["refused"], frames(channel.readall())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    made = Case(tmp_path)
    made.write("repo/own/__init__.py", "from lib import VALUE\n")
    made.write("packages/lib/__init__.py", PLAIN)
    made.write(
        "repo/tests/test_own.py",
        "from own import VALUE\n\n\ndef test_it():\n    assert VALUE == 41\n",
    )
    return made


def outcome(found: list[dict[str, Any]]) -> str:
    told = [f.get("o", f["t"]) for f in found if f["t"] in ("test", "anew", "crash", "collect")]
    return ",".join(told)


def test_a_plain_package_is_loaded_ahead_and_handed_out(case: Case) -> None:
    names = case.survey()
    assert "lib" in names
    assert not {"own", "test_own"} & set(names)
    marked = "import os\nVALUE = 41 if not os.path.exists('changed') else 0\n"
    case.write("packages/lib/__init__.py", marked)
    refused, found = case.ahead(lambda: case.write("repo/changed", ""))
    assert not refused
    assert outcome(found) == "passed"  # it was loaded before the file was there
    assert outcome(case.cold()) == "failed"  # and this is what the rule on sources prevents


REFUSED = {
    "prints": "print('hello')\nVALUE = 41\n",
    "warns": "import warnings\nwarnings.warn('old')\nVALUE = 41\n",
    "leaves a thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "VALUE = 41\n"
    ),
    "opens a file": "held = open('/dev/null')\nVALUE = 41\n",
    "sets a signal handler": (
        "import signal\nsignal.signal(signal.SIGUSR1, lambda *a: None)\nVALUE = 41\n"
    ),
    "replaces a function": "import shlex, os\nos.getlogin = lambda: ''\nVALUE = 41\n",
    "replaces a method": (
        "import json.decoder\njson.decoder.JSONDecoder.decode = lambda *a: 1\nVALUE = 41\n"
    ),
    "keeps the output": "import sys\nheld = [sys.stderr]\nVALUE = 41\n",
    "goes elsewhere": "import os\nos.chdir('/')\nVALUE = 41\n",
    "raises the recursion limit": "import sys\nsys.setrecursionlimit(5000)\nVALUE = 41\n",
    "seeds": "import random\nrandom.seed(1)\nVALUE = 41\n",
    "adds a path": "import sys\nsys.path.append('/nowhere')\nVALUE = 41\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_another_could_see_is_not_loaded_ahead(case: Case, name: str) -> None:
    case.survey()
    case.write("packages/lib/__init__.py", "import random\n" + REFUSED[name])
    case.survey()
    refused, _ = case.ahead()
    assert "lib" in refused


def test_effects_that_can_be_repeated_are(case: Case) -> None:
    case.write(
        "packages/lib/__init__.py",
        "import atexit, os, warnings\nos.environ['LIB'] = '1'\nVALUE = 41\n"
        "warnings.filterwarnings('ignore', message='lib says')\natexit.register(print, 'bye')\n",
    )
    case.write(
        "repo/tests/test_own.py",
        "import os, sys, warnings\n"
        "before = (os.environ.get('LIB'), 'lib' in sys.modules, str(warnings.filters))\n"
        "import own\n"
        "after = (os.environ.get('LIB'), 'lib' in sys.modules)\n\n\n"
        "def test_it():\n"
        "    assert before[:2] == (None, False) and 'lib says' not in before[2]\n"
        "    assert after == ('1', True)\n",
    )
    case.survey()
    refused, found = case.ahead()
    assert not refused
    assert (outcome(found), outcome(case.cold())) == ("passed", "passed")


ANEW = {
    "another environment": "import os\nos.environ['LIB_MODE'] = 'x'\n",
    "a module in its place": "import sys\nsys.modules['lib.inner'] = type(sys)('x')\n",
    "a replaced function": "import os\nos.getlogin = lambda: ''\n",
    "another order": "import colorsys\n",
    "another place": "import sys\nsys.path.insert(0, 'elsewhere')\n",
}


@pytest.mark.parametrize("name", ANEW)
def test_a_run_under_other_conditions_is_done_anew(case: Case, name: str) -> None:
    case.write("packages/lib/__init__.py", "import colorsys\nfrom lib.inner import VALUE\n")
    case.write("packages/lib/inner.py", PLAIN)
    case.write("repo/elsewhere/lib/__init__.py", "VALUE = 0\n")
    case.survey()
    refused, found = case.ahead()
    assert not refused
    assert outcome(found) == "passed"
    change = ANEW[name] + "from lib import VALUE\n"
    _, found = case.ahead(lambda: case.write("repo/own/__init__.py", change))
    assert outcome(found).endswith("anew")


def test_conditions_that_the_repository_itself_changes_end_what_is_loaded(case: Case) -> None:
    case.write("repo/tests/conftest.py", "import os\nos.environ['LIB_MODE'] = 'x'\n")
    case.survey()
    refused, found = case.ahead()
    assert not refused
    assert outcome(found) == "passed"
    case.write(
        "packages/lib/__init__.py", "import os\nVALUE = 41 if 'LIB_MODE' in os.environ else 0\n"
    )
    _, found = case.ahead()
    assert outcome(found) == "passed"


def test_a_package_that_loads_the_repository_is_not_loaded_ahead(case: Case) -> None:
    case.write("packages/lib/__init__.py", "import other\nVALUE = 41\n")
    case.write("repo/other.py", "")
    case.survey()
    refused, _ = case.ahead()
    assert refused["lib"] == "it loads a part of the repository"


def test_a_module_of_the_standard_library_that_the_repository_shadows_is_no_longer_it(
    case: Case,
) -> None:
    own = (
        "import sys\nfrom lib import VALUE\nimport colorsys\nVALUE = getattr(colorsys, 'OWN', 41)\n"
    )
    case.write("repo/own/__init__.py", own)
    case.write("repo/elsewhere/colorsys.py", "OWN = 42\n")
    assert "colorsys" in case.survey()
    assert outcome(case.ahead()[1]) == "passed"
    change = own.replace("import colorsys", "sys.path.insert(0, 'elsewhere')\nimport colorsys")
    _, found = case.ahead(lambda: case.write("repo/own/__init__.py", change))
    assert outcome(found).endswith("anew")
    assert outcome(case.cold()) == "failed"  # what a run that starts with nothing says


def test_a_package_outside_of_those_of_the_state_is_not_loaded_ahead(case: Case) -> None:
    away = case.home / "away"
    case.write("away/extra.py", "")
    loads = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("extra", {str(away / "extra.py")!r})
sys.modules["extra"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["extra"])
VALUE = 41
"""
    case.write("packages/lib/__init__.py", loads)
    case.survey()
    refused, _ = case.ahead()
    assert "not of the State's packages" in refused["lib"]
