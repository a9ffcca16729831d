"""A repository with more top-level packages than a program may have as arguments."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sandbox_svc.backends.base import Limits
from sandbox_svc.builders.interpreters import find_interpreter
from sandbox_svc.builders.python import Inputs, _foreign_modules
from tests.integration.sandbox_build.suite import Suite, open_suite

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite() -> AsyncIterator[Suite]:
    async with open_suite() as found:
        yield found


@pytest.mark.parametrize(("count", "size"), [(5_000, 12), (9_000, 250)])
async def test_what_is_installed_is_listed_whatever_the_repository_holds(
    suite: Suite, count: int, size: int
) -> None:
    state = suite.state
    box = await suite.runtime.create(state.layers, limits=Limits(), mounts=state.mounts)
    try:
        python = state.metadata["python"]
        inputs = Inputs({python: find_interpreter(python)}, ())
        own = [f"{'p' * (size - 5)}{number:05}/one.py" for number in range(count)]
        files = [*own, "_pytest/mine.py", "sub/wordlib/more.py", "ünï/é.py"]
        found = await _foreign_modules(box, inputs, "greet", files)
        assert {"wordlib", "pytest", "json"} <= found
        assert {"_pytest.config", "_pytest.python"} <= found  # the repository shares the package
        assert not any(name.startswith("pppp") for name in found)
    finally:
        await box.delete()


async def test_such_a_repository_is_prepared(suite: Suite) -> None:
    files = {f"pack{number:05}/one.py": b"" for number in range(5_000)}
    state = await suite.prepared("many", files)
    assert {"wordlib", "pytest"} <= set(state.metadata["foreign"])
