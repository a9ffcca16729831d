"""The watch over the test runner tells every way to replace a part of it, and nothing else."""

import functools
import unittest
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from sandbox_svc.builders.inbox.watch import Watch

SOURCE = """
def plain(x=1, *, y=2):
    return x + y

class Base:
    def above(self):
        return 1

class Other(Base):
    pass

class Node(Base):
    limit = 3
    def method(self):
        return 1
    @classmethod
    def of_class(cls):
        return 1
    @staticmethod
    def of_none():
        return 1
    @property
    def read(self):
        return 1

number = 7
"""


def another(*_: Any, **__: Any) -> int:
    return 0


@pytest.fixture
def module() -> ModuleType:
    made = ModuleType("_pytest.made")
    exec(compile(SOURCE, "made.py", "exec"), vars(made))
    made.wrapped = functools.wraps(made.plain)(lambda: made.plain())
    made.wrapped.__module__ = made.__name__
    return made


def test_a_runner_that_nobody_touched_is_as_it_was(module: ModuleType) -> None:
    watch = Watch([module])
    module.Node().method()
    module.number = 8  # no code
    module.Node.limit = 4
    module.note = "new, and no code"
    module.helper = another  # hides nothing
    assert watch.replaced() == watch.replaced() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "plain", another), "plain"),
        (lambda m: delattr(m, "plain"), "plain"),
        (lambda m: setattr(m.plain, "__code__", another.__code__), "plain"),
        (lambda m: setattr(m.plain, "__defaults__", (5,)), "plain"),
        (
            lambda m: setattr(m.plain, "__kwdefaults__", {"y": 5}),
            "plain",
        ),
        (lambda m: setattr(m.wrapped, "__code__", (lambda: m).__code__), "wrapped"),
        (lambda m: setattr(m, "len", another), "len"),
        (lambda m: setattr(m, "Node", type("Node", (), {})), "Node"),
        (lambda m: setattr(m.Node, "method", another), "Node.method"),
        (lambda m: setattr(m.Node.method, "__code__", another.__code__), "Node.method"),
        (lambda m: setattr(m.Node, "of_class", classmethod(another)), "Node.of_class"),
        (lambda m: setattr(m.Node.of_none, "__code__", another.__code__), "Node.of_none"),
        (lambda m: setattr(m.Node.read.fget, "__code__", another.__code__), "Node.read"),
        (lambda m: setattr(m.Node, "above", another), "Node.above"),
        (lambda m: setattr(m.Base, "above", another), "Base.above"),
        (lambda m: setattr(m.Node, "__bases__", (m.Other, m.Base)), "Node.__bases__"),
    ],
)
def test_each_way_to_replace_a_part_is_told_by_its_name(
    module: ModuleType, change: Callable[[Any], object], named: str
) -> None:
    watch = Watch([module])
    change(module)
    assert watch.replaced() == [f"_pytest.made.{named}"]


def test_an_old_name_of_the_same_function_is_no_replacement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unittest.TestCase, "assertEquals", another, raising=False)
    watch = Watch([unittest.case])
    monkeypatch.setattr(unittest.TestCase, "assertEquals", unittest.TestCase.assertEqual)
    assert watch.replaced() == []
    monkeypatch.setattr(unittest.TestCase, "assertEquals", unittest.TestCase.assertTrue)
    assert watch.replaced() == ["unittest.case.TestCase.assertEquals"]


def test_what_is_put_back_is_told_no_more(module: ModuleType) -> None:
    watch, kept = Watch([module]), module.plain
    module.plain = another
    assert watch.replaced()
    module.plain = kept
    assert watch.replaced() == []
