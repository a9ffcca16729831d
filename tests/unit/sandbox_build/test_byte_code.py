"""Byte code of a State: what is kept is that of the sources, and enough for a run of pytest."""

import importlib.util
import marshal
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sandbox_svc.builders.inbox import byte_code, compile_wheel
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
    argv = [*python, str(INBOX / "byte_code.py"), kept, "", str(PACKAGES / "_pytest")]
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


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Site-packages with what a wheel installs, and beside it the byte code of that wheel."""
    found = tmp_path / "env/lib/python3.11/site-packages"
    members = {
        "shop/__init__.py": "",
        "shop/till.py": "def pay():\n    return 'paid'\n",
        "shop/old.py": "print 'two'\n",
        "shop/tests/test_till.py": "import shop\n",
        "shop-1.0.data/purelib/shop/stock.py": "LEFT = 3\n",
        "shop-1.0.data/scripts/shop.py": "import shop\n",
        "shop-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(tmp_path / "shop-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
            path = found / name.replace("shop-1.0.data/purelib/", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (tmp_path / "ready").mkdir()
    compile_wheel.main(
        str(tmp_path / "shop-1.0-py3-none-any.whl"), str(found), str(tmp_path / "ready/0")
    )
    return found


def test_byte_code_of_a_wheel_is_that_of_what_it_installs(site: Path, prefix: Path) -> None:
    ready = site.parents[3] / "ready"
    (kept,) = (marshal.loads(path.read_bytes()) for path in ready.iterdir())
    names = {str(Path(path).relative_to(site)) for path in kept}
    assert names == {"shop/__init__.py", "shop/till.py", "shop/stock.py"}
    assert byte_code.copy_ready(str(ready)) == 3
    target = importlib.util.cache_from_source(str(site / "shop/till.py"))
    ours = Path(target).read_bytes()
    Path(target).unlink()
    subprocess.run(
        [sys.executable, "-X", f"pycache_prefix={prefix}", "-m", "compileall", "-q", str(site)],
        check=False,  # of what no Python 3 can read
        timeout=60,
        stdout=subprocess.DEVNULL,
    )
    theirs = Path(target).read_bytes()
    assert ours[:16] == theirs[:16]
    mine, other = (marshal.loads(code[16:]) for code in (ours, theirs))
    assert mine == other
    assert mine.co_filename == str(site / "shop/till.py")


def test_only_a_file_that_was_compiled_takes_ready_byte_code(site: Path, prefix: Path) -> None:
    (site / "shop/till.py").write_text("def pay():\n    return 'gone'\n")
    (site / "shop/stock.py").unlink()
    assert byte_code.copy_ready(str(site.parents[3] / "ready")) == 1
    assert [path.name.partition(".")[0] for path in prefix.rglob("*.pyc")] == ["__init__"]
    assert byte_code.copy_ready(str(site / "none")) == 0


def test_what_is_too_much_is_left_to_be_compiled_where_it_is(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = str(site.parents[3] / "shop-1.0-py3-none-any.whl")
    monkeypatch.setattr(compile_wheel, "MOST_BYTES", 20)
    assert {Path(path).name for path in compile_wheel.compiled(wheel, "/s")} == {
        "__init__.py",
        "stock.py",
    }
    monkeypatch.setattr(compile_wheel, "MOST_CODE", 1)
    assert compile_wheel.compiled(wheel, "/s") == {}
