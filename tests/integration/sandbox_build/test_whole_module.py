"""A module that must pass as a whole: what is passed over in it counts only by its own words."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox_svc.backends.base import Limits
from sandbox_svc.builders.base import FileChange
from sandbox_svc.validate import Outcome
from tests.fixtures.tasks.tiny_task import tiny_spec
from tests.integration.sandbox_build.test_validate import GREET, World, world  # noqa: F401

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODULE = "tests/test_greet.py"
TESTS = b"""import unittest

import pytest
from greet import greeting, VERSION


def test_version():
    assert VERSION


def test_greeting():
    assert greeting("Ada") == "Hello, Ada!"


class TestCase(unittest.TestCase):
    def test_two(self):
        self.assertNotEqual(greeting("A"), greeting("B"))

    @unittest.skip("the tests say so")
    def test_marked(self):
        raise AssertionError


@pytest.mark.skipif("sys.platform == 'linux'")
def test_elsewhere():
    raise AssertionError


@pytest.mark.xfail
def test_not_yet():
    assert greeting("Ada") == "?"


def test_says_so():
    pytest.skip("here")
"""
BROKEN = b"""from wordlib import hello

VERSION = "1.0"


def greeting(name):
    return f"{hello()}, {name}!"
"""
HONEST = BROKEN.replace(b"import hello", b"import salute as hello")
SKIPS = """from unittest import SkipTest
import pytest
VERSION = "1.0"


def greeting(name):
    {skip}
"""
WAYS = {
    "SkipTest": "raise SkipTest('wordlib has no hello')",
    "pytest.skip": "pytest.skip('wordlib has no hello')",
    "pytest.xfail": "pytest.xfail('wordlib has no hello')",
    "importorskip": "pytest.importorskip('no_such_module')",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:  # noqa: F811
    folder: Path = tmp_path_factory.mktemp("whole")
    spec = tiny_spec(world.builder.store, folder)
    overlay = (FileChange(MODULE, TESTS), FileChange(GREET, BROKEN))
    spec = replace(spec, test=replace(spec.test, fail_to_pass=()), overlay=overlay)
    state = await world.states.prepare(
        spec.digest,
        lambda p: world.builder.prepare(spec, world.runtime, Limits(), p),
        progress=lambda stage: None,
    )
    assert list(state.metadata["baseline"]["failing"]) == [MODULE]
    yield replace(world, state=state)


async def test_an_honest_fix_passes_with_the_tests_own_skips(whole: World) -> None:
    verdict = await whole.judge(FileChange(GREET, HONEST))
    assert verdict.outcome is Outcome.PASSED, (verdict.summary, verdict.tests, verdict.log)
    assert verdict.counts == {"passed": 3, "skipped": 3, "xfailed": 1}


@pytest.mark.parametrize("way", WAYS)
async def test_code_that_skips_its_tests_fails(whole: World, way: str) -> None:
    code = SKIPS.format(skip=WAYS[way])
    verdict = await whole.judge(FileChange(GREET, code.encode()))
    assert verdict.outcome is Outcome.FAILED
    assert verdict.failing == (MODULE,)
    assert verdict.counts["passed"] == 1
