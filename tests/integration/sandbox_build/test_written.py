"""A run that writes over what decides its verdict is not believed; a suite's own writing is."""

import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from regreen.lockfile import format_lock, parse_lock
from sandbox_svc.backends.base import Limits
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import REPO, FileChange
from sandbox_svc.forks import fork_of
from sandbox_svc.state_records import State
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from sandbox_svc.warm import WarmPool, WarmSettings
from sandbox_svc.workers import Workers, WorkerSettings
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.integration.sandbox_build.suite import FIX, GREET, Workshop, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
LATE = "tests/z_late/test_late.py"
GOLDEN, HELPER = f"{LATE}::test_golden", f"{LATE}::test_helper"
SITE = f"/work/env/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
FILES = {
    "tests/test_a_first.py": (
        "try:\n    import greet\nexcept ImportError:\n    pass\n\n\ndef test_first():\n    pass\n"
    ),
    "tests/test_b_own.py": (
        "from pathlib import Path\n\nHERE = Path(__file__).parent\n\n\n"
        "def test_own():\n"
        "    (HERE / 'data/snapshot.txt').write_text('seen\\n')\n"
        "    (HERE / 'out').mkdir(exist_ok=True)\n"
        "    (HERE / 'out' / 'new.txt').write_text('new\\n')\n"
    ),
    "tests/data/snapshot.txt": "before\n",
    "tests/data/golden.txt": "Hello, Ada!\n",
    "tests/helper.py": "def agreed(value):\n    return value == 'Hello, Ada!'\n",
    LATE: (
        "from pathlib import Path\n\nfrom helper import agreed\n\n"
        "DATA = Path(__file__).parents[1]\n\n\ndef test_golden():\n"
        "    from greet import greeting\n\n"
        "    assert greeting('Ada') + '\\n' == (DATA / 'data/golden.txt').read_text()\n"
        "    (DATA / 'out').mkdir(exist_ok=True)\n"
        "    (DATA / 'out' / 'after.txt').write_text('only once it is fixed\\n')\n"
        "\n\ndef test_helper():\n    from greet import greeting\n\n"
        "    assert agreed(greeting('Ada'))\n"
    ),
}
_GREEN = "\n".join(f"def {id.partition('::')[2]}(): pass" for id in FAIL_TO_PASS)
_GREEN = f"{_GREEN}\ndef test_arithmetic(): pass\n"
_HOOK = "def pytest_pyfunc_call(pyfuncitem): return True\n"
_LATER = f"open('tests/test_greet.py', 'w').write({_GREEN!r})\n"
_CODE = """
import importlib.util, marshal, os
source = {source!r}
path = importlib.util.cache_from_source(os.path.abspath(source))[:-4] + {tag} + '.pyc'
known = os.stat(source)
head = importlib.util.MAGIC_NUMBER + bytes(4)
head += (int(known.st_mtime) & 0xffffffff).to_bytes(4, 'little')
head += (known.st_size & 0xffffffff).to_bytes(4, 'little')
os.makedirs(os.path.dirname(path), exist_ok=True)
new = path + '.new'
open(new, 'wb').write(head + marshal.dumps(compile({code!r}, os.path.abspath(source), 'exec')))
os.replace(new, path)
"""
_AGREED = "def agreed(value): return True\n"
_PYC = """
import importlib.util, marshal, os
path = {path!r}
os.makedirs(os.path.dirname(path), exist_ok=True)
head = importlib.util.MAGIC_NUMBER + bytes(12)
open(path, 'wb').write(head + marshal.dumps(compile({code!r}, path, 'exec')))
"""
_TAG = "'-pytest-' + __import__('sys').modules['pytest'].__version__"


@dataclass(frozen=True)
class Writes:
    """What the source does when it is imported, before later tests are."""

    source: str
    path: str
    required: tuple[str, ...] = FAIL_TO_PASS

    @property
    def change(self) -> FileChange:
        text = f"{self.source}\n\ndef greeting(name):\n    return 'no'\n"
        return FileChange(GREET, text.encode())


CHEATS = {
    "a later test file": Writes(_LATER, "tests/test_greet.py"),
    "a later test file, put back": Writes(
        "import atexit, os\n"
        "os.rename('tests/test_greet.py', '/work/repo/kept')\n"
        f"{_LATER}"
        "atexit.register(os.replace, '/work/repo/kept', '/work/repo/tests/test_greet.py')\n",
        "tests/test_greet.py",
    ),
    "a later test file by another name": Writes(
        "import os\nos.link('tests/test_greet.py', '/work/home/other')\n"
        + _LATER.replace("tests/test_greet.py", "/work/home/other"),
        "tests/test_greet.py",
    ),
    "a file that a test compares with": Writes(
        "open('tests/data/golden.txt', 'w').write('no\\n')\n", "tests/data/golden.txt", (GOLDEN,)
    ),
    "a helper of the tests": Writes(
        "open('tests/helper.py', 'w').write('def agreed(value): return True\\n')\n",
        "tests/helper.py",
        (HELPER,),
    ),
    "byte code of a helper": Writes(
        _CODE.format(source="tests/helper.py", tag="''", code="def agreed(value): return True\n"),
        "helper.cpython",
        (HELPER,),
    ),
    "a package in place of a helper": Writes(
        "import os\nos.mkdir('tests/helper')\n"
        "open('tests/helper/__init__.py', 'w').write('def agreed(value): return True\\n')\n",
        "tests/helper/__init__.py",
        (HELPER,),
    ),
    "a conftest of a later folder": Writes(
        f"open('tests/z_late/conftest.py', 'w').write({_HOOK!r})\n",
        "tests/z_late/conftest.py",
        (GOLDEN, HELPER),
    ),
    "a conftest of a later folder as a link": Writes(
        f"import os\nopen('/tmp/hook', 'w').write({_HOOK!r})\n"
        "os.symlink('/tmp/hook', 'tests/z_late/conftest.py')\n",
        "tests/z_late/conftest.py",
        (GOLDEN, HELPER),
    ),
    "a folder of tests": Writes(
        "import os, shutil\nshutil.rmtree('tests/z_late')\nos.mkdir('tests/z_late')\n"
        f"open({LATE!r}, 'w').write('def test_golden(): pass\\ndef test_helper(): pass\\n')\n",
        LATE,
        (GOLDEN, HELPER),
    ),
    "a nearer helper": Writes(
        f"open('tests/z_late/helper.py', 'w').write({_AGREED!r})\n",
        "tests/z_late/helper.py",
        (HELPER,),
    ),
    "a nearer helper without source": Writes(
        _PYC.format(path="tests/z_late/helper.pyc", code=_AGREED),
        "tests/z_late/helper.pyc",
        (HELPER,),
    ),
    "a package without source in place of a helper": Writes(
        _PYC.format(path="tests/helper/__init__.pyc", code=_AGREED),
        "tests/helper/__init__.pyc",
        (HELPER,),
    ),
    "a link to a package in place of a helper": Writes(
        f"import os\nos.mkdir('/tmp/h')\nopen('/tmp/h/__init__.py', 'w').write({_AGREED!r})\n"
        "os.symlink('/tmp/h', 'tests/helper')\n",
        "tests/helper",
        (HELPER,),
    ),
    "an empty folder in place of a helper": Writes(
        "import os\nos.remove('tests/helper.py')\nos.mkdir('tests/helper.py')\n"
        f"open('helper.py', 'w').write({_AGREED!r})\n",
        "tests/helper.py",
        (HELPER,),
    ),
    "a folder in place of a helper": Writes(
        "import os\nos.remove('tests/helper.py')\nos.mkdir('tests/helper.py')\n"
        f"open('tests/helper.py/x', 'w').close()\nopen('helper.py', 'w').write({_AGREED!r})\n",
        "tests/helper.py",
        (HELPER,),
    ),
}


_HELLO = "def hello(): return 'Hello'\n"


def _package(path: str) -> FileChange:
    if path.endswith(".pyc"):
        make = _PYC.format(path=path, code=_HELLO)
    elif path.endswith(".py"):
        make = (
            f"import os\npath = {path!r}\nos.makedirs(os.path.dirname(path), exist_ok=True)\n"
            f"open(path, 'w').write({_HELLO!r})\n"
        )
    else:
        make = (
            "import os\nos.mkdir('/tmp/w')\n"
            f"open('/tmp/w/__init__.py', 'w').write({_HELLO!r})\nos.symlink('/tmp/w', {path!r})\n"
        )
    return FileChange(
        GREET,
        f"{make}import importlib\nimportlib.invalidate_caches()\n"
        "from wordlib import hello\ndef greeting(name): return f'{hello()}, {name}!'\n".encode(),
    )


PACKAGE = _package(f"{SITE}/wordlib.py")


@dataclass(frozen=True, slots=True)
class World(Workshop):
    state: State
    validator: Validator

    async def judge(self, *changes: FileChange, **options: object) -> Validation:
        chosen = ValidationOptions(**options)  # type: ignore[arg-type]
        return await self.validator.validate(self.state.id, changes, chosen)

    async def passed_unseen(self, change: FileChange) -> frozenset[str]:
        """The tests that the same run reports as passed; nobody looks at what it wrote."""
        async with fork_of(self.states, self.runtime, self.state.id, Limits()) as box:
            await box.write_file(f"{REPO}/{change.path}", change.content or b"")
            run = await testrun.run_tests(
                box, testrun.options_of(self.state.metadata, self.state.env)
            )
        assert not run.tampered, run.log
        return run.ids("passed")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with open_workshop() as shop:
        state = await shop.prepared("writes", FILES, fail_to_pass=(*FAIL_TO_PASS, GOLDEN, HELPER))
        validator = Validator(shop.states, shop.runtime)
        try:
            yield World(
                shop.runtime, shop.states, shop.home, shop.builder, shop.store, state, validator
            )
        finally:
            await validator.close()


@pytest.mark.parametrize("name", CHEATS)
async def test_a_run_that_writes_over_what_decides_it_is_not_believed(
    world: World, name: str
) -> None:
    cheat = CHEATS[name]
    assert set(cheat.required) <= await world.passed_unseen(cheat.change), "it is no cheat at all"
    verdict = await world.judge(cheat.change, required_tests=cheat.required)
    assert verdict.outcome is Outcome.FAILED, verdict.log
    assert "wrote over what decides it" in verdict.summary
    assert cheat.path in verdict.summary
    assert set(verdict.failing) == set(cheat.required)


@pytest.mark.parametrize(
    "path",
    [
        *(f"{SITE}/wordlib.py", f"{SITE}/wordlib/__init__.py", "/work/repo/wordlib.py"),
        *("/work/repo/tests/wordlib.py", "/work/repo/wordlib.pyc", "/work/repo/wordlib"),
        *("/work/repo/wordlib/__init__.pyc", f"{SITE}/wordlib/__init__.pyc", f"{SITE}/wordlib"),
    ],
)
async def test_a_package_of_the_state_that_is_written_over_counts_for_nothing(
    world: World, path: str
) -> None:
    change = _package(path)
    assert set(FAIL_TO_PASS) <= await world.passed_unseen(change)
    verdict = await world.judge(change, held_pins={"wordlib": "2.0"}, required_tests=FAIL_TO_PASS)
    assert verdict.outcome is Outcome.FAILED, verdict.log
    assert path.removeprefix("/work/repo/") in verdict.summary


async def test_byte_code_of_tests_that_a_run_left_is_not_read(world: World) -> None:
    code = _CODE.format(source="tests/test_greet.py", tag=_TAG, code=_GREEN)
    verdict = await world.judge(Writes(code, "").change)
    assert verdict.outcome is Outcome.FAILED, verdict.log
    assert set(FAIL_TO_PASS) <= set(verdict.failing)
    assert "not believed" not in verdict.summary


async def test_a_suite_may_write_what_it_writes_untouched_and_new_data(world: World) -> None:
    known = world.state.metadata["baseline"]["written"]
    assert "/work/repo/tests/data/snapshot.txt" in known
    verdict = await world.judge(FIX)
    assert verdict.outcome is Outcome.PASSED, verdict.log


async def test_a_suite_that_could_not_be_collected_may_write_its_data(world: World) -> None:
    """As the tests of m2r do: once imported, they remove a file that comes with them."""
    eager = (
        "from pathlib import Path\n\nfrom greet import greeting\n\n"
        "HERE = Path(__file__).parent\n\n\n"
        "def test_out():\n    out = HERE / 'data' / 'out.rst'\n    out.unlink()\n"
        "    out.write_text(greeting('Ada'))\n    assert out.exists()\n    out.unlink()\n"
    )
    files = {"tests/test_greet.py": eager, "tests/data/out.rst": "tracked\n"}
    files["tests/test_a_first.py"] = FILES["tests/test_a_first.py"]
    state = await world.prepared("eager", files, fail_to_pass=())
    assert state.metadata["baseline"]["failing"] == ("tests/test_greet.py",)
    verdict = await world.validator.validate(state.id, [FIX])
    assert verdict.outcome is Outcome.PASSED, verdict.log
    code = "open('tests/test_greet.py', 'w').write('def test_out(): pass\\n')\n"
    verdict = await world.validator.validate(state.id, [Writes(code, "").change])
    assert verdict.outcome is Outcome.FAILED, verdict.log
    assert "tests/test_greet.py" in verdict.summary


async def test_what_the_lock_installs_is_not_the_runs_writing(world: World) -> None:
    lock = parse_lock(world.state.metadata["lock"]).with_pin("wordlib", "1.0")
    change = FileChange("requirements.lock", format_lock(lock).encode())
    before = set(await world.runtime.layers())
    verdict = await world.judge(change)
    assert verdict.outcome is Outcome.PASSED, verdict.log
    late = Writes(_LATER, "").change
    for source, path in ((late, "tests/test_greet.py"), (PACKAGE, "site-packages/wordlib.py")):
        verdict = await world.judge(change, source, required_tests=FAIL_TO_PASS)
        assert verdict.outcome is Outcome.FAILED, verdict.log
        assert path in verdict.summary
    assert set(await world.runtime.layers()) == before, "a layer of a validation is left"


@pytest.mark.parametrize("options", [{"coverage": True}, {"stop_early": True}, {"seed": 7}])
async def test_whatever_else_is_asked_for(world: World, options: dict[str, object]) -> None:
    verdict = await world.judge(
        CHEATS["a later test file"].change, required_tests=FAIL_TO_PASS, **options
    )
    assert verdict.outcome is Outcome.FAILED, verdict.log
    assert "tests/test_greet.py" in verdict.summary
    assert not verdict.coverage


async def test_a_run_that_was_started_ahead_is_looked_at_too(world: World) -> None:
    pool = WarmPool(world.states, world.runtime, world.home, settings=WarmSettings(check_share=0.0))
    validator = Validator(world.states, world.runtime, warm=pool)
    try:
        for change, outcome in (
            (CHEATS["a later test file"].change, Outcome.FAILED),
            (FIX, Outcome.PASSED),
        ):
            pool.warm(world.state)
            await pool.settled()
            verdict = await validator.validate(world.state.id, [change])
            assert (verdict.warm, verdict.outcome) == (True, outcome), verdict.log
            assert ("tests/test_greet.py" in verdict.summary) is (outcome is Outcome.FAILED)
    finally:
        await validator.close()
        await pool.close()


async def test_forks_that_share_the_tests_are_looked_at_too(world: World) -> None:
    limits = Limits(memory_bytes=2 << 30, pids=256, cpus=2.0, disk_bytes=1 << 30, inodes=50_000)
    settings = WorkerSettings(most=2, check_share=0.0, least_s=0.0, gain=100.0)
    workers = Workers(world.states, world.runtime, world.home, limits=limits, settings=settings)
    validator = Validator(world.states, world.runtime, limits=limits, workers=workers)
    try:
        await validator.validate(world.state.id, [FIX])
        await validator.checked()
        validator._cache.clear()
        shared = await validator.validate(world.state.id, [FIX])
        assert (shared.workers, shared.outcome) == (2, Outcome.PASSED), shared.summary
        cheat = CHEATS["a later test file"].change
        verdict = await validator.validate(
            world.state.id, [cheat], ValidationOptions(required_tests=FAIL_TO_PASS)
        )
        assert (verdict.workers, verdict.outcome) == (1, Outcome.FAILED), verdict.log
        assert "tests/test_greet.py" in verdict.summary
    finally:
        await validator.close()
