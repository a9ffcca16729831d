"""Whether a test that was passed over says so itself, or the code under test does.

- Standard library only, Python 3.7 and newer; made after pytest was imported.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any


class Origin:
    """Tells whether a test is passed over by its own words: a mark, or a call in a test file."""

    def __init__(self, root: str, tests: list[str], pytest: Any) -> None:
        self.root, self.tests = os.path.join(os.path.realpath(root), ""), tuple(tests)
        homes = [sys.modules[name].__file__ for name in ("_pytest.runner", "unittest.case")]
        self.machinery = tuple(os.path.join(os.path.dirname(str(home)), "") for home in homes)
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
            if raiser:
                return self.is_test(raiser)
        return self.marked(item)

    def raiser(self, error: BaseException) -> str:
        """The file of the innermost frame outside the machinery of tests; empty if none is."""
        walk = traceback.walk_tb(error.__traceback__)
        files = [os.path.realpath(frame.f_code.co_filename) for frame, _ in walk]
        while files and files[-1].startswith(self.machinery):
            files.pop()
        pluggy = os.sep + "pluggy" + os.sep
        return "" if not files or pluggy in files[-1] else files[-1]

    def is_test(self, filename: str) -> bool:
        if not filename.startswith(self.root):
            return False
        relative = filename[len(self.root) :]
        return any(relative == t or relative.startswith(t + "/") for t in self.tests)

    def marked(self, item: Any) -> bool:
        marks = any(marker_of(item, name) for name in ("skip", "skipif", "xfail"))
        places = (getattr(item, "obj", None), getattr(item, "cls", None))
        flags = ("__unittest_skip__", "__unittest_expecting_failure__")
        return marks or any(getattr(p, flag, False) for p in places for flag in flags)


def marker_of(item: Any, name: str) -> bool:
    """Whether a test has a mark; before 3.6, pytest knew `get_marker` alone, and since 4.0 not."""
    if hasattr(item, "iter_markers"):
        return any(True for _ in item.iter_markers(name))
    return item.get_marker(name) is not None
