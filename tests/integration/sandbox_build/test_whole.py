"""A module, class or folder of tests that is required as a whole is not emptied by the source."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from sandbox_svc.translate import state_to, validation_to
from sandbox_svc.validate import Outcome
from tests.integration.sandbox_build.suite import FIX, GREET, Workshop, open_workshop
from tests.integration.sandbox_build.test_unseen import FAILS, WRONG, judge, passes

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop() -> AsyncIterator[Workshop]:
    async with open_workshop() as found:
        yield found


_BASE = (
    "from greet import greeting\nfrom greet.testing import Base\n\n\nclass TestG(Base):\n"
    "    def test_p(self):\n        assert greeting('Ada') == 'Hello, Ada!'\n\n\n"
    "def test_t():\n    assert callable(greeting)\n"
)
EMPTIED: dict[str, tuple[str, dict[str, str]]] = {
    "no values for a test": (
        "import greet\nimport pytest\n\n\n@pytest.mark.parametrize('n', greet.NAMES)\n"
        "def test_p(n):\n    assert greet.greeting(n) == f'Hello, {n}!'\n\n\n"
        "def test_t():\n    assert callable(greet.greeting)\n",
        {GREET: "NAMES = []\n" + WRONG},
    ),
    "a base that is no test": (
        _BASE,
        {GREET: WRONG, "greet/testing.py": "class Base: __test__ = False\n"},
    ),
    "a base that is skipped": (
        _BASE,
        {
            GREET: WRONG,
            "greet/testing.py": "import pytest\n@pytest.mark.skip\nclass Base: pass\n",
        },
    ),
    "a base with the flag of unittest": (
        _BASE,
        {
            GREET: WRONG,
            "greet/testing.py": (
                "import unittest\n@unittest.skip('no')\nclass Base(unittest.TestCase): pass\n"
            ),
        },
    ),
    "a mark that is exported": (
        "from greet import *\n\n\ndef test_p():\n    assert greeting('Ada') == 'Hello, Ada!'\n",
        {
            GREET: WRONG + "import pytest\ndef test_ok(): pass\n"
            "pytestmark = pytest.mark.skipif('__name__ != \"greet\"', reason='x')\n"
        },
    ),
    "a module that is said to be no test": (
        "from greet import *\n\n\ndef test_p():\n    assert greeting('Ada') == 'Hello, Ada!'\n",
        {
            GREET: WRONG + "def test_ok(): pass\n__test__ = False\n"
            "__all__ = ['greeting', '__test__', 'test_ok']\n"
        },
    ),
    "values with marks": (
        "import greet\nimport pytest\n\n\n@pytest.mark.parametrize('n', greet.NAMES)\n"
        "def test_p(n):\n    assert greet.greeting(n) == f'Hello, {n}!'\n\n\n"
        "def test_t():\n    assert callable(greet.greeting)\n",
        {
            GREET: WRONG + "import pytest\n"
            "NAMES = [pytest.param('Ada', marks=pytest.mark.skip(reason='x'))]\n"
        },
    ),
}
EMPTIED |= {
    "a skip under another name": (
        "from greet import greeting\n\n\ndef test_p():\n"
        "    assert greeting('Ada') == 'Hello, Ada!'\n\n\n"
        "def test_t():\n    assert callable(greeting)\n",
        {GREET: "from pytest import skip as greeting\n"},
    ),
    "an expected failure under another name": (
        "import unittest\n\nfrom greet import greeting\n\n\nclass TestP(unittest.TestCase):\n"
        "    def test_p(self):\n        self.assertEqual(greeting('Ada'), 'Hello, Ada!')\n\n\n"
        "def test_t():\n    assert callable(greeting)\n",
        {GREET: "import functools, pytest\ngreeting = functools.partial(pytest.xfail, 'x')\n"},
    ),
    "a class that says it is the tests'": (
        _BASE,
        {
            GREET: WRONG,
            "greet/testing.py": (
                "import pytest\n@pytest.mark.skip\nclass Base: __module__ = 'test_e'\n"
            ),
        },
    ),
}
CHOSEN: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "by the word alone": ({"conftest.py": "x = 1  # type: ignore\n"}, {}),
    "by a folder": ({}, {"arguments": ("tests", "--ignore=tests/slow")}),
    "by names of classes": ({"setup.cfg": "[tool:pytest]\npython_classes = Test\n"}, {}),
    "below": ({"sub/pytest.ini": "[pytest]\n"}, {"arguments": ("sub/tests",)}),
}
HONEST = {
    GREET: (FIX.content or b"").decode() + "NAMES = ['Ada']\n",
    "greet/testing.py": "import unittest\n\n\nclass Base(unittest.TestCase):\n    pass\n",
}


@pytest.mark.parametrize("name", EMPTIED)
async def test_what_the_source_exports_does_not_empty_a_module(shop: Workshop, name: str) -> None:
    text, changes = EMPTIED[name]
    files = {**FAILS, "tests/test_e.py": text, "greet/testing.py": "import greet\n"}
    state = await shop.prepared(name, files, fail_to_pass=("tests/test_e.py",))
    verdict = await judge(shop, state, changes)
    assert verdict.outcome is not Outcome.PASSED
    assert verdict.failing == ("tests/test_e.py",), verdict.summary
    honest = await judge(shop, state, HONEST)
    assert honest.outcome is Outcome.PASSED, honest.summary


@pytest.mark.parametrize("name", CHOSEN)
async def test_what_leaves_no_test_out_is_no_excuse(shop: Workshop, name: str) -> None:
    files, how = CHOSEN[name]
    start = "sub/" if name == "below" else ""
    files = {**FAILS, **files, f"{start}tests/test_e.py": _BASE}
    files["greet/testing.py"] = "import greet\n"
    state = await shop.prepared(f"chosen {name}", files, fail_to_pass=(), **how)
    assert "tests/test_e.py" in state.metadata["baseline"]["failing"]
    emptied = {GREET: (FIX.content or b"").decode(), "greet/testing.py": "class Base: __test__ = 0"}
    verdict = await judge(shop, state, emptied)
    assert verdict.failing == ("tests/test_e.py",), verdict.summary
    honest = await judge(shop, state, HONEST)
    assert honest.outcome is Outcome.PASSED, honest.summary


BROADER = {
    "a class": (
        "import greet\nimport pytest\n\n\n@pytest.mark.parametrize('a,b', greet.PAIRS)\n"
        "class TestC:\n    def test_p(self, a, b):\n        assert greet.greeting('Ada')\n",
        {GREET: "PAIRS = [1]\n" + WRONG},
        {GREET: (FIX.content or b"").decode() + "PAIRS = [(1, 2)]\n"},
    ),
    "a name that is no text": (
        "import pytest\nimport greet\n\n\n@pytest.mark.parametrize('n', ['\\udcff'])\n"
        "def test_p(n):\n    if not hasattr(greet, 'greeting'):\n"
        "        raise ValueError('\\udcff bad')\n",
        {GREET: "x = 1\n"},
        {GREET: (FIX.content or b"").decode()},
    ),
    "made by a decorator": (
        "import greet\n\n\ndef expand(f):\n    f.__globals__['test_p_0'] = f\n\n\n@expand\n"
        "def test_p():\n    assert greet.greeting('Ada')\n",
        {GREET: "1 / 0\n"},
        {GREET: (FIX.content or b"").decode()},
    ),
    "passed over as unittest does": (
        "import unittest\n\nimport greet\n\n\ndef test_p():\n    raise unittest.SkipTest('no')\n"
        "\n\ndef test_t():\n    assert greet.greeting('Ada')\n",
        {GREET: "1 / 0\n"},
        {GREET: (FIX.content or b"").decode()},
    ),
}


@pytest.mark.parametrize("name", BROADER)
async def test_an_honest_fix_makes_them_whole(shop: Workshop, name: str) -> None:
    text, broken, fix = BROADER[name]
    files = {**broken, "tests/test_e.py": text}
    state = await shop.prepared(f"whole {name}", files, fail_to_pass=())
    assert state_to(state).baseline.failing
    verdict = await judge(shop, state, {})
    assert verdict.outcome in (Outcome.FAILED, Outcome.BUILD_FAILED)
    assert validation_to(verdict).summary
    honest = await judge(shop, state, fix)
    assert honest.outcome is Outcome.PASSED, honest.summary


async def test_tests_may_pass_over_what_they_say_themselves(shop: Workshop) -> None:
    text = (
        "import sys\nimport unittest\n\nimport pytest\n\nfrom greet import greeting\n\n\n"
        "@pytest.mark.skipif(sys.version_info > (3,), reason='old')\ndef test_old():\n"
        "    assert 0\n\n\n@unittest.skip('no')\nclass TestCases(unittest.TestCase):\n"
        "    def test_no(self):\n        assert 0\n\n\n"
        "@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.xfail)])\n"
        "def test_n(n):\n    assert greeting('Ada') and n == 1\n\n\n"
        "@pytest.fixture\ndef test_data():\n    return 1\n\n\n"
        "class Helper:\n    def test_never(self):\n        assert 0\n\n\n"
        "class TestWithout:\n    __test__ = False\n\n    def test_never(self):\n        assert 0\n"
    )
    state = await shop.prepared("own", {**FAILS, "tests/test_e.py": text}, fail_to_pass=())
    assert "tests/test_e.py" in state.metadata["baseline"]["failing"]
    named = ("test_old", "TestCases::test_no", "test_n")
    assert state.metadata["expected"]["tests/test_e.py"] == [f"tests/test_e.py::{n}" for n in named]
    await passes(shop, state)
