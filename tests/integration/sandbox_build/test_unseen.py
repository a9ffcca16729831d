"""What the untouched run of a State cannot tell of its tests is the State's all the same."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.builders.base import FileChange
from sandbox_svc.state_records import State
from sandbox_svc.translate import state_to
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.integration.sandbox_build.suite import FIX, GREET, Workshop, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
WRONG = "def greeting(name): return 'no'\n"
TEST = (
    "from greet import greeting\n\n\ndef test_h():\n    assert greeting('Ada') == 'Hello, Ada!'\n"
)
LATE = (
    "def test_h():\n    from greet import greeting\n\n    assert greeting('Ada') == 'Hello, Ada!'\n"
)
GREEN = "def test_h(): pass\n"
HOOK = (
    "import pytest\n@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem):\n"
    "    return True\n"
)
BROKEN = "import greet\n"
"""A configuration that cannot be imported before the fix."""
CHECKS = "[tool:pytest]\ntestpaths = checks\npython_files = check_*.py\n"
HELPED = {
    "conftest.py": BROKEN,
    "checks/helper.py": "def agreed(value):\n    return value == 'Hello, Ada!'\n",
    "checks/check_g.py": (
        "from helper import agreed\n\n\ndef test_h():\n    from greet import greeting\n\n"
        "    assert agreed(greeting('Ada'))\n"
    ),
}
DOC = "def f():\n    '''\n    >>> 1\n    {}\n    '''\n"
WHO = "import pytest\n\n\n@pytest.fixture\ndef who():\n    return 'Ada'\n"
WITH = "def test_h(who):\n    import greet\n\n    assert greet.greeting(who) == 'Hello, Ada!'\n"
FAILS = {GREET: "from wordlib import hello\n"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop() -> AsyncIterator[Workshop]:
    async with open_workshop() as found:
        yield found


async def judge(shop: Workshop, state: State, changes: Mapping[str, str], **options: Any) -> Any:
    validator = Validator(shop.states, shop.runtime)
    try:
        diff = [FileChange(path, text.encode()) for path, text in changes.items()]
        found: Validation = await validator.validate(state.id, diff, ValidationOptions(**options))
        return found
    finally:
        await validator.close()


async def passes(shop: Workshop, state: State, **more: str) -> None:
    verdict = await judge(shop, state, {GREET: (FIX.content or b"").decode(), **more})
    assert (verdict.outcome, verdict.reverted) == (Outcome.PASSED, ()), verdict.summary


async def gains_nothing(shop: Workshop, state: State, path: str, text: str, reason: str) -> None:
    """A file of the State's is a diff's to change neither alone nor beside source."""
    verdict = await judge(shop, state, {GREET: WRONG, path: text})
    assert [(r.path, r.reason) for r in verdict.reverted] == [(path, reason)]
    assert verdict.outcome is Outcome.FAILED, verdict.summary


AT_ONCE: dict[str, tuple[dict[str, str], dict[str, Any], str, str, str]] = {
    "settings call it a test": (
        {"setup.cfg": CHECKS, "conftest.py": BROKEN, "checks/check_g.py": LATE},
        {"arguments": ()},
        "checks/check_g.py",
        GREEN,
        "test",
    ),
    "a pattern calls it a test": (
        {
            "pytest.ini": "[pytest]\npython_files = tests.py\n    test_*.py\n",
            "conftest.py": BROKEN,
            "polls/__init__.py": "",
            "polls/tests.py": LATE,
        },
        {"arguments": ()},
        "polls/tests.py",
        GREEN,
        "test",
    ),
    "a pattern for all, and its text": (
        {
            "pyproject.toml": (
                "[tool.pytest.ini_options]\npython_files = '*.py'\ntestpaths = ['spec']\n"
            ),
            "conftest.py": BROKEN,
            "spec/__init__.py": "",
            "spec/greeting.py": LATE,
        },
        {"arguments": ()},
        "spec/greeting.py",
        GREEN,
        "test",
    ),
    "a helper in a folder that settings name": (
        {"setup.cfg": CHECKS, **HELPED},
        {"arguments": ()},
        "checks/helper.py",
        "def agreed(value): return True\n",
        "test",
    ),
    "a plugin that cannot be imported": (
        {
            "conftest.py": "pytest_plugins = ['support.fixtures']\n",
            "support/__init__.py": "",
            "support/fixtures.py": BROKEN + WHO,
            "tests/test_w.py": WITH,
        },
        {},
        "support/fixtures.py",
        BROKEN + WHO + HOOK,
        "test",
    ),
    "a plugin after a configuration that fails": (
        {
            "conftest.py": BROKEN + "pytest_plugins = 'support.fixtures'\n",
            "support/__init__.py": "",
            "support/fixtures.py": WHO,
            "tests/test_w.py": WITH,
        },
        {},
        "support/fixtures.py",
        WHO + HOOK,
        "test",
    ),
    "a plugin that arguments name": (
        {
            "support/__init__.py": "",
            "support/fixtures.py": BROKEN + WHO,
            "tests/test_w.py": WITH,
        },
        {"arguments": ("-p", "support.fixtures", "tests"), "environment": {"PYTHONPATH": "."}},
        "support/fixtures.py",
        BROKEN + WHO + HOOK,
        "test",
    ),
    "a place of modules": (
        {
            "setup.cfg": "[tool:pytest]\npythonpath = vendor\n",
            "conftest.py": BROKEN,
            "vendor/extra.py": "X = 1\n",
            "tests/test_w.py": "def test_h():\n    import json\n    from greet import greeting\n\n"
            "    assert json.dumps(greeting('Ada')) == '\"Hello, Ada!\"'\n",
        },
        {},
        "vendor/wordlib.py",
        "def hello(): return 'Hello'\n",
        "shadows",
    ),
    "a configuration below": (
        {
            "setup.cfg": "[tool:pytest]\npython_files = check_*.py test_*.py\n",
            "sub/checks/conftest.py": BROKEN,
            "sub/checks/check_a.py": LATE,
        },
        {"arguments": ()},
        "sub/checks/check_a.py",
        GREEN,
        "test",
    ),
    "a helper in a folder that pytest.ini names": (
        {"pytest.ini": CHECKS.replace("tool:", ""), **HELPED},
        {"arguments": ()},
        "checks/helper.py",
        "def agreed(value): return True\n",
        "test",
    ),
    "a plugin that a plugin names": (
        {
            "conftest.py": BROKEN + "try:\n    pytest_plugins = ['one']\nfinally:\n    pass\n",
            "one.py": "pytest_plugins = ('two',)\n",
            "two.py": WHO,
            "tests/test_w.py": WITH,
        },
        {},
        "two.py",
        WHO + HOOK,
        "test",
    ),
    "a plugin of a module that cannot be collected": (
        {
            "two.py": WHO,
            "tests/test_w.py": "pytest_plugins = ['two']\nimport greet\n\n\n" + WITH,
        },
        {},
        "two.py",
        WHO + HOOK,
        "test",
    ),
    "examples in a document": (
        {
            "conftest.py": BROKEN,
            "README.rst": ">>> from greet import greeting\n>>> greeting('Ada')\n'Hello, Ada!'\n",
        },
        {"arguments": ("--doctest-glob=*.rst", ".")},
        "README.rst",
        ">>> 1\n1\n",
        "test",
    ),
}
_WANTED = {
    "tests/test_w.py": "tests/test_w.py::test_h",
    "README.rst": "README.rst::README.rst",
}


@pytest.mark.parametrize("name", AT_ONCE)
async def test_where_nothing_is_collected_the_text_tells(shop: Workshop, name: str) -> None:
    files, how, path, text, reason = AT_ONCE[name]
    tests = [file for file, code in files.items() if "test_h" in code or file.endswith(".rst")]
    wanted = tuple(_WANTED.get(file, f"{file}::test_h") for file in tests)
    state = await shop.prepared(name, {**FAILS, **files}, fail_to_pass=wanted, **how)
    await gains_nothing(shop, state, path, text, reason)
    await passes(shop, state)


async def test_what_is_not_taken_from_settings_is_said(shop: Workshop) -> None:
    files = {"setup.cfg": "[tool:pytest]\naddopts = -q\n    --strict-markers\n"}
    state = await shop.prepared("noted", files, fail_to_pass=FAIL_TO_PASS)
    (note,) = state_to(state).baseline.notes
    assert note.startswith("addopts of setup.cfg are not used (-q --strict-markers); give")
    files |= {**FAILS, "conftest.py": BROKEN}
    state = await shop.prepared("twice", files, fail_to_pass=FAIL_TO_PASS)
    assert "name others in test.protected_paths" in state_to(state).baseline.notes[1]


async def test_an_example_that_a_fix_may_change_is_not_asked_for_unseen(shop: Workshop) -> None:
    files = {**FAILS, "conftest.py": BROKEN, "greet/deep.py": DOC.format(1)}
    with pytest.raises(InvalidArgument, match=r"greet/deep\.py"):
        await shop.prepared(
            "example", files, arguments=("--doctest-modules", "."),
            fail_to_pass=("greet/deep.py::greet.deep.f",),
        )  # fmt: skip


PACKAGE = {"greet/tests/__init__.py": "", "greet/tests/test_i.py": TEST}
FAKE = "__file__ = '/work/repo/{}'\ndef test_h(): pass\n"


async def test_a_tree_of_tests_like_that_of_the_source_refuses_no_fix(shop: Workshop) -> None:
    files = {
        **FAILS,
        "tests/greet/test_m.py": LATE,
        "tests/ext.so": "",
        "tests/compat.py": "x = 1\n",
    }
    files["tests/__init__.py"] = ""
    wanted = ("tests/greet/test_m.py::test_h",)
    state = await shop.prepared("mirror", files, fail_to_pass=wanted)
    await passes(shop, state, **{"compat.py": "x = 2\n"})


async def test_an_object_among_the_modules_that_fails_hides_nothing(shop: Workshop) -> None:
    wanted = ("greet/tests/test_i.py::test_h",)
    state = await shop.prepared("proxy", PACKAGE, arguments=("greet",), fail_to_pass=wanted)
    changes = {
        GREET: "import sys\nclass Proxy:\n    def __getattribute__(self, name): raise ValueError\n"
        "sys.modules['greet.ctx'] = Proxy()\n__path__ = ['/work/repo/fake']\n" + WRONG,
        "fake/tests.py": "__path__ = ['/work/repo/fake/t']\n",
        "fake/t/test_i/__init__.py": FAKE.format("greet/tests/test_i.py"),
    }
    verdict = await judge(shop, state, changes)
    assert verdict.outcome is Outcome.FAILED, verdict.summary


@pytest.mark.parametrize("line", ["__path__ = [{!r}]\n", "__path__.insert(0, {!r})\n"])
async def test_a_package_does_not_lead_to_other_tests(shop: Workshop, line: str) -> None:
    wanted = ("greet/tests/test_i.py::test_h",)
    state = await shop.prepared(
        f"path {line[8:14].strip()}", PACKAGE, arguments=("greet",), fail_to_pass=wanted
    )
    changes = {
        GREET: line.format("/work/repo/fake") + WRONG,
        "fake/tests.py": "__path__ = ['/work/repo/fake/t']\n",
        "fake/t/test_i/__init__.py": FAKE.format("greet/tests/test_i.py"),
    }
    verdict = await judge(shop, state, changes)
    assert verdict.outcome is Outcome.FAILED
    assert "by /work/repo/fake/t" in verdict.summary
    await passes(shop, state)


async def test_a_package_does_not_lead_to_another_helper(shop: Workshop) -> None:
    helped = (
        "from greet.tests.helper import agreed\n\n\ndef test_h():\n    from greet import greeting\n"
        "\n    assert agreed(greeting('Ada'))\n"
    )
    files = {
        **PACKAGE,
        "greet/tests/test_i.py": helped,
        "greet/tests/helper.py": "def agreed(value):\n    return value == 'Hello, Ada!'\n",
    }
    wanted = ("greet/tests/test_i.py::test_h",)
    state = await shop.prepared("led", files, arguments=("greet",), fail_to_pass=wanted)
    leads = (
        "import greet.tests\ngreet.tests.__path__.insert(0, '/work/repo/fake')\n"
        "def greeting(name): return 'no'\n"
    )
    fake = {"fake/helper.py": "def agreed(value): return True\n"}
    verdict = await judge(shop, state, {GREET: leads, **fake})
    assert verdict.outcome is Outcome.FAILED
    assert "greet/tests/helper.py by /work/repo/fake/helper.py" in verdict.summary
    await passes(shop, state)


async def test_the_folder_above_the_tests_does_not_become_a_package(shop: Workshop) -> None:
    state = await shop.prepared("above", {"tests/__init__.py": ""}, fail_to_pass=FAIL_TO_PASS)
    await gains_nothing(shop, state, "__init__.py", "__path__ = ['/work/repo/fake']\n", "test")
    await passes(shop, state)


async def test_the_project_s_own_folder_may_be_fixed_where_arguments_name_it(
    shop: Workshop,
) -> None:
    files = {**PACKAGE, **FAILS, "greet/data.json": "{}"}
    wanted = ("greet/tests/test_i.py::test_h",)
    state = await shop.prepared("named", files, arguments=("greet",), fail_to_pass=wanted)
    await passes(shop, state, **{"greet/data.json": "[]"})
    await gains_nothing(shop, state, "greet/tests/test_i.py", GREEN, "test")
    kept = await shop.prepared(
        "kept", files, arguments=("greet",), fail_to_pass=wanted, protected_paths=("greet",)
    )
    verdict = await judge(shop, kept, {GREET: (FIX.content or b"").decode()})
    assert [r.path for r in verdict.reverted] == [GREET]


async def test_what_the_repository_has_in_another_place_is_no_leave_for_this_one(
    shop: Workshop,
) -> None:
    state = await shop.prepared("places", {"lib/wordlib.py": "X = 1\n"}, fail_to_pass=FAIL_TO_PASS)
    path = "wordlib.py"
    verdict = await judge(shop, state, {path: "def hello(): return 'Hello'\n"})
    assert [(r.path, r.reason) for r in verdict.reverted] == [(path, "shadows")]
    assert verdict.outcome is Outcome.FAILED
