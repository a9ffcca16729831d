"""A whole tiny task in real sandboxes: honest fixes pass, every way of cheating fails."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.lockfile import format_lock, parse_lock
from regreen.pkgindex import PackageIndex
from regreen.rpc.errors import DiskFull, FailedPrecondition, InvalidArgument, MissingDependency
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import FileChange, Stage
from sandbox_svc.builders.python import PythonBuilder
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.small_disk import mounted
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, missing_file, tiny_spec

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREET = "greet/__init__.py"
FIXED = b"from wordlib import salute\n\n\ndef greeting(name):\n    return f'{salute()}, {name}!'\n"
EAGER = b"def test_greeting():\n    assert greeting('Ada') == 'Hello, Ada!'\n"


def offline() -> PackageIndex:
    """An index that nobody serves."""
    return PackageIndex(["http://127.0.0.1:9"], deadline_s=0.1)


@dataclass(frozen=True, slots=True)
class World:
    runtime: EmbeddedRuntime
    states: StateStore
    builder: PythonBuilder
    validator: Validator
    state: State
    stages: list[Stage]

    async def judge(self, *changes: FileChange, **options: object) -> Validation:
        chosen = ValidationOptions(**options)  # type: ignore[arg-type]
        return await self.validator.validate(self.state.id, changes, chosen)

    def lock(self, **pins: str) -> FileChange:
        lock = parse_lock(self.state.metadata["lock"])
        for name, version in pins.items():
            lock = lock.with_pin(name, version)
        return FileChange("requirements.lock", format_lock(lock).encode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    home = Path(tempfile.mkdtemp(prefix="regreen-build-"))
    home.chmod(0o711)
    try:
        async with open_world(home) as found:
            yield found
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.asynccontextmanager
async def open_world(home: Path) -> AsyncIterator[World]:
    runtime = EmbeddedRuntime(home / "rt", run_probes=False)
    try:
        await runtime.start()
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    states = StateStore(home, runtime)
    await states.open()
    store = DistStore(home / "dists", offline)
    builder = PythonBuilder(store, home / "tools")
    (home / "made").mkdir()
    spec = tiny_spec(store, home / "made")
    stages: list[Stage] = []
    state = await states.prepare(
        spec.digest, lambda p: builder.prepare(spec, runtime, Limits(), p), progress=stages.append
    )
    validator = Validator(states, runtime)
    try:
        yield World(runtime, states, builder, validator, state, stages)
    finally:
        await validator.close()
        await states.close()
        await runtime.close()


async def test_baseline_names_what_fails(world: World) -> None:
    baseline = world.state.metadata["baseline"]
    assert baseline["passing"] == ("tests/test_greet.py::test_arithmetic",) or baseline[
        "passing"
    ] == ["tests/test_greet.py::test_arithmetic"]
    assert sorted(baseline["failing"]) == sorted(FAIL_TO_PASS)
    assert "cannot import name 'hello'" in baseline["log"]
    assert {"install", "compile", "snapshot", "baseline"} <= {s.stage for s in world.stages}


async def test_nothing_changed_fails(world: World) -> None:
    verdict = await world.judge()
    assert verdict.outcome is Outcome.FAILED
    assert set(verdict.failing) == set(FAIL_TO_PASS)


async def test_source_edit_passes_and_is_cached(world: World) -> None:
    verdict = await world.judge(FileChange(GREET, FIXED), held_pins={"wordlib": "2.0"})
    assert verdict.outcome is Outcome.PASSED, verdict.log
    assert verdict.counts == {"passed": 3}
    again = await world.judge(FileChange(GREET, FIXED), held_pins={"wordlib": "2.0"})
    assert again.cached
    assert again.outcome is Outcome.PASSED


async def test_pin_back_passes_unless_held(world: World) -> None:
    verdict = await world.judge(world.lock(wordlib="1.0"), repeat=2)
    assert verdict.outcome is Outcome.PASSED, verdict.log
    refused = await world.judge(world.lock(wordlib="1.0"), held_pins={"wordlib": "2.0"})
    assert refused.outcome is Outcome.REJECTED
    assert "wordlib must stay at 2.0" in refused.summary


async def test_wrong_version_installs_and_fails(world: World) -> None:
    verdict = await world.judge(world.lock(wordlib="2.1"))
    assert verdict.outcome is Outcome.FAILED
    assert any("wordlib 2.1 is broken" in line for line in verdict.error_lines)


async def test_unknown_version_is_rejected_with_the_line(world: World) -> None:
    verdict = await world.judge(world.lock(wordlib="9.9"))
    assert verdict.outcome is Outcome.REJECTED
    assert "requirements.lock line" in verdict.summary
    assert "it has 1.0, 2.0, 2.1" in verdict.summary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"wordlib>=1.0\n", "is no pin"),
        (b"wordlib==1.0\nwordlib==2.0\n", "twice"),
        (b"-r /etc/passwd\n", "is no pin"),
        (b"wordlib @ file:///tmp/x\n", "is no pin"),
        (b"\xff\xfe", "UTF-8"),
        (None, "deleted"),
        (b"# python==2.7\nwordlib==1.0\n", "python==2.7 is not offered"),
    ],
)
async def test_bad_locks_are_rejected(world: World, content: bytes | None, message: str) -> None:
    verdict = await world.judge(FileChange("requirements.lock", content))
    assert verdict.outcome is Outcome.REJECTED
    assert message in verdict.summary


async def test_removing_pytest_fails_to_build(world: World) -> None:
    lock = parse_lock(world.state.metadata["lock"]).without("pytest")
    change = FileChange("requirements.lock", format_lock(lock).encode())
    verdict = await world.judge(change)
    assert verdict.outcome is Outcome.BUILD_FAILED
    assert "No module named 'pytest'" in verdict.summary


CHEATS = {
    "tests deleted": [FileChange("tests/test_greet.py", None)],
    "tests emptied": [FileChange("tests/test_greet.py", b"def test_greeting(): pass\n")],
    "conftest skips": [FileChange("tests/conftest.py", b"collect_ignore = ['test_greet.py']\n")],
    "conftest at the root": [FileChange("conftest.py", b"import os\nos._exit(0)\n")],
    "conftest exits": [FileChange("greet/conftest.py", b"import os\nos._exit(0)\n")],
    "pytest.ini": [FileChange("pytest.ini", b"[pytest]\naddopts = --co\n")],
    "setup.cfg": [FileChange("setup.cfg", b"[tool:pytest]\npython_functions = nothing\n")],
    "pyproject": [FileChange("pyproject.toml", b"[tool.pytest.ini_options]\ntestpaths=['x']\n")],
    "tox.ini": [FileChange("tox.ini", b"[pytest]\npython_files = x.py\n")],
    "sitecustomize": [FileChange("sitecustomize.py", b"import os\nos._exit(0)\n")],
    "sitecustomize as a package": [FileChange("sitecustomize/__init__.py", b"import os\n")],
    "an archive for a folder": [FileChange("src", b"PK")],
    "fake pytest": [FileChange("pytest.py", b"def main(*a, **k): return 0\n")],
    "fake pytest package": [FileChange("_pytest/__init__.py", b"")],
    "plugin metadata": [
        FileChange("evil.egg-info/entry_points.txt", b"[pytest11]\nevil = evil\n"),
        FileChange("evil.egg-info/PKG-INFO", b"Name: evil\nVersion: 1\n"),
    ],
    "plugin metadata in capitals": [FileChange("evil-1.DIST-INFO/entry_points.txt", b"x")],
    "plugin metadata of an egg": [FileChange("evil.egg/EGG-INFO/entry_points.txt", b"x")],
    "byte code": [FileChange("greet/__pycache__/__init__.cpython-311.pyc", b"junk")],
    "git hook": [FileChange(".git/config", b"[core]\n")],
    "path file": [FileChange("evil.pth", b"import os; os._exit(0)\n")],
}


@pytest.mark.parametrize("name", CHEATS)
async def test_cheats_are_left_out_and_reported(world: World, name: str) -> None:
    verdict = await world.judge(*CHEATS[name])
    assert verdict.outcome is Outcome.FAILED
    assert set(verdict.failing) == set(FAIL_TO_PASS)
    assert {r.path for r in verdict.reverted} == {c.path for c in CHEATS[name]}


async def test_test_edits_beside_a_fix_do_not_matter(world: World) -> None:
    changes = (FileChange(GREET, FIXED), FileChange("tests/test_greet.py", None))
    verdict = await world.judge(*changes)
    assert verdict.outcome is Outcome.PASSED
    assert [r.reason for r in verdict.reverted] == ["test"]


async def test_a_held_package_cannot_be_replaced_from_the_repository(world: World) -> None:
    old = b"def hello():\n    return 'Hello'\n"
    for path in ("wordlib.py", "src/wordlib.py", "wordlib/__init__.py"):
        verdict = await world.judge(FileChange(path, old), held_pins={"wordlib": "2.0"})
        assert verdict.outcome is Outcome.FAILED
        assert [(r.path, r.reason) for r in verdict.reverted] == [(path, "shadows")]
    assert "greet" not in world.state.metadata["foreign"]
    assert {"wordlib", "pytest", "json"} <= set(world.state.metadata["foreign"])


async def test_a_test_set_that_requires_nothing_is_refused(world: World) -> None:
    facts = dict(world.state.metadata)
    facts["spec"] = {**facts["spec"], "test": {**facts["spec"]["test"], "fail_to_pass": []}}
    facts["baseline"] = {**facts["baseline"], "passing": [], "failing": []}
    world.states.record(replace(world.state, id="st_empty", metadata=facts))
    with pytest.raises(FailedPrecondition, match="no test that must pass"):
        await world.validator.validate("st_empty", (), ValidationOptions())
    world.states.record(replace(world.state, id="st_old", metadata={**facts, "runner": 1}))
    with pytest.raises(FailedPrecondition, match="prepare its spec again"):
        await world.validator.validate("st_old", (), ValidationOptions())


ENDS = b"""
import os, resource, signal
def greeting(name):
    try:
        resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))
    except OSError as error:
        return f'refused {error.errno}'
    while True:
        os.kill(1, signal.SIGCHLD)
"""


async def test_the_first_process_cannot_be_limited_to_death(world: World) -> None:
    verdict = await world.judge(FileChange(GREET, ENDS), timeout_s=20.0)
    assert verdict.outcome is Outcome.FAILED
    assert "refused 1" in verdict.log


async def test_a_kill_is_not_remembered(world: World) -> None:
    killed = FileChange(GREET, b"import os\nos.kill(os.getpid(), 9)\n")
    assert (await world.judge(killed)).outcome is Outcome.FAILED
    assert not (await world.judge(killed)).cached


async def test_a_validation_keeps_its_place_and_ends_with_its_last_waiter(world: World) -> None:
    places = asyncio.Semaphore(1)
    taken: list[str] = []
    running = asyncio.Event()

    @contextlib.asynccontextmanager
    async def place() -> AsyncIterator[None]:
        async with places:
            taken.append("in")
            running.set()
            try:
                yield
            finally:
                taken.append("out")

    validator = Validator(world.states, world.runtime, place=place)
    loop = [FileChange(GREET, b"while True:\n    pass\n")]
    first, second = (
        asyncio.create_task(validator.validate(world.state.id, loop)) for _ in range(2)
    )
    await running.wait()
    first.cancel()
    await asyncio.wait([first])
    assert (places.locked(), taken) == (True, ["in"])
    second.cancel()
    await asyncio.wait([second])
    fixed = await validator.validate(world.state.id, [FileChange(GREET, FIXED)])
    assert fixed.outcome is Outcome.PASSED
    assert taken == ["in", "out", "in", "out"]
    await validator.close()


async def test_the_cache_is_bounded_in_bytes(world: World) -> None:
    validator = Validator(world.states, world.runtime, cache_bytes=1)
    for _ in range(2):
        found = await validator.validate(world.state.id, [FileChange("requirements.lock", None)])
        assert not found.cached


FORGED = (
    b"import sys\n"
    b"r = sys.modules['_py' + 'test.reports'].TestReport\n"
    b"old = r.from_item_and_call.__func__\n"
    b"def forge(cls, item, call):\n"
    b"    call.excinfo = None\n"
    b"    return old(cls, item, call)\n"
    b"r.from_item_and_call = classmethod(forge)\n"
    b"def greeting(name):\n    return ''\n"
)
HOSTILE = {
    "forged reports": FORGED,
    "forged reports, put back": FORGED.replace(
        b"def greeting",
        b"import atexit\nback = classmethod(old)\n"
        b"def undo():\n    r.from_item_and_call = back\n"
        b"atexit.register(undo)\ndef greeting",
    ),
    "tests do not run": (
        b"import sys\nsys.modules['_pytest.python'].Function.runtest = lambda self: None\n"
        b"def greeting(name):\n    return ''\n"
    ),
    "code exchanged": (
        b"import sys\ndef nothing(pyfuncitem):\n    return True\n"
        b"sys.modules['_pytest.python'].pytest_pyfunc_call.__code__ = nothing.__code__\n"
        b"def greeting(name):\n    return ''\n"
    ),
    "a plugin at run time": (
        b"import gc\n"
        b"class Evil:\n    def pytest_pyfunc_call(self, pyfuncitem):\n        return True\n"
        b"for it in gc.get_objects():\n"
        b"    if type(it).__name__ == 'PytestPluginManager':\n        it.register(Evil())\n"
        b"def greeting(name):\n    return ''\n"
    ),
    "exit 0": b"import os\nos._exit(0)\n",
    "sys.exit": b"import sys\nsys.exit(0)\n",
    "prints passed": b"print('tests/test_greet.py::test_greeting PASSED')\nraise SystemExit(0)\n",
    "forged frames": (
        b"import os, json, struct\n"
        b"for fd in range(3, 64):\n"
        b"    try:\n"
        b"        for name in ('test_greeting', 'test_two_names', 'test_arithmetic'):\n"
        b"            body = json.dumps({'t': 'test', 'id': 'tests/test_greet.py::' + name,\n"
        b"                               'o': 'passed'}).encode()\n"
        b"            os.write(fd, struct.pack('>I', len(body)) + bytes(32) + body)\n"
        b"    except OSError:\n"
        b"        pass\n"
        b"os._exit(0)\n"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_source_does_not_pass(world: World, name: str) -> None:
    verdict = await world.judge(FileChange(GREET, HOSTILE[name]))
    assert verdict.outcome in (Outcome.FAILED, Outcome.BUILD_FAILED)
    assert set(FAIL_TO_PASS) <= set(verdict.failing)


async def test_endless_source_times_out_and_is_not_cached(world: World) -> None:
    loop = FileChange(GREET, b"while True:\n    pass\n")
    verdict = await world.judge(loop, timeout_s=1.0)
    assert verdict.outcome is Outcome.TIMEOUT
    again = await world.judge(loop, timeout_s=1.0)
    assert not again.cached


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "", "a//b", "./a", "a\nb", "a\\b", "a\x00b"]
)
async def test_paths_that_leave_are_refused(world: World, path: str) -> None:
    with pytest.raises(InvalidArgument):
        await world.judge(FileChange(path, b"x"))


async def test_coverage_counts_lines_of_the_source(world: World) -> None:
    verdict = await world.judge(FileChange(GREET, FIXED), coverage=True)
    assert verdict.outcome is Outcome.PASSED
    covered, lines = verdict.coverage[GREET]
    assert covered == lines > 0
    assert not any(path.startswith("tests/") for path in verdict.coverage)


async def test_missing_file_names_the_remedy(world: World) -> None:
    spec = world.state.metadata["spec"]
    with tempfile.TemporaryDirectory() as folder:
        store = world.builder.store
        broken = tiny_spec(store, Path(folder), source=missing_file())
    assert spec["package"] == "greet"
    with pytest.raises(MissingDependency, match="cannot be fetched"):
        await world.builder.prepare(broken, world.runtime, Limits(), lambda _: None)


async def test_missing_interpreter_names_the_remedy(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spec = tiny_spec(world.builder.store, Path(folder), python="3.1")
    with pytest.raises(MissingDependency, match=r"Python 3\.1 is not on this host"):
        await world.builder.prepare(spec, world.runtime, Limits(), lambda _: None)


async def test_a_module_that_could_not_be_collected_passes_with_its_tests(world: World) -> None:
    folder = world.builder.store.root.parent / "uncollected"
    folder.mkdir()
    spec = tiny_spec(world.builder.store, folder)
    (old, broken), (*runner, new) = spec.wheelhouse, spec.pins
    pins, test = (*runner, broken), replace(spec.test, fail_to_pass=())
    eager = FileChange("tests/test_greet.py", b"from greet import greeting\n\n\n" + EAGER)
    spec = replace(spec, pins=pins, wheelhouse=(old, new), test=test, overlay=(eager,))
    state = await world.states.prepare(
        spec.digest,
        lambda p: world.builder.prepare(spec, world.runtime, Limits(), p),
        progress=lambda stage: None,
    )
    assert state.metadata["baseline"]["failing"] == ("tests/test_greet.py",)
    other = replace(world, state=state)
    assert (await other.judge(other.lock(wordlib="1.0"))).outcome is Outcome.PASSED
    still = await other.judge(other.lock(wordlib="2.0"))
    assert (still.outcome, still.failing) == (Outcome.BUILD_FAILED, ("tests/test_greet.py",))


@pytest.fixture
def small_disk() -> Iterator[Path]:
    with mounted(256) as disk:
        yield disk


async def test_a_full_disk_is_no_verdict_and_nothing_of_it_is_kept(small_disk: Path) -> None:
    async with open_world(small_disk) as world:
        filler = small_disk / "filler"
        await world.runtime.settle()  # nothing that is being removed makes room later
        room = os.statvfs(small_disk)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (24 << 10))
        with pytest.raises(DiskFull, match="no space"):
            await world.judge(world.lock(wordlib="1.0"))
        filler.unlink()
        verdict = await world.judge(world.lock(wordlib="1.0"))
        assert (verdict.outcome, verdict.cached) == (Outcome.PASSED, False)
        await world.runtime.settle()
