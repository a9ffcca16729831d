"""Byte code of a State: what is kept is that of the sources, and enough for a run of pytest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_svc.builders.inbox import byte_code
from sandbox_svc.builders.python import INBOX

PACKAGES = Path(pytest.__file__).parents[1]


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of two modules that came with byte code, one of them edited since."""
    found = tmp_path / "library"
    (found / "test").mkdir(parents=True)
    for name in ("whole", "edited", "test/inner"):
        (found / f"{name}.py").write_text("VALUE = 1\n")
    command = [sys.executable, "-m", "compileall", "-q", str(found)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run(command, check=True, env=env, timeout=60)
    os.utime(found / "edited.py", (1, 1))
    return found


def test_only_what_is_of_its_source_is_copied(library: Path, prefix: Path) -> None:
    assert byte_code.copy_own(str(library)) == 1
    kept = list(prefix.rglob("*.pyc"))
    assert [path.name.partition(".")[0] for path in kept] == ["whole"]
    (came,) = (library / "__pycache__").glob("whole.*")
    assert kept[0].read_bytes() == came.read_bytes()
    assert byte_code.copy_own(str(library)) == 0, "it is there already"


def test_damaged_byte_code_is_not_copied(library: Path, prefix: Path) -> None:
    (came,) = (library / "__pycache__").glob("whole.*")
    came.write_bytes(b"\0" * 8)
    assert byte_code.copy_own(str(library)) == 0
    assert not prefix.exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_run_of_pytest_compiles_nothing(tmp_path: Path, own: bool) -> None:
    """With the byte code that Python came with, and where it came with none."""
    kept = str(tmp_path / "kept")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    python = [sys.executable, "-S"]
    argv = [*python, str(INBOX / "byte_code.py"), "--prefix", kept, str(PACKAGES / "_pytest")]
    if not own:
        code = f"import sys; sys.path.insert(0, {str(INBOX)!r}); import byte_code as b, os"
        code += f"; sys.pycache_prefix = {kept!r}; b.import_always(os.path.dirname(os.__file__))"
        subprocess.run([*python, "-c", code], check=True, env=env, timeout=120)
        env["PYTHONPYCACHEPREFIX"] = kept
        argv = [sys.executable, "-m", "compileall", "-q", str(PACKAGES / "_pytest")]
    subprocess.run(argv, check=True, env=env, timeout=120)
    env["PYTHONPYCACHEPREFIX"] = kept
    run = [sys.executable, "-v", "-c", "import _pytest.pytester, _pytest.unittest, unittest.mock"]
    told = subprocess.run(run, capture_output=True, text=True, check=True, env=env, timeout=60)
    compiled = [line for line in told.stderr.splitlines() if line.startswith("# code object from ")]
    library = os.path.dirname(os.__file__)
    ours = [line for line in compiled if line.endswith(".py'") and library in line]
    assert [line for line in ours if "site-packages" not in line or "/_pytest/" in line] == []
