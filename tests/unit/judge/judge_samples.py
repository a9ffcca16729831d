"""What tampered samples are made of: a project, its tests, and edits of them."""
# ruff: noqa: E501 - file contents stay on one line

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
