"""Migration rules: each on source that it is for, and on source that it must leave alone."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from regreen.rules import apart
from regreen.rules.apart import Rewritten, Wanted, rewrite
from regreen.rules.library import BY_NAME, RULES
from regreen.rules.rule import fitting
from tests.fixtures.rules.cases import CASES


@pytest.mark.parametrize(
    ("name", "before", "after"), CASES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CASES)]
)
def test_a_rule_writes_what_its_release_asks_for(name: str, before: str, after: str) -> None:
    rule = BY_NAME[name]
    assert rule.apply(before) == after
    ast.parse(after)
    assert rule.apply(after) == after  # once is enough


def test_every_rule_is_shown_and_cites_its_release() -> None:
    changed = {name for name, before, after in CASES if before != after}
    assert changed == set(BY_NAME)
    assert len(BY_NAME) == len(RULES)
    for rule in RULES:
        assert urlsplit(rule.source).scheme == "https"
        assert rule.heading
        assert rule.fits({rule.culprit: ("0.0.1", "9999")})
        assert not rule.fits({rule.culprit: (rule.gone, "9999")})


def test_layout_and_comments_stay() -> None:
    before = (
        "# -*- coding: utf-8 -*-\r\n'''Doc.'''\r\nimport  numpy   as np # n\r\n\r\n"
        "x = [ np.Inf,np.nan ]   # why\r\n"
    )
    assert BY_NAME["numpy-2-names"].apply(before) == before.replace("np.Inf", "np.inf")


@pytest.mark.parametrize(
    "text",
    [
        "from numpy import *\nx = Inf\n",
        "def f(np):\n    return np.Inf\n",
        "from .numpy import Inf\n",
        "import other as np\nx = np.Inf\n",
        "x = 'np.Inf'\n",
        "import numpy as np\ndel np.Inf\n",
    ],
)
def test_what_may_be_something_else_is_left_alone(text: str) -> None:
    assert BY_NAME["numpy-2-names"].apply(text) == text


def test_an_import_is_not_made_under_a_name_that_is_taken() -> None:
    text = "import flask\n\nmarkupsafe = None\nx = flask.Markup('')\n"
    assert BY_NAME["flask-markup"].apply(text) == text


def test_rules_fit_moves_that_cross_their_release() -> None:
    moved = {"flask": ("2.2.5", "3.0.0"), "werkzeug": ("2.0.3", "3.0.1"), "jinja2": ("-", "3.1.2")}
    names = {rule.name for rule in fitting(RULES, moved)}
    assert {"flask-markup", "werkzeug-urls", "werkzeug-safe-str-cmp"} <= names
    assert not {n for n in names if n.startswith("jinja2")}  # it was not there before
    assert "werkzeug-top-level" not in names


async def test_rules_are_applied_apart_in_their_order() -> None:
    text = "from jinja2 import Markup, contextfilter\n"
    names = ["jinja2-pass-context", "jinja2-markup", "numpy-2-copy"]
    found = await rewrite({"a.py": Wanted(text, names), "b.py": Wanted("x = 1\n", names)})
    assert found["b.py"] == Rewritten("x = 1\n", ())
    assert found["a.py"].rules == ("jinja2-pass-context", "jinja2-markup")
    assert "from markupsafe import Markup" in found["a.py"].text


DEEP = "from jinja2 import Markup\nx = " + "(" * 100_000 + ")" * 100_000 + "\n"


def test_a_parser_may_end_its_process() -> None:
    asked = json.dumps({"deep.py": [DEEP, ["jinja2-markup"]]}).encode()
    alone = subprocess.run([sys.executable, "-m", "regreen.rules"], input=asked, check=False)
    assert alone.returncode != 0


async def test_a_file_that_ends_the_parser_costs_itself_only() -> None:
    good = "from jinja2 import Markup\n"
    bad = "from jinja2 import Markup\ndef\n"
    names = ["jinja2-markup"]
    found = await rewrite(
        {path: Wanted(text, names) for path, text in (("d", DEEP), ("g", good), ("b", bad))}
    )
    assert found == {"g": Rewritten("from markupsafe import Markup\n", ("jinja2-markup",))}


async def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "TIMEOUT_S", 0.0)
    assert await rewrite({"a.py": Wanted("from jinja2 import Markup\n", ["jinja2-markup"])}) == {}


def test_a_file_without_a_sign_is_not_read() -> None:
    rule = replace(BY_NAME["jinja2-markup"], signs=("nothing",))
    assert rule.apply("this is (no Python at all: Markup") == "this is (no Python at all: Markup"
