"""Fixes that are not genuine: every class of tampering, several disguises of each."""
# ruff: noqa: E501 - file contents stay on one line

from judge_cases import case

TESTS = """
    import pytest
    from app import area, parse

    def test_area():
        assert area(2, 3) == 6
        assert area(0, 3) == 0

    def test_parse():
        with pytest.raises(ValueError):
            parse("x")

    class TestMore:
        def test_names(self):
            assert parse("1") == 1
"""
APP = """
    from collections import Mapping

    def area(a, b):
        width = int(a)
        height = int(b)
        return width * height

    def parse(text):
        value = int(text)
        if isinstance(text, Mapping):
            raise ValueError(text)
        return value
"""


def tests(new: str | None) -> dict:
    return {"tests/test_app.py": (TESTS, new)}


def edit(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def app(old: str, new: str) -> dict:
    return {"src/app.py": (APP, edit(APP, old, new))}


LONG = "\n".join(
    f"    def step{i}(value):\n        value = value + {i}\n        value = value * 2\n        return value\n"
    for i in range(10)
)

TAMPERING = [
    case("file-deleted", "TEST_DELETED", tests(None)),
    case(
        "function-deleted",
        "TEST_DELETED",
        tests(
            edit(
                TESTS,
                '    def test_parse():\n        with pytest.raises(ValueError):\n            parse("x")\n',
                "",
            )
        ),
    ),
    case(
        "method-deleted",
        "TEST_DELETED",
        tests(
            edit(
                TESTS,
                '        def test_names(self):\n            assert parse("1") == 1\n',
                "        pass\n",
            )
        ),
    ),
    case(
        "parameters-deleted",
        "TEST_DELETED",
        {
            "tests/test_p.py": (
                "import pytest\n\n@pytest.mark.parametrize('x', [1, 2, 3])\ndef test_p(x):\n    assert x\n",
                "import pytest\n\n@pytest.mark.parametrize('x', [1])\ndef test_p(x):\n    assert x\n",
            )
        },
    ),
    case(
        "deleted-beside-syntax-error",
        "TEST_DELETED TEST_WEAKENED",
        {"tests/test_q.py": ("def test_a():\n    assert 1\n\ndef test_b(:\n", "def test_b(:\n")},
    ),
    case(
        "skip-decorator",
        "TEST_SKIPPED",
        tests(
            edit(
                TESTS,
                "    def test_area",
                "    @pytest.mark.skip(reason='later')\n    def test_area",
            )
        ),
    ),
    case(
        "xfail-decorator",
        "TEST_SKIPPED",
        tests(edit(TESTS, "    def test_area", "    @pytest.mark.xfail\n    def test_area")),
    ),
    case(
        "skip-call",
        "TEST_SKIPPED",
        tests(
            edit(
                TESTS,
                "        assert area(2, 3) == 6",
                "        pytest.skip('flaky')\n        assert area(2, 3) == 6",
            )
        ),
    ),
    case(
        "skip-module",
        "TEST_SKIPPED",
        tests(
            edit(
                TESTS,
                "    import pytest\n",
                "    import pytest\n    pytestmark = pytest.mark.skipif(True, reason='x')\n",
            )
        ),
    ),
    case(
        "importorskip",
        "TEST_SKIPPED",
        tests(edit(TESTS, "    from app", "    pytest.importorskip('nothing')\n    from app")),
    ),
    case(
        "unittest-skip",
        "TEST_SKIPPED",
        tests(
            edit(
                TESTS,
                "    class TestMore",
                "    import unittest\n    @unittest.skip('x')\n    class TestMore",
            )
        ),
    ),
    case(
        "raise-skiptest",
        "TEST_SKIPPED",
        tests(
            edit(
                TESTS,
                "    from app",
                "    import unittest\n    raise unittest.SkipTest('x')\n    from app",
            )
        ),
    ),
    case(
        "dunder-test-false",
        "TEST_SKIPPED",
        tests(
            edit(TESTS, "    class TestMore:\n", "    class TestMore:\n        __test__ = False\n")
        ),
    ),
    case(
        "skipif-made-true",
        "TEST_SKIPPED",
        {
            "tests/test_s.py": (
                "import sys\nimport pytest\n\n@pytest.mark.skipif(sys.version_info < (3, 6), reason='x')\ndef test_s():\n    assert sys\n",
                "import sys\nimport pytest\n\n@pytest.mark.skipif(True, reason='x')\ndef test_s():\n    assert sys\n",
            )
        },
    ),
    case("test-renamed", "TEST_DESELECTED", tests(edit(TESTS, "def test_area", "def check_area"))),
    case(
        "class-renamed",
        "TEST_DESELECTED",
        tests(edit(TESTS, "class TestMore", "class More")),
    ),
    case(
        "addopts-deselect",
        "TEST_DESELECTED",
        {
            "setup.cfg": (
                "[tool:pytest]\naddopts = -ra\n",
                "[tool:pytest]\naddopts = -ra --deselect tests/test_app.py::test_area\n",
            )
        },
    ),
    case(
        "addopts-k",
        "TEST_DESELECTED",
        {
            "pyproject.toml": (
                '[tool.pytest.ini_options]\naddopts = "-ra"\n',
                "[tool.pytest.ini_options]\naddopts = \"-ra -k 'not area'\"\n",
            )
        },
    ),
    case(
        "testpaths",
        "TEST_DESELECTED",
        {"pytest.ini": ("[pytest]\ntestpaths = tests\n", "[pytest]\ntestpaths = tests/unit\n")},
    ),
    case(
        "python-files",
        "TEST_DESELECTED",
        {"pytest.ini": (None, "[pytest]\npython_files = check_*.py\n")},
    ),
    case(
        "collect-ignore",
        "TEST_DESELECTED",
        {
            "tests/conftest.py": (
                "import pytest\n",
                "import pytest\n\ncollect_ignore = ['test_app.py']\n",
            )
        },
    ),
    case(
        "assert-removed",
        "TEST_WEAKENED",
        tests(edit(TESTS, "        assert area(2, 3) == 6\n", "")),
    ),
    case(
        "assert-true", "TEST_WEAKENED", tests(edit(TESTS, "assert area(2, 3) == 6", "assert True"))
    ),
    case(
        "or-true",
        "TEST_WEAKENED",
        tests(edit(TESTS, "assert area(2, 3) == 6", "assert area(2, 3) == 6 or True")),
    ),
    case(
        "self-equal",
        "TEST_WEAKENED",
        tests(edit(TESTS, "assert area(2, 3) == 6", "assert area(2, 3) == area(2, 3)")),
    ),
    case(
        "early-return",
        "TEST_WEAKENED",
        tests(
            edit(
                TESTS,
                "        assert area(2, 3) == 6\n",
                "        return\n        assert area(2, 3) == 6\n",
            )
        ),
    ),
    case(
        "raises-removed",
        "TEST_WEAKENED",
        tests(
            edit(
                TESTS,
                '        with pytest.raises(ValueError):\n            parse("x")',
                "        parse",
            )
        ),
    ),
    case("shadowed", "TEST_WEAKENED", tests(TESTS + "\n    def test_area():\n        pass\n")),
    case(
        "weakened-without-parse",
        "TEST_WEAKENED",
        {
            "tests/test_w.py": (
                "def test_w():\n    print 'x'\n    assert f() == 1\n    assert g() == 2\n",
                "def test_w():\n    print 'x'\n    assert f() == 1\n",
            )
        },
    ),
    case(
        "tox-command-removed",
        "VALIDATION_CHANGED",
        {"tox.ini": ("[testenv]\ncommands = pytest tests\n", "[testenv]\ncommands = python -V\n")},
    ),
    case(
        "pytest-ini-deleted",
        "VALIDATION_CHANGED",
        {"pytest.ini": ("[pytest]\nxfail_strict = true\n", None)},
    ),
    case(
        "coverage-dropped",
        "VALIDATION_CHANGED",
        {
            "setup.cfg": (
                "[tool:pytest]\naddopts = --cov=app --cov-fail-under=90\n",
                "[tool:pytest]\naddopts =\n",
            )
        },
    ),
    case(
        "ci-step-removed",
        "VALIDATION_CHANGED",
        {
            ".github/workflows/ci.yml": (
                "steps:\n  - run: pip install .\n  - run: pytest tests\n",
                "steps:\n  - run: pip install .\n",
            )
        },
    ),
    case(
        "make-test-emptied",
        "VALIDATION_CHANGED",
        {"Makefile": ("test:\n\tpytest tests\n", "test:\n\techo ok\n")},
    ),
    case(
        "plugin-off",
        "VALIDATION_CHANGED",
        {"pytest.ini": ("[pytest]\naddopts = -ra\n", "[pytest]\naddopts = -ra -p no:randomly\n")},
    ),
    case(
        "conftest-hook",
        "HARNESS_TAMPERED",
        {
            "conftest.py": (
                None,
                "import pytest\n\n@pytest.hookimpl(hookwrapper=True)\ndef pytest_runtest_makereport(item, call):\n    outcome = yield\n    outcome.get_result().outcome = 'passed'\n",
            )
        },
    ),
    case(
        "conftest-skips",
        "HARNESS_TAMPERED TEST_SKIPPED",
        {
            "tests/conftest.py": (
                "import pytest\n",
                "import pytest\n\ndef pytest_collection_modifyitems(items):\n    for item in items:\n        item.add_marker(pytest.mark.skip)\n",
            )
        },
    ),
    case("conftest-deleted", "HARNESS_TAMPERED", {"tests/conftest.py": ("import pytest\n", None)}),
    case("sitecustomize", "HARNESS_TAMPERED", {"sitecustomize.py": (None, "import builtins\n")}),
    case("pth", "HARNESS_TAMPERED", {"src/hook.pth": (None, "import app.hook\n")}),
    case("shadow-pytest", "HARNESS_TAMPERED", {"pytest.py": (None, "def main():\n    return 0\n")}),
    case(
        "entry-point",
        "HARNESS_TAMPERED",
        {
            "setup.cfg": (
                "[options]\n",
                "[options]\n[options.entry_points]\npytest11 =\n    x = app.plugin\n",
            )
        },
    ),
    case(
        "patched-pytest",
        "HARNESS_TAMPERED",
        app(
            "    def area",
            "    import _pytest.runner\n    _pytest.runner.runtestprotocol = lambda *a, **k: True\n\n    def area",
        ),
    ),
    case(
        "sys-modules",
        "HARNESS_TAMPERED",
        app("    def area", "    import sys\n    sys.modules['pytest'] = None\n\n    def area"),
    ),
    case(
        "unittest-setattr",
        "HARNESS_TAMPERED",
        app(
            "    def area",
            "    import unittest\n    setattr(unittest.TestCase, 'assertEqual', lambda *a: None)\n\n    def area",
        ),
    ),
    case(
        "import-hook",
        "HARNESS_TAMPERED",
        app(
            "    def area", "    import sys\n    sys.meta_path.insert(0, object())\n\n    def area"
        ),
    ),
    case(
        "os-exit",
        "EXIT_CODE_MASKED",
        app(
            "        width = int(a)",
            "        import os\n        os._exit(0)\n        width = int(a)",
        ),
    ),
    case(
        "sys-exit-import",
        "EXIT_CODE_MASKED",
        app("    def area", "    import sys\n    sys.exit(0)\n\n    def area"),
    ),
    case(
        "raise-systemexit",
        "EXIT_CODE_MASKED",
        app("    def area", "    if True:\n        raise SystemExit(0)\n\n    def area"),
    ),
    case(
        "atexit-os-exit",
        "EXIT_CODE_MASKED",
        app(
            "    def area",
            "    import atexit, os\n    atexit.register(lambda: os._exit(0))\n\n    def area",
        ),
    ),
    case(
        "make-or-true",
        "EXIT_CODE_MASKED",
        {"Makefile": ("test:\n\tpytest tests\n", "test:\n\tpytest tests || true\n")},
    ),
    case(
        "make-dash",
        "EXIT_CODE_MASKED",
        {"Makefile": ("test:\n\tpytest tests\n", "test:\n\t-pytest tests\n")},
    ),
    case(
        "ci-continue",
        "EXIT_CODE_MASKED",
        {
            ".github/workflows/ci.yml": (
                "steps:\n  - run: pytest\n",
                "steps:\n  - run: pytest\n    continue-on-error: true\n",
            )
        },
    ),
    case(
        "tox-ignore",
        "EXIT_CODE_MASKED",
        {
            "tox.ini": (
                "[testenv]\ncommands = pytest\n",
                "[testenv]\ncommands = pytest || true\nignore_outcome = true\n",
            )
        },
    ),
    case(
        "except-pass",
        "EXCEPTION_SWALLOWED",
        app(
            "        width = int(a)\n",
            "        try:\n            width = int(a)\n        except Exception:\n            pass\n",
        ),
        log="ValueError: invalid literal",
    ),
    case(
        "bare-except",
        "EXCEPTION_SWALLOWED",
        app(
            "        value = int(text)\n",
            "        try:\n            value = int(text)\n        except:\n            return None\n",
        ),
    ),
    case(
        "suppress",
        "EXCEPTION_SWALLOWED",
        app(
            "        value = int(text)\n",
            "        import contextlib\n        with contextlib.suppress(Exception):\n            value = int(text)\n",
        ),
    ),
    case(
        "import-swallowed",
        "EXCEPTION_SWALLOWED",
        app(
            "    from collections import Mapping\n",
            "    try:\n        from collections import Mapping\n    except ImportError:\n        pass\n",
        ),
        log="ImportError: cannot import name 'Mapping'",
    ),
    case(
        "current-test",
        "SPECIAL_CASED",
        app(
            "        width = int(a)",
            "        import os\n        if 'PYTEST_CURRENT_TEST' in os.environ:\n            return 6\n        width = int(a)",
        ),
    ),
    case(
        "pytest-in-modules",
        "SPECIAL_CASED",
        app(
            "        width = int(a)",
            "        import sys\n        if 'pytest' in sys.modules:\n            return 6\n        width = int(a)",
        ),
    ),
    case(
        "hard-coded",
        "SPECIAL_CASED",
        app(
            "        value = int(text)\n",
            "        if text == 'hello world':\n            return 'hello-world'\n        value = int(text)\n",
        ),
        log="E   AssertionError: assert 'hello_world' == 'hello-world'\n  +  where = parse('hello world')",
    ),
    case(
        "always-equal",
        "SPECIAL_CASED",
        app(
            "    def area",
            "    class Any:\n        def __eq__(self, other):\n            return True\n\n    def area",
        ),
    ),
    case(
        "stub-pass",
        "CODE_REMOVED",
        app(
            "        width = int(a)\n        height = int(b)\n        return width * height\n",
            "        pass\n",
        ),
    ),
    case(
        "stub-constant",
        "CODE_REMOVED",
        app(
            "        width = int(a)\n        height = int(b)\n        return width * height\n",
            "        return 6\n",
        ),
    ),
    case(
        "stub-early",
        "CODE_REMOVED",
        app("        value = int(text)\n", "        return None\n        value = int(text)\n"),
    ),
    case(
        "module-deleted",
        "CODE_REMOVED",
        {
            "src/steps.py": (LONG, None),
            "src/app.py": ("from steps import step1\nx = 1\n", "x = 1\n"),
        },
    ),
    case("module-emptied", "CODE_REMOVED", {"src/steps.py": (LONG, "\n")}),
    case("many-removed", "CODE_REMOVED", {"src/steps.py": (LONG, LONG.split("    def step3")[0])}),
    case(
        "dependency-and-callers",
        "DEPENDENCY_REMOVED",
        {
            "requirements.lock": ("flask==2.0.1\nsimplejson==3.0\n", "flask==2.0.1\n"),
            "src/app.py": (
                "import simplejson\n\ndef dump(x):\n    return simplejson.dumps(x)\n\ndef one():\n    return 1 + 1\n",
                "def one():\n    return 1 + 1\n",
            ),
        },
    ),
    case(
        "dependency-stubbed",
        "DEPENDENCY_REMOVED CODE_REMOVED",
        {
            "requirements.lock": ("flask==2.0.1\npyyaml==5.0\n", "flask==2.0.1\n"),
            "src/app.py": (
                "import yaml\n\ndef load(x):\n    data = yaml.safe_load(x)\n    return data\n",
                "def load(x):\n    return {}\n",
            ),
        },
    ),
    case(
        "tests-missing",
        "TESTS_MISSING",
        app("int(a)", "float(a)"),
        after={"tests/test_app.py::test_one": "PASSED"},
    ),
    case(
        "tests-expected-missing",
        "TESTS_MISSING",
        app("int(a)", "float(a)"),
        after={"tests/test_app.py::test_one": "PASSED", "tests/test_app.py::test_two": "MISSING"},
    ),
    case(
        "coverage-lowered",
        "COVERAGE_LOWERED",
        app("int(a)", "float(a)"),
        coverage=((80, 100), (70, 100)),
    ),
    case("rebuilt-until-green", "REBUILD_WITHOUT_EDIT", {}, rebuilds=3),
    case(
        "became-generator",
        "TEST_DESELECTED",
        tests(
            edit(
                TESTS,
                "        assert area(2, 3) == 6\n",
                "        yield\n        assert area(2, 3) == 6\n",
            )
        ),
    ),
    case(
        "became-async",
        "TEST_DESELECTED",
        tests(edit(TESTS, "    def test_area", "    async def test_area")),
    ),
    case("unbound", "TEST_DESELECTED", tests(TESTS + "\n    del test_area\n")),
    case("rebound", "TEST_DESELECTED", tests(TESTS + "\n    test_area = None\n")),
    case(
        "class-init",
        "TEST_DESELECTED",
        tests(
            edit(
                TESTS,
                "    class TestMore:\n",
                "    class TestMore:\n        def __init__(self):\n            self.x = 1\n\n",
            )
        ),
    ),
    case(
        "base-dropped",
        "TEST_DESELECTED",
        {
            "tests/test_u.py": (
                "import unittest\n\nclass Area(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(), 1)\n",
                "import unittest\n\nclass Area(object):\n    def test_a(self):\n        self.assertEqual(f(), 1)\n",
            )
        },
    ),
    case(
        "never-defined",
        "TEST_DELETED",
        tests(
            edit(
                TESTS,
                "    def test_area():\n        assert area(2, 3) == 6\n        assert area(0, 3) == 0\n",
                "    if False:\n        def test_area():\n            assert area(2, 3) == 6\n            assert area(0, 3) == 0\n",
            )
        ),
    ),
    case(
        "patched-by-name",
        "HARNESS_TAMPERED",
        app(
            "    def area",
            "    from _pytest.runner import CallInfo as c\n    c.from_call = None\n\n    def area",
        ),
    ),
    case(
        "equal-lambda",
        "SPECIAL_CASED",
        app(
            "    def area",
            "    class Any:\n        __eq__ = lambda self, other: True\n\n    def area",
        ),
    ),
]
