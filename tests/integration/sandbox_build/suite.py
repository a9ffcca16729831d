"""A task with several test files, prepared offline in real sandboxes."""

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from regreen.pkgindex import PackageIndex
from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import FileChange, TestSpec
from sandbox_svc.builders.python import PythonBuilder
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, tiny_spec

GREET = "greet/__init__.py"
FIXED = b"from wordlib import salute\n\n\ndef greeting(name):\n    return f'{salute()}, {name}!'\n"
FIX = FileChange(GREET, FIXED)
EARLY = "tests/test_a_first.py::test_first"
LATE = "tests/test_z_last.py::test_last"
LATER = "tests/test_z_last.py::test_later[2]"
WHOLE = "tests/test_y_whole.py"
FILES = {
    "tests/test_a_first.py": "def test_first():\n    assert 1 + 1 == 2\n",
    "tests/test_y_whole.py": (
        "from greet import greeting\n\n\ndef test_whole():\n    assert greeting('you')\n"
    ),
    "tests/test_z_last.py": (
        "import pytest\n\n\ndef test_last():\n    assert True\n\n\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_later(n):\n    assert n\n"
    ),
}
"""Beside the three tests of the tiny task; `test_y_whole.py` cannot be collected before the fix."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """A runtime and what prepares states on it."""

    runtime: EmbeddedRuntime
    states: StateStore
    home: Path
    builder: PythonBuilder
    store: DistStore

    async def prepared(self, name: str, files: Mapping[str, str | bytes], **test: object) -> State:
        """Another state, with these files over the tiny task's."""
        overlay = tuple(
            FileChange(path, text.encode() if isinstance(text, str) else text)
            for path, text in files.items()
        )
        made = self.home / name
        made.mkdir()
        facts: dict[str, object] = {"arguments": ("tests",), "timeout_s": 60.0, **test}
        spec = tiny_spec(self.store, made, overlay=overlay, test=TestSpec(**facts))  # type: ignore[arg-type]
        return await self.states.prepare(
            spec.digest, lambda p: self.builder.prepare(spec, self.runtime, Limits(), p)
        )


@dataclass(frozen=True, slots=True)
class Suite(Workshop):
    """The same, with a prepared state."""

    state: State


@contextlib.asynccontextmanager
async def open_workshop() -> AsyncIterator[Workshop]:
    """A workshop; nothing of it is left afterwards."""
    home = Path(tempfile.mkdtemp(prefix="regreen-suite-"))
    home.chmod(0o711)
    runtime = EmbeddedRuntime(home / "rt", run_probes=False)
    try:
        await runtime.start()
    except MissingDependency as error:
        shutil.rmtree(home, ignore_errors=True)
        pytest.skip(f"no sandboxes here: {error}")
    states = StateStore(home, runtime)
    await states.open()
    store = DistStore(home / "dists", lambda: PackageIndex(["http://127.0.0.1:9"]))
    try:
        yield Workshop(runtime, states, home, PythonBuilder(store, home / "tools"), store)
        assert not runtime._boxes, "sandboxes are left"
        assert not states._used, "layers are still held"
    finally:
        await states.close()
        await runtime.close()
        shutil.rmtree(home, ignore_errors=True)


@contextlib.asynccontextmanager
async def open_suite() -> AsyncIterator[Suite]:
    """A workshop whose state has several test files."""
    async with open_workshop() as shop:
        state = await shop.prepared("suite", FILES, fail_to_pass=(*FAIL_TO_PASS, WHOLE))
        yield Suite(shop.runtime, shop.states, shop.home, shop.builder, shop.store, state)
