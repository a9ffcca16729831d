"""Runs pytest and reports every result over an inherited pipe.

- Standard library only, Python 3.7 and newer, pytest 3.6 and newer.
- Standard input carries one JSON object: `key` (hex), `arguments`, `coverage`, `root`.
- A frame is 4 bytes of length, 32 bytes of HMAC-SHA256(key, sequence number + body), a JSON body.
- pytest is imported before the repository is on the path, so that no file there can replace it.
- The pipe is not inherited by other programs and a forked child never writes to it.

Code under test shares this process and could reach the key; see "What remains" in docs/tasks.md.
"""

from __future__ import annotations

import dis
import hashlib
import hmac
import json
import os
import struct
import sys
import threading
import traceback
from types import CodeType, FrameType
from typing import Any

BAD = ("failed", "error")


class Pipe:
    """Writes authenticated frames; only in the process that made it."""

    def __init__(self, fd: int, key: bytes) -> None:
        lock, owner, sequence = threading.Lock(), os.getpid(), [0]

        def send(body: dict[str, Any]) -> None:
            if os.getpid() != owner:
                return
            data = json.dumps(body).encode("utf-8", "replace")
            with lock:
                mac = hmac.new(key, struct.pack(">Q", sequence[0]) + data, hashlib.sha256).digest()
                sequence[0] += 1
                frame = struct.pack(">I", len(data)) + mac + data
                while frame:
                    frame = frame[os.write(fd, frame) :]

        self.send = send


def first_line(report: Any) -> str:
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    text = crash.message if crash is not None else str(getattr(report, "longrepr", "") or "")
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if not lines:
        return ""
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (lines[0] if crash is not None else (errors or lines)[-1])[:300]


class Reporter:
    """pytest hooks that turn reports into one outcome per test id."""

    def __init__(self, pipe: Pipe) -> None:
        self.send = pipe.send
        self.open: dict[str, dict[str, Any]] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.send({"t": "collect", "id": report.nodeid, "msg": first_line(report)})

    def pytest_deselected(self, items: list[Any]) -> None:
        self.send({"t": "deselected", "n": len(items)})

    def pytest_collection_finish(self, session: Any) -> None:
        self.send({"t": "collected", "n": len(session.items)})

    def pytest_runtest_logreport(self, report: Any) -> None:
        state = self.open.setdefault(report.nodeid, {"o": "", "msg": "", "s": 0.0})
        state["s"] += report.duration
        expected = hasattr(report, "wasxfail")
        outcome = ""
        if report.when == "call":
            outcome = report.outcome
            if expected:
                outcome = "xfailed" if report.skipped else "xpassed"
        elif report.failed:
            outcome = "error"
        elif report.skipped:
            outcome = "xfailed" if expected else "skipped"
        if outcome and state["o"] not in BAD:
            state["o"] = outcome
        if report.failed and not state["msg"]:
            state["msg"] = first_line(report)
        if report.when == "teardown":
            self.open.pop(report.nodeid)
            body = {"t": "test", "id": report.nodeid, "o": state["o"] or "error"}
            body.update(msg=state["msg"], s=round(state["s"], 4))
            self.send(body)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        for nodeid, state in self.open.items():
            self.send({"t": "test", "id": nodeid, "o": "error", "msg": state["msg"], "s": 0.0})
        self.send({"t": "end", "status": int(exitstatus)})


class Lines:
    """Records executed lines of the files below `root` that are not tests."""

    def __init__(self, root: str, skip: list[str]) -> None:
        self.prefix, self.skip = root.rstrip("/") + "/", tuple(skip)
        self.seen: dict[str, set[int]] = {}

    def wanted(self, filename: str) -> bool:
        if not filename.startswith(self.prefix):
            return False
        relative = filename[len(self.prefix) :]
        return not any(relative == s or relative.startswith(s + "/") for s in self.skip)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        lines = self.seen.get(name)
        if lines is None:
            if not self.wanted(name):
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


def main() -> None:
    fd = int(os.environ.pop("REGREEN_CHANNEL_FD"))
    os.set_inheritable(fd, False)
    setup = json.loads(sys.stdin.buffer.read().decode())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    pipe = Pipe(fd, bytes.fromhex(setup.pop("key")))
    pipe.send({"t": "start", "python": list(sys.version_info[:3])})
    del sys.path[0]
    status = 1
    try:
        import pytest

        pipe.send({"t": "pytest", "version": pytest.__version__})
        sys.path.insert(0, os.getcwd())
        sys.argv = [os.path.join(os.path.dirname(pytest.__file__), "__main__.py")]
        lines = Lines(setup["root"], setup["skip"]) if setup["coverage"] else None
        if lines is not None:
            lines.start()
        status = int(pytest.main(list(setup["arguments"]), plugins=[Reporter(pipe)]))
        if lines is not None:
            sys.settrace(None)
            threading.settrace(None)
            pipe.send({"t": "coverage", "files": lines.report()})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        pipe.send({"t": "crash", "msg": f"SystemExit: {stop.code}"})
    except BaseException as error:  # noqa: BLE001 - whatever ends pytest is a result to report
        traceback.print_exc()
        text = str(error).strip().split("\n")[0][:300]
        pipe.send({"t": "crash", "msg": f"{type(error).__name__}: {text}"})
    pipe.send({"t": "exit", "status": status})
    sys.stdout.flush()
    sys.exit(status)


if __name__ == "__main__":
    main()
