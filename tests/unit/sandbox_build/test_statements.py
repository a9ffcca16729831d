"""Where statements of a text are is what pytest itself says, and is asked of a text once."""

import ast
import asyncio.base_events
import dataclasses
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pytest._code import code, source

from sandbox_svc.builders.inbox import statements

find = source.getstatementrange_ast
TEXTS = {
    "decorators": """
        @one
        @two(
            3,
        )
        class A:
            @three
            async def f(self): pass

        x = 1
        """,
    "branches": """
        def f(a):
            try:
                g(
                    a,
                )
            except (
                ValueError
            ) as e:
                raise
            else:
                # about
                h()
            finally:
                for i in a:
                    pass
                else:
                    k()
            while a: b()
            return [
                lambda: (
                    1
                )
                for x in y
            ]
        """,
    "match": """
        match a:
            case [
                1,
            ] if b:
                c()
            case _:
                d()
        """,
    "text": 'x = """\na\n\nb"""\n\n# end\n\n',
    "one": "raise ValueError(\n    1\n)",
}
MODULES = (dataclasses, typing, textwrap, ast, asyncio.base_events)


@pytest.fixture
def remembered() -> Iterator[Any]:
    """pytest's own modules look things up the new way meanwhile."""
    statements.remember_statements()
    found = source.getstatementrange_ast
    assert found is not find
    yield found
    changed = [m for m in sys.modules.values() if getattr(m, statements.NAME, None) is found]
    assert source in changed
    for module in changed:
        setattr(module, statements.NAME, find)


def ranges(look: Any, text: source.Source) -> list[Any]:
    found: list[Any] = []
    for line in range(len(text.lines)):
        try:
            found.append(look(line, text)[1:])
        except (SyntaxError, IndexError) as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_each_line_is_of_the_statement_that_pytest_says(remembered: Any, name: str) -> None:
    text = source.Source(textwrap.dedent(TEXTS[name]))
    assert ranges(remembered, text) == ranges(remembered, text) == ranges(find, text)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_of_real_files_too(remembered: Any, module: ModuleType) -> None:
    text = source.Source(Path(str(module.__file__)).read_text())
    lines = list(range(0, len(text.lines), len(text.lines) // 12))
    expected = [find(line, text)[1:] for line in lines]
    assert [remembered(line, text)[1:] for line in lines] == expected


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that were parsed."""
    texts: list[str] = []
    parse = ast.parse

    def counted(text: Any, *rest: Any, **more: Any) -> ast.AST:
        texts.append(text)
        tree: ast.AST = parse(text, *rest, **more)
        return tree

    monkeypatch.setattr(ast, "parse", counted)
    return texts


def test_a_text_is_parsed_once(remembered: Any, parsed: list[str]) -> None:
    texts = [f"x = {n}\ny = (\n    2\n)\n" for n in range(3)]
    for _ in range(4):
        for text in texts:  # a text is read anew for each frame
            assert remembered(2, source.Source(text))[1:] == (1, 4)
            assert remembered(0, source.Source(text))[1:] == (0, 1)
    assert len(parsed) == len(texts)


def test_however_many_files_a_traceback_goes_through(remembered: Any, parsed: list[str]) -> None:
    """The file of the tests is one of them, and each failure is of another line of it."""
    tests = "".join(f"assert call({n})\n" for n in range(60))
    others = [f"x = {n}\n" for n in range(3 * statements.TREES)]
    for line in range(60):
        assert remembered(line, source.Source(tests))[1:] == (line, line + 1)
        for other in others:
            assert remembered(0, source.Source(other))[1:] == (0, 1)
    assert len(parsed) <= len(others) + 2


def test_what_is_remembered_is_bounded(remembered: Any, parsed: list[str]) -> None:
    for n in range(statements.TEXTS + 1):
        remembered(0, source.Source(f"y = {n}\n"))
    remembered(0, source.Source("y = 0\n"))
    assert len(parsed) == statements.TEXTS + 2


def test_a_text_that_changed_is_another(remembered: Any) -> None:
    assert remembered(1, source.Source("a = 1\nb = 2\n"))[1:] == (1, 2)
    assert remembered(1, source.Source("a = (\nb\n)\n"))[1:] == (0, 3)


def test_what_is_no_python_fails_as_before(remembered: Any) -> None:
    for _ in range(2):
        with pytest.raises(SyntaxError):
            remembered(0, source.Source("a ="))


def test_a_failure_is_shown_as_before(remembered: Any) -> None:
    def fail(depth: int) -> None:
        if depth:
            fail(
                depth - 1,
            )
        raise ValueError(
            "at the bottom",
        )

    def shown() -> str:
        with pytest.raises(ValueError, match="bottom") as caught:
            fail(2)
        return str(caught.getrepr(style="short"))

    new = shown()
    for module in (source, code):
        if statements.NAME in vars(module):
            setattr(module, statements.NAME, find)
    try:
        assert shown() == new
        assert new.count("in fail\n") == 3
    finally:
        for module in (source, code):
            if statements.NAME in vars(module):
                setattr(module, statements.NAME, remembered)
