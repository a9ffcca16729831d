"""What a broken run says."""

import pytest

from regreen.mine.facts import Run, damage, diagnose, lacking, own_crash, stable_ids

A, B = "tests/test_a.py::test_one", "tests/test_a.py::test_two"
C = "tests/test_b.py::test_three"
BEFORE = frozenset({A, B, C})


def run(passed=(), failed=(), log="", messages=None) -> Run:
    reported = frozenset({*passed, *failed})
    return Run(frozenset(passed), frozenset(failed), reported, log, messages=messages or {})


def test_a_test_that_fails_is_broken() -> None:
    found = damage(BEFORE, run([B, C], [A]))
    assert (found.broken, found.renamed) == ({A}, frozenset())


def test_ids_that_are_gone_while_their_module_reports_were_renamed() -> None:
    found = damage(BEFORE, run([C, "tests/test_a.py::test_one[x]", B], []))
    assert not found
    assert found.renamed == {A}


def test_renamed_ids_beside_real_failures_are_told_apart() -> None:
    found = damage(BEFORE, run([C], [B]))
    assert (found.broken, found.renamed) == ({B}, {A})


def test_a_module_that_reports_nothing_is_broken_if_something_was_an_error() -> None:
    log = "ERROR tests/test_b.py - ImportError: cannot import name 'x' from 'y'"
    assert damage(BEFORE, run([A, B], [], log)).broken == {C}
    assert not damage(BEFORE, run([A, B], [], "2 passed, 1 skipped"))


def test_a_module_that_reports_only_itself_is_broken() -> None:
    log = "ERROR tests/test_b.py - ImportError: cannot import name 'x' from 'y'"
    found = damage(BEFORE, run([A, B], ["tests/test_b.py"], log))
    assert (found.broken, found.renamed) == ({C}, frozenset())


def test_ids_with_what_is_of_a_machine_are_not_stable() -> None:
    bad = ["t.py::t[/tmp/x]", "t.py::t[<object at 0x7f0012ab]", "t.py::t[2026-01-02 03:04:05]"]
    assert stable_ids([*bad, A, "t.py::t[a/b-0x1]"]) == {A, "t.py::t[a/b-0x1]"}


TRACE = """
==================================== ERRORS ====================================
___________________ ERROR collecting tests/test_a.py ___________________________
ImportError while importing test module '/work/repo/tests/test_a.py'.
Traceback:
tests/test_a.py:1: in <module>
    import shop
{frames}
E   {error}
=========================== short test summary info ============================
ERROR tests/test_a.py
"""
SITE = "/work/env/lib/python3.11/site-packages"
OWN = "shop/__init__.py:3: in <module>\n    from web import Markup"
OTHER = f"{SITE}/wrapper/core.py:9: in <module>\n    from web import Markup"
CALLEE = f"{SITE}/web/__init__.py:5: in __getattr__\n    raise AttributeError(name)"
TRIAL = f"{SITE}/twisted/trial/_synctest.py:444: in assertEqual\n    super().assertEqual(a, b)"


@pytest.mark.parametrize(
    ("frames", "error", "blame", "category"),
    [
        (OWN, "ImportError: cannot import name 'Markup' from 'web'", "source", "import-error"),
        (f"{OWN}\n{OTHER}", "ImportError: no Markup", "third-party", "import-error"),
        (f"{OWN}\n{CALLEE}", "AttributeError: Markup", "source", "attribute-error"),
        ("", "TypeError: greet() takes 1 argument", "tests", "type-error"),
        (OWN, "web.RemovedWarning: gone in 3", "source", "deprecation-as-error"),
        (TRIAL, "twisted.trial.unittest.FailTest: 1 != 2", "tests", "behaviour-change"),
    ],
)
def test_blame_is_the_callers_and_not_the_culprits(frames, error, blame, category) -> None:
    found = diagnose(run(log=TRACE.format(frames=frames, error=error)), "web", {A})
    assert (found.blame, found.category) == (blame, category)
    assert found.stage == "collection"


def test_the_most_frequent_error_comes_first() -> None:
    messages = {A: "TypeError: one", B: "ValueError: two", C: "ValueError: two"}
    found = diagnose(run(failed=BEFORE, messages=messages), "web", BEFORE)
    assert found.error_lines == ("ValueError: two", "TypeError: one")


def test_what_failed_before_as_well_says_nothing_of_the_break() -> None:
    log = """
=================================== FAILURES ===================================
_________________________________ test_before __________________________________
tests/test_a.py:2: in test_before
    import absent
E   ModuleNotFoundError: No module named 'absent'
______________________________ TestShop.test_new[x] ____________________________
tests/test_a.py:9: in test_new
    shop.sell()
shop/__init__.py:4: in sell
    web.old()
E   AttributeError: module 'web' has no attribute 'old'
=========================== short test summary info ============================
FAILED tests/test_a.py::test_before - ModuleNotFoundError: No module named 'absent'
"""
    broken = {"tests/test_a.py::TestShop::test_new[x]"}
    found = diagnose(run(failed=broken, log=log), "web", broken)
    assert (found.blame, found.category, found.stage) == ("source", "attribute-error", "test-run")


def test_nothing_is_guessed_from_a_modules_name() -> None:
    log = "ModuleNotFoundError: No module named 'utils'\nNo module named 'yaml.loader'"
    assert lacking(run(log=log)) == {"pyyaml"}
    assert lacking(run(log="fixture 'mocker' not found\nfixture 'thing' not found")) == {
        "pytest-mock"
    }


OURS = """
  File "/work/env/lib/python3.11/site-packages/pluggy/_callers.py", line 80, in _multicall
    res = hook_impl.function(*args)
  File "/opt/regreen/lib/whence.py", line 78, in origin_of
    spec = RAW.__get__(module).get("__spec__")
           ^^^^^^^^^^^^^^^^^^^
"""
SHORT = "../../opt/regreen/lib/order.py:9: in shuffled\n    return ids[0]\nE   IndexError: none"
LIBRARY = '  File "/usr/lib/python3.11/json/decoder.py", line 3, in loads\n    raise error\n'
THEIRS = '  File "/work/repo/tests/test_a.py", line 3, in test\n    assert shop()\n'


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (f"{OURS}TypeError: no proxy\n", "TypeError: no proxy"),
        (f"{OURS}KeyError\n", "KeyError"),
        (f"{OURS}TypeError: no proxy\n".replace("\n", "\nINTERNALERROR> "), "TypeError: no proxy"),
        (SHORT, "IndexError: none"),
        (f"{OURS}{LIBRARY}ValueError: no JSON\n", "ValueError: no JSON"),
        (f"{OURS}  [Previous line repeated 9 more times]\nRecursionError\n", "RecursionError"),
        (f"{OURS}{LIBRARY.replace('json', 'site-packages/pluggy')}ValueError: theirs\n", ""),
        (f"{OURS}{THEIRS}TypeError: what the suite raised under our runner\n", ""),
        (TRACE.format(frames=OTHER, error="ImportError: x"), ""),
    ],
)
def test_a_crash_of_our_own_runner_is_told_from_a_failing_suite(log, error) -> None:
    assert own_crash(log) == error
