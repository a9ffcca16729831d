"""SECURITY.md names tests that are there, and that run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEVER = {"skip", "xfail"}
"""What makes a test show nothing; `skipif` says of a machine that it cannot show it."""


def why_not(source: str, test: str) -> str:
    """Why a module's test shows nothing; without a name, all its tests. Empty: it does."""
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    tests = [n for n in tree.body if isinstance(n, kinds) and n.name.startswith("test_")]
    wanted = [node for node in tests if test in ("", node.name)]
    if not wanted:
        return "there is no such test"
    if len({node.name for node in wanted}) < len(wanted):
        return "a later function of that name takes its place"
    marks: list[ast.AST] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    for node in wanted:
        marks += node.decorator_list
        marks += [one for one in node.body if isinstance(one, ast.Expr)]
    names = {
        part.attr
        for mark in marks
        for part in ast.walk(mark)
        if isinstance(part, ast.Attribute) and ast.unparse(part.value) in ("pytest", "pytest.mark")
    }
    return ", ".join(sorted(NEVER & names))


def test_every_test_that_is_named_is_there_and_runs():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 20
    assert len(named) == text.count("`tests/"), "a test is named in a way that is not looked at"
    for path, test in named:
        assert Path(path).name.startswith("test_"), path
        assert (ROOT / path).is_file(), path
        assert not why_not((ROOT / path).read_text(), test), f"{path}::{test}"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def test_a(): assert f()", ""),
        ("@pytest.mark.skipif(not A, reason='')\nasync def test_a(): ...", ""),
        ("@pytest.mark.skip\ndef test_a(): ...", "skip"),
        ("@pytest.mark.xfail(reason='')\nasync def test_a(): ...", "xfail"),
        ("@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.skip)])\n"
         "def test_a(x): ...", "skip"),
        ("pytestmark = [pytest.mark.xfail]\ndef test_a(): ...", "xfail"),
        ("def test_a():\n    pytest.skip('later')\n    f()", "skip"),
        ("def helper():\n    def test_a(): ...", "there is no such test"),
        ("# def test_a(): ...", "there is no such test"),
        ("def test_a(): f()\ndef test_a(): ...", "a later function of that name takes its place"),
    ],
)  # fmt: skip
def test_one_that_shows_nothing_is_found(source: str, why: str):
    assert why_not(source, "test_a") == why
