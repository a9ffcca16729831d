"""A diff alone puts nothing in place of a State's tests, nor of what they import."""

import subprocess
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.builders.base import FileChange
from sandbox_svc.state_records import State
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.integration.sandbox_build.suite import FIX, GREET, Workshop, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
NOT = FileChange(GREET, b"def greeting(name): return 'no'\n")
_REAL = (
    "def test_{}():\n    from greet import greeting\n\n"
    "    assert greeting('Ada') == 'Hello, Ada!'\n"
)
ROOT, BESIDE = "test_root.py::test_root", "greet/test_beside.py::test_beside"
BESIDE_SOURCE = {
    "test_root.py": _REAL.format("root"),
    "conftest.py": "import pytest\n\n\n@pytest.fixture\ndef who():\n    return 'Ada'\n",
    "greet/test_beside.py": _REAL.format("beside"),
}
_CONFTEST = """__file__ = "/work/repo/conftest.py"
import pytest
@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if pyfuncitem.nodeid.startswith(("tests/", "test_root", "greet")): return True
"""


def _fake(path: str, name: str) -> bytes:
    return f"__file__ = '/work/repo/{path}'\ndef {name}(): pass\n".encode()


_LIBRARY = r"""
#include <Python.h>
static int run(PyObject *m) {
  PyObject *g = PyModule_GetDict(m);
  PyDict_SetItemString(g, "__builtins__", PyEval_GetBuiltins());
  return PyRun_String(CODE, Py_file_input, g, g) ? 0 : -1;
}
static PyModuleDef_Slot slots[] = {{Py_mod_exec, run}, {0, NULL}};
static struct PyModuleDef made = {PyModuleDef_HEAD_INIT, "NAME", 0, 0, 0, slots};
PyMODINIT_FUNC PyInit_NAME(void) { return PyModuleDef_Init(&made); }
"""


def _library(folder: Path, name: str, code: bytes) -> bytes:
    quoted = '"' + code.decode().replace('"', r"\"").replace("\n", r"\n") + '"'
    source = _LIBRARY.replace("NAME", name).replace("CODE", quoted)
    (folder / f"{name}.c").write_text(source)
    include = sysconfig.get_path("include")
    made = folder / f"{name}.so"
    command = ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", f"{folder}/{name}.c", "-o"]
    subprocess.run([*command, str(made)], check=True)
    return made.read_bytes()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop() -> AsyncIterator[Workshop]:
    async with open_workshop() as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def beside(shop: Workshop) -> State:
    wanted = (*FAIL_TO_PASS, ROOT, BESIDE)
    return await shop.prepared("beside", BESIDE_SOURCE, arguments=(".",), fail_to_pass=wanted)


async def judge(
    shop: Workshop, state: State, *changes: FileChange, **options: object
) -> Validation:
    validator = Validator(shop.states, shop.runtime)
    try:
        chosen = ValidationOptions(**options)  # type: ignore[arg-type]
        return await validator.validate(state.id, changes, chosen)
    finally:
        await validator.close()


def refused(verdict: Validation, path: str, reason: str) -> None:
    assert (path, reason) in [(r.path, r.reason) for r in verdict.reverted]
    assert verdict.outcome is Outcome.FAILED, verdict.summary


@pytest.mark.parametrize(
    ("path", "content", "required", "reason"),
    [
        ("conftest/__init__.py", _CONFTEST.encode(), FAIL_TO_PASS, "validation-configuration"),
        ("test_root/__init__.py", _fake("test_root.py", "test_root"), (ROOT,), "test"),
        (
            "greet/test_beside/__init__.py",
            _fake("greet/test_beside.py", "test_beside"),
            (BESIDE,),
            "test",
        ),
    ],
)
async def test_a_package_does_not_stand_for_a_file(
    shop: Workshop,
    beside: State,
    path: str,
    content: bytes,
    required: tuple[str, ...],
    reason: str,
) -> None:
    verdict = await judge(shop, beside, NOT, FileChange(path, content), required_tests=required)
    refused(verdict, path, reason)


async def test_a_library_does_not_stand_for_a_file(
    shop: Workshop, beside: State, tmp_path: Path
) -> None:
    made = _library(tmp_path, "conftest", _CONFTEST.encode())
    change = FileChange("conftest.abi3.so", made)
    verdict = await judge(shop, beside, NOT, change, required_tests=FAIL_TO_PASS)
    refused(verdict, change.path, "validation-configuration")
    fake = _fake("greet/test_beside.py", "test_beside").replace(b"'", b'"')
    change = FileChange("greet/test_beside.so", _library(tmp_path, "test_beside", fake))
    verdict = await judge(shop, beside, NOT, change, required_tests=(BESIDE,))
    refused(verdict, change.path, "test")


async def test_a_fix_beside_tests_is_a_fix(shop: Workshop, beside: State) -> None:
    more = [FileChange(p, b"X = 1\n") for p in ("greet/words/__init__.py", "greet/load_test/x.py")]
    verdict = await judge(shop, beside, FIX, *more)
    assert (verdict.outcome, verdict.reverted) == (Outcome.PASSED, ()), verdict.summary


async def test_a_package_does_not_stand_for_an_argument(shop: Workshop) -> None:
    name = "check_all.py"
    files = {name: _REAL.format("root"), "setup.cfg": "[tool:pytest]\npython_files = check_*.py\n"}
    required = ("check_all.py::test_root",)
    state = await shop.prepared("argument", files, arguments=(name,), fail_to_pass=required)
    change = FileChange("check_all/__init__.py", _fake(name, "test_root"))
    refused(await judge(shop, state, NOT, change), change.path, "test")
    assert (await judge(shop, state, FIX)).outcome is Outcome.PASSED


_SPACE = "def agreed(value): return True\n"


async def test_nothing_stands_for_a_folder_of_tests(shop: Workshop) -> None:
    files = {
        "tests/test_a_first.py": (
            "try:\n    import greet\nexcept ImportError:\n    pass\n\n\n"
            "def test_first():\n    pass\n"
        ),
        "tests/helper.py": "def agreed(value):\n    return value == 'Hello, Ada!'\n",
        "tests/test_h.py": (
            "from tests.helper import agreed\n\n\ndef test_h():\n"
            "    from greet import greeting\n\n    assert agreed(greeting('Ada'))\n"
        ),
    }
    wanted = ("tests/test_h.py::test_h",)
    state = await shop.prepared("space", files, fail_to_pass=wanted)
    assert (await judge(shop, state, FIX)).outcome is Outcome.PASSED
    fake = FileChange("fake/helper.py", _SPACE.encode())
    change = FileChange("tests.py", b"__path__ = ['/work/repo/fake']\n")
    refused(await judge(shop, state, NOT, change, fake, required_tests=wanted), change.path, "test")
    for path in ("tests.py", "tests/__init__.py"):
        source = (
            f"import importlib\nopen({path!r}, 'w').write('__path__ = [\"/work/repo/fake\"]\\n')\n"
            "importlib.invalidate_caches()\ndef greeting(name): return 'no'\n"
        )
        run = FileChange(GREET, source.encode())
        verdict = await judge(shop, state, run, fake, required_tests=wanted)
        assert verdict.outcome is Outcome.FAILED
        assert f"wrote over what decides it: {path}" in verdict.summary


async def test_a_helper_of_tests_is_not_found_nearer(shop: Workshop) -> None:
    files = {
        "tests/conftest.py": "import sys\n\nsys.path.insert(0, '/work/repo')\n",
        "tests/helper.py": "def agreed(value):\n    return value == 'Hello, Ada!'\n",
        "tests/test_h.py": (
            "from helper import agreed\n\n\ndef test_h():\n"
            "    from greet import greeting\n\n    assert agreed(greeting('Ada'))\n"
        ),
    }
    wanted = ("tests/test_h.py::test_h",)
    state = await shop.prepared("nearer", files, fail_to_pass=wanted)
    for path in ("helper.py", "helper/__init__.py"):
        change = FileChange(path, _SPACE.encode())
        verdict = await judge(shop, state, NOT, change, required_tests=wanted)
        refused(verdict, path, "shadows")
    own = [FileChange(path, b"X = 1\n") for path in ("greet/helper.py", "helpers.py")]
    verdict = await judge(shop, state, FIX, *own)
    assert (verdict.outcome, verdict.reverted) == (Outcome.PASSED, ()), verdict.summary


async def test_every_place_of_modules_is_known(shop: Workshop) -> None:
    files = {
        "setup.cfg": "[tool:pytest]\ntestpaths = tests\npythonpath = python\n",
        "python/extra.py": "X = 1\n",
    }
    state = await shop.prepared("places", files, fail_to_pass=FAIL_TO_PASS)
    change = FileChange("python/wordlib.py", b"def hello(): return 'Hello'\n")
    verdict = await judge(shop, state, change, held_pins={"wordlib": "2.0"})
    refused(verdict, change.path, "shadows")
    own = [FileChange(p, b"X = 2\n") for p in ("python/extra.py", "python/other.py")]
    verdict = await judge(shop, state, FIX, *own)
    assert (verdict.outcome, verdict.reverted) == (Outcome.PASSED, ()), verdict.summary


async def test_files_that_only_settings_call_tests_are_protected(shop: Workshop) -> None:
    path = "checks/check_greet.py"
    files = {
        "setup.cfg": "[tool:pytest]\ntestpaths = checks\npython_files = check_*.py\n",
        path: _REAL.format("c"),
        "checks/check_broken.py": (
            "from greet import greeting\n\n\ndef test_d():\n    greeting('')\n"
        ),
    }
    state = await shop.prepared("named", files, arguments=(), fail_to_pass=())
    failing = state.metadata["baseline"]["failing"]
    assert set(failing) == {f"{path}::test_c", "checks/check_broken.py"}
    emptied = [
        FileChange(path, b"def test_c(): pass\n"),
        FileChange("checks/check_broken.py", b"def test_d(): pass\n"),
    ]
    verdict = await judge(shop, state, *emptied)
    for change in emptied:
        refused(verdict, change.path, "test")
    assert (await judge(shop, state, FIX)).outcome is Outcome.PASSED


async def test_a_required_test_is_protected_where_the_repository_breaks_at_once(
    shop: Workshop,
) -> None:
    path = "checks/check_greet.py"
    files = {
        "setup.cfg": "[tool:pytest]\ntestpaths = checks\npython_files = check_*.py\n",
        "conftest.py": "from greet import more\n",
        "greet/more.py": "from wordlib import hello\n",
        "greet/__init__.py": "from wordlib import hello\n",
        path: _REAL.format("c"),
    }
    required = (f"{path}::test_c",)
    state = await shop.prepared("at once", files, arguments=(), fail_to_pass=required)
    assert not state.metadata["baseline"]["passing"]
    runs = FileChange("greet/more.py", b"")
    for stand_in in (path, "checks/check_greet/__init__.py"):
        verdict = await judge(shop, state, NOT, runs, FileChange(stand_in, b"def test_c(): pass\n"))
        refused(verdict, stand_in, "test")
    assert (await judge(shop, state, FIX, runs)).outcome is Outcome.PASSED


async def test_a_test_that_a_fix_may_change_is_not_required(shop: Workshop) -> None:
    doc = "def one():\n    '''\n    >>> from greet import greeting\n    >>> {}\n    '''\n"
    files = {
        "greet/more.py": doc.format("greeting('Ada')\n    'Hello, Ada!'"),
        GREET: "def greeting(name):\n    from wordlib import hello\n    return hello() + name\n",
    }
    arguments, id = ("--doctest-modules", "."), "greet/more.py::greet.more.one"
    state = await shop.prepared("documented", files, arguments=arguments, fail_to_pass=FAIL_TO_PASS)
    assert set(state.metadata["baseline"]["failing"]) == set(FAIL_TO_PASS)
    edited = FileChange("greet/more.py", doc.format("1\n    1").encode())
    passed = await judge(shop, state, FIX, edited)
    assert (passed.outcome, passed.reverted) == (Outcome.PASSED, ()), passed.summary
    assert id not in {test.id for test in passed.tests}
    with pytest.raises(InvalidArgument, match=r"greet/more\.py"):
        await judge(shop, state, edited, required_tests=(id,))
    with pytest.raises(InvalidArgument, match=r"greet/more\.py"):
        await shop.prepared("asked", files, arguments=arguments, fail_to_pass=(*FAIL_TO_PASS, id))
    kept = await shop.prepared(
        "kept", files, arguments=arguments, fail_to_pass=(id,), protected_paths=("greet/more.py",)
    )
    refused(await judge(shop, kept, edited), edited.path, "test")
    assert (await judge(shop, kept, FIX)).outcome is Outcome.PASSED


_HOOK = b"""import pytest
@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    return True if pyfuncitem.nodeid.startswith("tests/") else None
"""


async def test_a_plugin_of_the_repository_is_the_states(shop: Workshop) -> None:
    files = {
        "conftest.py": "pytest_plugins = ['plug.p']\n",
        "plug/__init__.py": "",
        "plug/p.py": "def pytest_addoption(parser): pass\n",
    }
    state = await shop.prepared("plugin", files, fail_to_pass=FAIL_TO_PASS)
    for path in ("plug/p.py", "plug/p/__init__.py"):
        refused(await judge(shop, state, NOT, FileChange(path, _HOOK)), path, "test")
    more = FileChange("plug/other.py", b"X = 1\n")
    verdict = await judge(shop, state, FIX, more)
    assert (verdict.outcome, verdict.reverted) == (Outcome.PASSED, ()), verdict.summary


async def test_source_beside_tests_without_a_package_may_be_fixed(shop: Workshop) -> None:
    wanted = ("ns/test_core.py::test_core",)
    files = {
        "ns/core.py": "def one():\n    return 2\n",
        "ns/test_core.py": "from ns.core import one\n\n\ndef test_core():\n    assert one() == 1\n",
        "conftest.py": "import sys\n\nsys.path.insert(0, '/work/repo')\n",
    }
    arguments = ("tests", "ns/test_core.py")
    state = await shop.prepared("namespace", files, arguments=arguments, fail_to_pass=wanted)
    fix = [
        FileChange("ns/core.py", b"from ns.compat import one\n"),
        FileChange("ns/compat.py", b"def one():\n    return 1\n"),
    ]
    verdict = await judge(shop, state, *fix, required_tests=wanted)
    assert (verdict.outcome, verdict.reverted) == (Outcome.PASSED, ()), verdict.summary
    package = FileChange("ns/__init__.py", b"__path__ = ['/work/repo/fake']\n")
    fake = FileChange("fake/core.py", b"def one(): return 1\n")
    refused(await judge(shop, state, package, fake, required_tests=wanted), package.path, "test")


async def test_helpers_in_a_folder_that_settings_name_are_the_states(shop: Workshop) -> None:
    files = {
        "setup.cfg": "[tool:pytest]\ntestpaths = checks\npython_files = check_*.py\n",
        "checks/helper.py": "def agreed(value):\n    return value == 'Hello, Ada!'\n",
        "checks/check_h.py": (
            "from helper import agreed\n\n\ndef test_h():\n"
            "    from greet import greeting\n\n    assert agreed(greeting('Ada'))\n"
        ),
    }
    wanted = ("checks/check_h.py::test_h",)
    state = await shop.prepared("helpers", files, arguments=(), fail_to_pass=wanted)
    change = FileChange("checks/helper.py", _SPACE.encode())
    refused(await judge(shop, state, NOT, change), change.path, "test")
    assert (await judge(shop, state, FIX)).outcome is Outcome.PASSED


async def test_a_folder_of_the_repository_does_not_become_an_installed_package(
    shop: Workshop,
) -> None:
    state = await shop.prepared("bare", {"wordlib/data.json": "{}"}, fail_to_pass=FAIL_TO_PASS)
    change = FileChange("wordlib/__init__.py", b"def hello(): return 'Hello'\n")
    refused(await judge(shop, state, change, held_pins={"wordlib": "2.0"}), change.path, "shadows")
    verdict = await judge(shop, state, FIX, FileChange("wordlib/more.json", b"{}"))
    assert (verdict.outcome, verdict.reverted) == (Outcome.PASSED, ()), verdict.summary


async def test_settings_that_the_environment_names_are_the_states(shop: Workshop) -> None:
    settings = "[pytest]\naddopts = -q\n"
    added = {"PYTEST_ADDOPTS": "-c ci/t.ini --rootdir=/work/repo"}
    state = await shop.prepared(
        "added", {"ci/t.ini": settings}, fail_to_pass=FAIL_TO_PASS, environment=added
    )
    change = FileChange("ci/t.ini", b"[pytest]\npythonpath = /work/repo/evil\n")
    evil = FileChange("evil/wordlib.py", b"def hello(): return 'Hello'\n")
    verdict = await judge(shop, state, change, evil, held_pins={"wordlib": "2.0"})
    refused(verdict, change.path, "test")
    assert (await judge(shop, state, FIX)).outcome is Outcome.PASSED
