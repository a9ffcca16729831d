"""Line coverage of the code under test, by tracing.

- Standard library only, Python 3.7 and newer.
"""

from __future__ import annotations

import dis
import sys
import threading
from types import CodeType, FrameType
from typing import Any


class Lines:
    """Records executed lines of the files below `root` that are not tests."""

    def __init__(self, root: str, skip: list[str]) -> None:
        self.prefix, self.skip = root.rstrip("/") + "/", tuple(skip)
        self.seen: dict[str, set[int]] = {}
        self.others: set[str] = set()

    def wanted(self, filename: str) -> bool:
        if not filename.startswith(self.prefix):
            return False
        relative = filename[len(self.prefix) :]
        return not any(relative == s or relative.startswith(s + "/") for s in self.skip)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name in self.others:  # most calls are: those of pytest and of the library
            return None
        lines = self.seen.get(name)
        if lines is None:
            if not self.wanted(name):
                self.others.add(name)
                return None
            lines = self.seen[name] = set()
        lines.add(frame.f_lineno)

        def local(inner: FrameType, kind: str, value: Any) -> Any:
            if kind == "line":
                lines.add(inner.f_lineno)
            return local

        return local

    def start(self) -> None:
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def report(self) -> dict[str, list[int]]:
        files: dict[str, list[int]] = {}
        for name, ran in self.seen.items():
            try:
                with open(name, "rb") as source:
                    code = compile(source.read(), name, "exec", dont_inherit=True)
            except (OSError, SyntaxError, ValueError):
                continue
            can: set[int] = set()
            stack = [code]
            while stack:
                item = stack.pop()
                can.update(_lines_of(item))
                stack.extend(c for c in item.co_consts if hasattr(c, "co_code"))
            if can:
                files[name[len(self.prefix) :]] = [len(can & ran), len(can)]
        return files


def _lines_of(code: CodeType) -> set[int]:
    return {line for _, line in dis.findlinestarts(code) if line}
