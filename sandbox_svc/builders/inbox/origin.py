"""Whether a test that was passed over says so itself, or the code under test does.

- Standard library only, Python 3.7 and newer; made after pytest was imported.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import traceback
from types import CodeType
from typing import Any

MARKS = ("skip", "skipif", "xfail")
FLAGS = ("__unittest_skip__", "__unittest_expecting_failure__")
WORDS = ("skip", "Skip", "xfail")
"""In the names that code uses which passes a test over itself."""
MARKS_GIVEN = re.compile(rb"\bmarks\s*=")
MARK_ADDED = re.compile(rb"\b(add_marker|applymarker)\b")
FOLDERS = frozenset(("test", "tests"))
EMPTY = "got empty parameter set"
"""Why pytest passes over a test for which there is no value: whose values, it does not say."""


class Origin:
    """Tells whether a test is passed over by its own words: a mark, or a call in a test file."""

    def __init__(self, root: str, tests: list[str], pytest: Any) -> None:
        self.root, self.tests = os.path.join(os.path.realpath(root), ""), tuple(tests)
        homes = [sys.modules[name].__file__ for name in ("_pytest.runner", "unittest.case")]
        self.machinery = tuple(os.path.join(os.path.dirname(str(home)), "") for home in homes)
        self.hookimpl = pytest.hookimpl
        self.texts: dict[str, bytes] = {}
        self.skips = (
            pytest.skip.Exception,
            pytest.xfail.Exception,
            sys.modules["unittest.case"].SkipTest,
        )

    def own(self, item: Any, call: Any) -> bool | None:
        """None where nothing was raised."""
        info = call.excinfo or next(iter(getattr(item, "_excinfo", None) or ()), None)
        if info is None:
            return None
        error = info.value
        if isinstance(error, self.skips):
            while isinstance(error.__context__, self.skips):
                error = error.__context__  # what pytest makes of a skip of unittest
            raiser = self.raiser(error)
            if raiser is not None:
                says = any(word in name for name in raiser.co_names for word in WORDS)
                return says and self.is_test(os.path.realpath(raiser.co_filename))
        return self.marked(item)

    def raiser(self, error: BaseException) -> CodeType | None:
        """The innermost code outside the machinery of tests; what it calls is called so there."""
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        while codes and os.path.realpath(codes[-1].co_filename).startswith(self.machinery):
            codes.pop()
        pluggy = os.sep + "pluggy" + os.sep
        return None if not codes or pluggy in codes[-1].co_filename else codes[-1]

    def is_test(self, filename: str) -> bool:
        """Whether a file is one of tests, by its name or because it is known to be."""
        if not filename.startswith(self.root):
            return False
        relative = filename[len(self.root) :]
        *folders, name = relative.split("/")
        usual = name == "conftest.py" or name.startswith("test_") or name.endswith("_test.py")
        if usual or not FOLDERS.isdisjoint(folders):
            return True
        return any(relative == t or relative.startswith(t + "/") for t in self.tests)

    def marked(self, item: Any) -> bool:
        """Whether a mark that the tests made, or a mark of unittest in a test file, is on it."""
        if not hasattr(item, "iter_markers_with_node"):  # before pytest 3.6
            return any(marker_of(item, name) for name in MARKS) or self.flagged(item)
        marks = [pair for name in MARKS for pair in item.iter_markers_with_node(name=name)]
        if not any(self.is_made_by_tests(item, node, mark) for node, mark in marks):
            return self.flagged(item)
        return not any(str(mark.kwargs.get("reason")).startswith(EMPTY) for _, mark in marks)

    def is_made_by_tests(self, item: Any, node: Any, mark: Any) -> bool:
        """False where the code under test is known to have put it there."""
        call = getattr(item, "callspec", None)
        if node is item:
            if any(mark is one for one in getattr(call, "marks", ())):
                return self.tests_say(MARKS_GIVEN)
            own = self.is_own(node.obj, mark)
            return self.tests_say(MARK_ADDED) if own is None else own
        if isinstance(getattr(node, "obj", None), type):
            holders = [cls for cls in node.obj.__mro__ if has_mark(cls, mark)]
            if holders:
                return any(self.is_class_of_tests(item, cls) for cls in holders)
        elif has_mark(getattr(node, "obj", None), mark):
            place = os.path.realpath(str(getattr(node.obj, "__file__", "")))
            return self.is_test(place) and b"pytestmark" in self.text(place)
        return self.tests_say(MARK_ADDED)

    def tests_say(self, words: Any) -> bool:
        """Whether a file of tests that is loaded has such words."""
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        paths = {os.path.realpath(path) for path in files if isinstance(path, str)}
        return any(words.search(self.text(path)) for path in paths if self.is_test(path))

    def is_class_of_tests(self, item: Any, cls: type) -> bool:
        """Whether a class is written in a file of tests; what it says of its module is no proof."""
        written = re.compile(rb"^[ \t]*class[ \t]+%s\b" % re.escape(cls.__name__.encode()), re.M)
        files = {file_of(item), file_of_module(cls)}
        return any(self.is_test(path) and written.search(self.text(path)) for path in files)

    def is_own(self, function: Any, mark: Any) -> bool | None:
        """Whether a function with a mark is a test file's; None if it has it not."""
        function = getattr(function, "__func__", function)
        return self.is_test(code_file(function)) if has_mark(function, mark) else None

    def flagged(self, item: Any) -> bool:
        """Whether unittest's decorators were used on it in a test file."""
        function = getattr(item, "obj", None)
        function = getattr(function, "__func__", function)
        if any(vars(function).get(flag) for flag in FLAGS if hasattr(function, "__dict__")):
            return self.is_test(code_file(function))
        classes = getattr(getattr(item, "cls", None), "__mro__", ())
        holders = [cls for cls in classes if any(vars(cls).get(flag) for flag in FLAGS)]
        return any(self.is_class_of_tests(item, cls) for cls in holders)

    def text(self, path: str) -> bytes:
        if path not in self.texts:
            self.texts[path] = b""
            with contextlib.suppress(OSError), open(path, "rb") as source:
                self.texts[path] = source.read()
        return self.texts[path]


def has_mark(thing: Any, mark: Any) -> bool:
    found = getattr(thing, "__dict__", {}).get("pytestmark", ())
    found = found if isinstance(found, (list, tuple)) else [found]
    return any(getattr(one, "mark", one) is mark or one is mark for one in found)


def code_file(function: Any) -> str:
    """The file of a function that decorators may have wrapped."""
    with contextlib.suppress(ValueError):  # around in a circle
        function = inspect.unwrap(function)
    return os.path.realpath(str(getattr(getattr(function, "__code__", None), "co_filename", "")))


def file_of_module(cls: type) -> str:
    module = sys.modules.get(cls.__module__)
    return os.path.realpath(str(getattr(module, "__file__", None) or ""))


def file_of(node: Any) -> str:
    return os.path.realpath(str(getattr(node, "path", None) or node.fspath))


def marker_of(item: Any, name: str) -> bool:
    """Whether a test has a mark; before 3.6, pytest knew `get_marker` alone, and since 4.0 not."""
    if hasattr(item, "iter_markers"):
        return any(True for _ in item.iter_markers(name))
    return item.get_marker(name) is not None
