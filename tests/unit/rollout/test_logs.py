"""Log analysis: one primary error, a stable signature, no trouble with hostile bytes."""

import json
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regreen.rollout.logs import analyse, category_of, signature_of, suspects

COLLECTION = """\
============================= test session starts ==============================
collected 0 items / 2 errors

==================================== ERRORS ====================================
_____________________ ERROR collecting tests/test_basic.py _____________________
ImportError while importing test module '/work/repo/tests/test_basic.py'.
Hint: make sure your test modules/packages have valid Python names.
Traceback:
/usr/lib/python3.9/importlib/__init__.py:127: in import_module
    return _bootstrap._gcd_import(name[level:], package, level)
tests/test_basic.py:3: in <module>
    from flask import Flask
/work/env/lib/python3.9/site-packages/flask/__init__.py:14: in <module>
    from jinja2 import escape
E   ImportError: cannot import name 'escape' from 'jinja2' (/work/env/lib/jinja2/__init__.py)
=========================== short test summary info ============================
ERROR tests/test_basic.py
2 errors in 0.53s
"""

TESTS = """\
=================================== FAILURES ===================================
_________________________________ test_first ___________________________________
tests/test_a.py:4: in test_first
    assert total() == 2
E   assert 1 == 2
E    +  where 1 = total()
_________________________________ test_second __________________________________
tests/test_a.py:9: in test_second
    load()
mod/io.py:31: in load
    return text.decode()
E   AttributeError: 'str' object has no attribute 'decode'
_________________________________ test_third ___________________________________
mod/io.py:31: in load
    return text.decode()
E   AttributeError: 'str' object has no attribute 'decode'
=========================== short test summary info ============================
FAILED tests/test_a.py::test_first - assert 1 == 2
3 failed, 12 passed in 0.10s
"""


def test_finds_the_import_error_of_a_collection():
    error = analyse(COLLECTION)
    assert error is not None
    assert (error.type, error.stage) == ("ImportError", "collection")
    assert error.imported == ("jinja2", "escape")
    assert error.frame is not None
    assert error.frame.short == "flask/__init__.py:14"
    assert error.place == "third-party"
    assert error.category == "dependency"
    assert suspects(error, {"flask": "1.1.2", "jinja2": "3.1.6"}) == ("jinja2", "flask")


def test_prefers_a_real_exception_to_an_earlier_assertion():
    error = analyse(TESTS)
    assert error is not None
    assert error.text == "AttributeError: 'str' object has no attribute 'decode'"
    assert (error.count, error.stage, error.place) == (2, "test", "source")
    assert error.frame is not None
    assert error.frame.short == "mod/io.py:31"


def test_conftest_failure_comes_before_everything():
    log = (
        "ImportError while loading conftest '/work/repo/tests/conftest.py'.\n"
        "tests/conftest.py:1: in <module>\n    import app\n"
        "E   ModuleNotFoundError: No module named 'pkg_resources'\n" + TESTS
    )
    error = analyse(log)
    assert error is not None
    assert (error.type, error.stage) == ("ModuleNotFoundError", "session-start")
    assert suspects(error, {"setuptools": "82.0.1"}) == ("setuptools",)


def test_a_chain_counts_as_one_error():
    handled = (
        "Traceback (most recent call last):\n"
        '  File "/work/env/lib/python3.13/site-packages/_pytest/rewrite.py", line 7, in find\n'
        "KeyError: '__spec__'\n\nDuring handling of the above exception, another exception "
        "occurred:\n\nTraceback (most recent call last):\n"
        '  File "/work/env/lib/python3.13/site-packages/_pytest/config.py", line 9, in main\n'
        "AttributeError: __spec__\n"
    )
    error = analyse(handled)
    assert error is not None
    assert (error.text, error.count) == ("AttributeError: __spec__", 1)
    caused = handled.replace(
        "During handling of the above exception, another exception occurred",
        "The above exception was the direct cause of the following exception",
    )
    error = analyse(caused)
    assert error is not None
    assert error.type == "KeyError"


def test_build_trouble_comes_first():
    error = analyse("  × No solution found when resolving dependencies:\n" + TESTS)
    assert error is not None
    assert (error.stage, error.category) == ("build", "dependency")


def test_the_short_summary_serves_when_nothing_else_is_there():
    error = analyse("FAILED tests/test_a.py::test_x - ValueError: bad shape\n1 failed in 0.1s\n")
    assert error is not None
    assert error.text == "ValueError: bad shape"


@pytest.mark.parametrize("log", ["", "all fine\n3 passed in 0.1s", "\x00\xff", b"\xff\xfe\x00"])
def test_no_error_is_none(log):
    assert analyse(log) is None


def test_signature_ignores_what_varies_and_keeps_what_matters():
    left = signature_of("ImportError", "cannot import name 'x' from 'y' (/a/b/y.py) at 0x7f12")
    right = signature_of("ImportError", "cannot import name 'x' from 'y' (/c/y.py) at 0x99")
    assert left == right
    assert left != signature_of("ImportError", "cannot import name 'z' from 'y' (/c/y.py) at 0x99")
    assert signature_of("a.b.OddError", "took 3 s") == signature_of("c.OddError", "took 12.5 s")


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("ModuleNotFoundError: No module named 'six'", "dependency"),
        ("error: the Gradle daemon died", "build tool"),
        ("AssertionError: assert 1 == 2", "test"),
        ("KeyError in setup.cfg section", "config"),
        ("AttributeError: module 'x' has no attribute 'y'", "version"),
        ("UnicodeDecodeError: codec can't decode", "env"),
        ("OSError: access denied", "permission"),
        ("KeyError: 'a'", "other"),
    ],
)
def test_categories_follow_the_first_rule_that_matches(text, category):
    assert category_of(text) == category


def _records():
    text = (resources.files("regreen.tasks") / "data" / "tasks.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("record", _records(), ids=lambda record: record["id"])
def test_names_the_error_of_every_shipped_task(record):
    lines = record["error_lines"]
    error = analyse("\n".join(f"E   {line}" for line in lines))
    assert error is not None
    assert any(error.message[:30] in " ".join(line.split()) for line in lines)


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (
            "werkzeug.exceptions.UnsupportedMediaType: 415 Unsupported: no",
            "UnsupportedMediaType",
            "415",
        ),
        ("twisted.trial.unittest.FailTest: b'' != b'x'", "FailTest", "b''"),
        ("some_pkg.Stop", "Stop", ""),
    ],
)
def test_what_pytest_says_was_raised_may_have_any_name(line: str, kind: str, message: str) -> None:
    error = analyse(f"E   {line}")
    assert error is not None
    assert error.type.endswith(kind)
    assert error.message.startswith(message)


def test_a_fixture_that_is_not_there_is_an_error() -> None:
    log = (
        "file /work/repo/tests/test_a.py, line 14\nE       fixture 'shop' not found\n>   available"
    )
    error = analyse(f"____ ERROR at setup of test_a ____\n{log} fixtures: cache, capfd")
    assert error is not None
    assert (error.text, error.stage) == ("FixtureLookupError: fixture 'shop' not found", "test")


@pytest.mark.parametrize(
    "line", ["- a.B: c", "see docs.Example for more", "http.Server is up", "B: c"]
)
def test_what_looks_a_little_like_it_is_no_error(line: str) -> None:
    assert analyse(f"E   {line}") is None


_PYTHONS_OWN = [
    "zlib.error: Error -3 while decompressing data: incorrect header check",
    "binascii.Error: Incorrect padding",
    "struct.error: unpack requires a buffer of 4 bytes",
    "re.error: missing ), unterminated subpattern at position 0",
    "socket.timeout: timed out",
    "socket.gaierror: [Errno -2] Name or service not known",
    "ftplib.error_perm: 550 No such file",
    "imaplib.IMAP4.error: command SEARCH illegal in state AUTH",
    "xml.parsers.expat.ExpatError: syntax error: line 1, column 0",
    "xml.dom.HierarchyRequestErr: two document elements disallowed",
    "subprocess.TimeoutExpired: Command '['x']' timed out after 1 seconds",
    "http.client.RemoteDisconnected: Remote end closed connection without response",
    "io.UnsupportedOperation: fileno",
    "zipfile.BadZipFile: File is not a zip file",
    "queue.Empty",
    "asyncio.exceptions.CancelledError",
    "StopIteration",
    "StopAsyncIteration",
    "ExceptionGroup: two (2 sub-exceptions)",
    "KeyboardInterrupt",
    "SystemExit: 2",
    "pytest.PytestUnraisableExceptionWarning: Exception ignored in: <x>",
]
_TRACEBACK = """\
Traceback (most recent call last):
  File "/work/repo/mod.py", line 3, in load
    call()
    ~~~~^^

"""


@pytest.mark.parametrize("line", _PYTHONS_OWN)
@pytest.mark.parametrize("before", ["E   ", "", _TRACEBACK, "FAILED tests/test_a.py::test - "])
def test_what_python_itself_raises_is_named_wherever_it_stands(before: str, line: str) -> None:
    error = analyse(before + line)
    assert error is not None
    assert error.text == line


@pytest.mark.parametrize("line", ["cv2.error: bad size", "pkg.flow.Stop: at once", "pkg.Stop"])
@pytest.mark.parametrize("before", ["E   ", _TRACEBACK, "FAILED tests/test_a.py::test - "])
def test_any_class_counts_where_only_what_was_raised_stands(before: str, line: str) -> None:
    error = analyse(before + line)
    assert error is not None
    assert error.text == line
    assert analyse(line) is None


def test_a_message_may_begin_on_a_line_of_its_own() -> None:
    error = analyse("E   shop.CartError: \nE   \nE   the cart is empty\n")
    assert error is not None
    assert (error.text, error.count) == ("shop.CartError", 1)
    assert analyse("shop.CartError:\n") is None


@pytest.mark.parametrize(
    "line",
    [
        "app.error: could not connect",
        "django.request.Handler: GET /",
        "socket.timeout = 30",
        "re.error is an alias",
        "queue.Fuller: x",
        "config.socket.timeout: 30",
        "StopIterations: 3",
        "error: no",
        "timeout: 30",
        "struct.errors: 3",
    ],
)
def test_ordinary_lines_are_no_errors_also_some_lines_below_a_traceback(line: str) -> None:
    assert analyse(line) is None
    error = analyse(f"{_TRACEBACK}Odd: it\n{line}")
    assert error is None
    error = analyse(f"{_TRACEBACK}KeyError: 'a'\n{line}")
    assert error is not None
    assert (error.text, error.count) == ("KeyError: 'a'", 1)


def test_import_errors_of_shipped_tasks_point_at_a_package_that_moved():
    checked = 0
    for record in _records():
        first = next((x for x in record["error_lines"] if "cannot import name" in x), None)
        if record["kind"] != "dependency-upgrade" or first is None:
            continue
        error = analyse(f"E   {first}")
        pins = dict(pin.split("==") for pin in record["pins_fail"])
        assert error is not None
        found = suspects(error, pins)
        if record["stage"] != "test-run":
            assert found[0] in record["changed"], record["id"]
            checked += 1
    assert checked >= 15


@given(st.binary(max_size=4000))
@settings(max_examples=150, deadline=None)
def test_hostile_bytes_are_harmless(data):
    error = analyse(data)
    if error is not None:
        assert error.signature
        error.text.encode()


_LINES = st.sampled_from([*COLLECTION.splitlines(), *TESTS.splitlines(), "INTERNALERROR> x", "E"])


@given(st.lists(_LINES | st.text(max_size=80), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_mix_of_log_lines_is_harmless(lines):
    analyse("\n".join(lines))


def test_long_logs_take_linear_time():
    error = analyse("E   " + "a" * 3_000_000 + "\n" + TESTS * 300)
    assert error is not None
    assert error.type == "AttributeError"
