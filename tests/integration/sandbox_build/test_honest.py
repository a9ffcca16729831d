"""What honest suites write as they run leaves their verdict alone."""

import sqlite3
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sandbox_svc.state_records import State
from sandbox_svc.validate import Outcome, ValidationOptions, Validator
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.integration.sandbox_build.suite import FIX, Workshop, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
HABITS = {
    "file_made_and_removed": "    with tempfile.NamedTemporaryFile(dir=HERE) as f: f.write(b'x')\n",
    "folder_made_and_removed": "    shutil.rmtree(tempfile.mkdtemp(dir=HERE / 'data'))\n",
    "data_opened_for_writing": "    with open(HERE / 'data/y.bin', 'r+b') as f: assert f.read()\n",
    "database_read": (
        "    c = sqlite3.connect(HERE / 'data/x.db')\n"
        "    assert c.execute('select a from t').fetchone()[0] == g\n    c.close()\n"
    ),
    "mode_set": "    os.chmod(HERE / 'data/run.sh', 0o755)\n",
    "snapshot_written_anew": "    (HERE / 'data/snap.txt').write_text(g)\n",
    "snapshot_new": "    (HERE / 'data/new.txt').write_text(g)\n",
    "scaffold_kept": (
        "    d = Path(tempfile.mkdtemp(dir=HERE))\n    (d / 'conftest.py').write_text('x = 1\\n')\n"
        "    (d / 'pytest.ini').write_text('[pytest]\\n')\n    (d / 'helper.py').write_text('')\n"
        "    (d / 'pyvenv.cfg').write_text('')\n    (d / 'sitecustomize.py').write_text('')\n"
    ),
    "tests_copied": (
        "    shutil.copytree(HERE, HERE.parent / 'build' / 'tests')\n"
        "    shutil.copytree(HERE.parent, HERE.parent / 'out',\n"
        "        ignore=shutil.ignore_patterns('out', 'build'))\n"
    ),
    "tests_compiled": "    compileall.compile_dir(str(HERE / 'unit'), quiet=1, force=True)\n",
    "tests_generated": (
        "    (HERE / 'generated_test.py').write_text('def test(): pass')\n"
        "    (HERE / 'gen').mkdir()\n    (HERE / 'gen' / '__init__.py').write_text('')\n"
        "    (HERE / 'gen' / 'helper.py').write_text('')\n"
    ),
    "file_named_as_a_module": (
        "    (HERE / 'profile').write_text(g)\n    (HERE.parent / 'token').write_text(g)\n"
        "    (HERE / 'html').mkdir()\n    (HERE / 'html/index.html').write_text(g)\n"
    ),
    "extension_in_place": (
        "    (HERE.parent / 'greet/_ext.cpython-311-x86_64-linux-gnu.so').write_bytes(b'x')\n"
        "    (HERE.parent / 'greet/_version.py').write_text('x = 1')\n"
    ),
    "metadata": (
        "    d = HERE.parent / 'greet.egg-info'\n    d.mkdir()\n"
        "    (d / 'PKG-INFO').write_text('')\n"
    ),
    "proxies_of_modules": (  # Twisted's, of what it deprecates
        "    import sys, types\n"
        "    class Proxy:\n        __class__ = types.ModuleType\n"
        "    sys.modules['old'] = sys.modules['old.part'] = Proxy()\n"
    ),
    "tables_beside_a_package": (
        "    (Path(wordlib.__file__).parent / 'parsetab.py').write_text('x = 1')\n"
    ),
}
_HEAD = (
    "import compileall, os, shutil, sqlite3, tempfile\nfrom pathlib import Path\n\nimport wordlib\n"
    "HERE = Path(__file__).parents[1]\n"
)
UNIT = "tests/unit/test_habits.py"


def _suite() -> str:
    tests = "".join(
        f"\n\ndef test_{name}():\n    from greet import greeting\n\n    g = greeting('Ada')\n{body}"
        for name, body in HABITS.items()
    )
    return _HEAD + tests


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def honest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Workshop, State]]:
    made = tmp_path_factory.mktemp("made") / "x.db"
    base = sqlite3.connect(made)
    base.execute("create table t(a)")
    base.execute("insert into t values('Hello, Ada!')")
    base.commit()
    base.close()
    files: dict[str, str | bytes] = {
        UNIT: _suite(),
        "tests/conftest.py": "",
        "tests/helper.py": "",
        "tests/data/x.db": made.read_bytes(),
        "tests/data/y.bin": "abc",
        "tests/data/run.sh": "echo\n",
        "tests/data/snap.txt": "Hello, Ada!",
    }
    async with open_workshop() as shop:
        wanted = (*FAIL_TO_PASS, *(f"{UNIT}::test_{name}" for name in HABITS))
        yield shop, await shop.prepared("honest", files, fail_to_pass=wanted)


@pytest.mark.parametrize("name", HABITS)
async def test_it_passes(honest: tuple[Workshop, State], name: str) -> None:
    shop, state = honest
    validator = Validator(shop.states, shop.runtime)
    try:
        only = ValidationOptions(only_tests=(f"{UNIT}::test_{name}",))
        verdict = await validator.validate(state.id, [FIX], only)
        assert verdict.outcome is Outcome.INCOMPLETE, f"{verdict.summary}\n{verdict.log}"
    finally:
        await validator.close()
