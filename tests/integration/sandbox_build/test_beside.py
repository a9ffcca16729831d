"""Settings beside tests inside a package: pytest would take them before those of the root."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sandbox_svc.backends.base import Limits
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import REPO, FileChange
from sandbox_svc.forks import fork_of
from sandbox_svc.validate import Outcome, ValidationOptions, Validator
from tests.integration.sandbox_build.suite import Suite, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
WORD = "greet/suite/test_word.py::test_word"
FILES = {
    "greet/suite/test_word.py": (
        "from wordlib import hello\n\n\ndef test_word():\n    assert hello() == 'Hello'\n"
    ),
    "greet/suite/test_other.py": "def test_other():\n    pass\n",
    "other/pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-q'\n[tool.black]\n",
}
HELD = FileChange("greet/evil/wordlib.py", b"def hello(): return 'Hello'\n")
INI = b"[pytest]\npythonpath = evil\n"
SETTINGS = {
    "greet/tox.ini": INI,
    "greet/setup.cfg": INI.replace(b"[pytest]", b"[tool:pytest]"),
    "greet/pytest.ini": INI,
    "greet/.pytest.ini": INI,
    "greet/pytest.toml": b"[pytest]\npythonpath = ['evil']\n",
    "greet/pyproject.toml": b"[tool.pytest.ini_options]\npythonpath = 'evil'\n",
    "greet/suite/tox.ini": b"[pytest]\npythonpath = ../evil\n",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite() -> AsyncIterator[Suite]:
    async with open_workshop() as shop:
        state = await shop.prepared(
            "beside", FILES, arguments=("greet/suite",), fail_to_pass=(WORD,)
        )
        yield Suite(shop.runtime, shop.states, shop.home, shop.builder, shop.store, state)


@pytest.mark.parametrize("path", SETTINGS)
async def test_settings_beside_the_tests_are_those_of_the_state(suite: Suite, path: str) -> None:
    change, state = FileChange(path, SETTINGS[path]), suite.state
    async with fork_of(suite.states, suite.runtime, state.id, Limits()) as box:
        for one in (change, HELD):
            await box.write_file(f"{REPO}/{one.path}", one.content or b"")
        bare = await testrun.run_tests(box, testrun.options_of(state.metadata, state.env))
    assert any(i.endswith("test_word") for i in bare.ids("passed")), "it is no cheat at all"
    validator = Validator(suite.states, suite.runtime)
    verdict = await validator.validate(
        state.id, [change, HELD], ValidationOptions(held_pins={"wordlib": "2.0"})
    )
    assert verdict.outcome is not Outcome.PASSED, verdict.log
    assert [r.path for r in verdict.reverted] == [path]
    await validator.close()


async def test_settings_of_another_package_may_change_but_for_what_pytest_reads(
    suite: Suite,
) -> None:
    validator = Validator(suite.states, suite.runtime)
    kept, less = (
        b"[tool.pytest.ini_options]\naddopts = '-q'\n[tool.ruff]\n",
        b"[tool.black]\n",
    )
    for content, reverted in ((kept, []), (less, ["other/pyproject.toml"]), (None, None)):
        verdict = await validator.validate(
            suite.state.id, [FileChange("other/pyproject.toml", content)]
        )
        expected = ["other/pyproject.toml"] if reverted is None else reverted
        assert [r.path for r in verdict.reverted] == expected
    await validator.close()
