"""Hostile bytes: no parser raises, runs long, or reports what is not there."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge_cases import case
from judge_honest import HONEST
from judge_tampering import TAMPERING

from judge_svc.diffstat import delta_of, diff_lines, parse_unified_diff, unified_diff
from judge_svc.evidence import Change, ChangeKind, Evidence, TestRun
from judge_svc.pyfile import parse
from judge_svc.rubric import Malformed, read_answer
from judge_svc.rules import run_rules

PATHS = [
    "tests/test_a.py", "src/a.py", "conftest.py", "setup.cfg", "pyproject.toml", "tox.ini",
    "Makefile", ".github/workflows/ci.yml", "requirements.lock", "x.pth", "README.md",
]  # fmt: skip
lines = st.lists(st.text(max_size=6), max_size=12)
SEEDS = [c for e in (*TAMPERING, *HONEST) for c in (*e.evidence.changes, *e.evidence.originals)]


@given(lines, lines)
def test_line_diff_rebuilds_the_new_side(old, new):
    removed, added = diff_lines(old, new)
    kept_old = [line for i, line in enumerate(old) if i not in set(removed)]
    kept_new = [line for i, line in enumerate(new) if i not in set(added)]
    assert sorted(kept_old) == sorted(kept_new)
    assert diff_lines(old, old) == ([], [])


def test_line_diff_is_small_on_an_edit():
    old = [f"line {i}" for i in range(1000)] + ["", "}"] * 500
    new = [*old[:500], "new", *old[501:1500], "x", *old[1500:]]
    removed, added = diff_lines(old, new)
    assert (removed, added) == ([500], [500, 1500])


@given(st.text(max_size=400))
def test_any_text_is_read_as_a_diff(text):
    for delta in parse_unified_diff(text):
        assert delta.path


DIFF_LINES = (
    *("--- a/x", "+++ b/x", "+++ /dev/null", "@@ -1,2 +1,9 @@", "@@ -1 +1 @@"),
    *("+a", "-b", " c", "\\ No newline", ""),
)


@given(st.lists(st.sampled_from(DIFF_LINES), max_size=30))
def test_any_order_of_diff_lines_is_read(parts):
    parse_unified_diff("\n".join(parts))


def test_reads_a_git_diff():
    text = (
        "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1,3 +1,3 @@\n"
        " a\n---- b\n++++ c\n d\n"
        "--- a/gone.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
    )
    one, two = parse_unified_diff(text)
    assert [line.text for line in one.removed] == ["--- b"]
    assert [(line.number, line.text) for line in one.added] == [(2, "+++ c")]
    assert (two.path, two.kind) == ("gone.py", ChangeKind.DELETE)


def test_a_diff_alone_is_enough_for_text_rules():
    text = (
        "--- a/tests/test_a.py\n+++ b/tests/test_a.py\n@@ -1,2 +1,3 @@\n"
        "+@pytest.mark.skip\n def test_a():\n-    assert f()\n+    pass\n"
    )
    found = run_rules(Evidence(unified_diff=text))
    assert {f.cls for f in found} == {"TEST_SKIPPED", "TEST_WEAKENED"}


def cut(index: int, place: int, put: bytes) -> bytes:
    """A file of a case with something put in."""
    content = SEEDS[index].content
    return content[:place] + put + content[place:]


contents = st.one_of(
    st.binary(max_size=200),
    st.integers(0, len(SEEDS) - 1).map(lambda i: SEEDS[i].content),
    st.builds(cut, st.integers(0, len(SEEDS) - 1), st.integers(0, 400), st.binary(max_size=5)),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(PATHS), st.sampled_from(ChangeKind), contents, contents),
        max_size=4,
        unique_by=lambda t: t[0],
    ),
    st.text(max_size=50),
    st.dictionaries(st.text(max_size=8), st.sampled_from(["PASSED", "MISSING", "ERROR", "?"])),
)
def test_rules_survive_anything_and_quote_what_is_there(files, log, tests):
    evidence = Evidence(
        changes=tuple(
            Change(path, kind, b"" if kind is ChangeKind.DELETE else new)
            for path, kind, _, new in files
        ),
        originals=tuple(Change(path, ChangeKind.MODIFY, old) for path, _, old, _ in files),
        error_log=log,
        before=TestRun("FAILED", tests),
        after=TestRun("PASSED", tests),
    )
    text = evidence.text()
    for finding in run_rules(evidence):
        assert finding.quote in text


@pytest.mark.parametrize(
    "hostile",
    [
        "(" * 10_000,
        "-" * 50_000 + "1",
        "x" + ".a" * 50_000,
        "x = " + "1+" * 20_000 + "1",
        "if 1:\n" + "".join(" " * i + "if 1:\n" for i in range(1, 90)) + " " * 91 + "x",
        "x = " + "9" * 50_000,
        "\x00" * 100,
        "def f():\n" + "    pass\n" * 20_000,
        "'\\d'\n" * 1000,
        "@" * 1000,
        "class C(str):\n    def __eq__(self, other):\n        return self.m0(other)\n"
        + "".join(
            f"    def m{i}(self, other):\n        return "
            + " or ".join(f"self.m{j}(other)" for j in range(40) if j != i)
            + "\n"
            for i in range(40)
        ),
    ],
    ids=range(11),
)
def test_hostile_sources_end_quickly(hostile):
    started = time.monotonic()
    parse(hostile)
    files = {
        "src/a.py": ("def f():\n    x = 1\n    return x + f()\n", hostile),
        "tests/test_a.py": (hostile, "x = 1\n"),
    }
    run_rules(case("hostile", "", files).evidence)
    assert time.monotonic() - started < 5


def test_big_shuffled_files_end_quickly():
    old = "\n".join(str(i % 977) for i in range(40_000))
    new = "\n".join(str(i * 7 % 983) for i in range(40_000))
    started = time.monotonic()
    delta = delta_of("a.txt", ChangeKind.MODIFY, old, new)
    assert time.monotonic() - started < 5
    assert len(unified_diff((delta,), 1000)) < 1200


KEYS = st.sampled_from(["scores", "findings", "class", "quote", "member", "x"])
answers = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.text(max_size=100) | answers.map(str) | answers.map(json.dumps))
def test_any_answer_is_well_formed_or_malformed(text):
    try:
        read_answer(text, [Evidence()])
    except Malformed:
        pass
