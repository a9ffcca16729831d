"""Runs pytest and reports every result over an inherited pipe.

- Standard library only, Python 3.7 and newer, pytest 3.0 and newer.
- Standard input carries one JSON object: `key` (hex), `arguments`, `coverage`, `root`; with
  `part`, only a part of the collected tests runs (`part.py`); with `elsewhere`, under another
  clock or host name (`elsewhere.py`), with `order` in another order (`order.py`).
- A frame is 4 bytes of length, 32 bytes of HMAC-SHA256(key, sequence number + body), a JSON body.
- Run with `-S`: key and pipe are taken before Python looks at any place but its own library.
- pytest is imported before the repository is on the path, so that no file there can replace it,
  and reads tests from their source alone: byte code of them might be somebody else's.
- Controls, tests that must fail, run before modules that the key decides and at the end, below a
  collector of their own: hooks that see them touch nothing of a real test. No plugin lists them.
- Functions of pytest that were replaced meanwhile are reported too.
- Of a test that was skipped or failed as expected it is told whether the tests themselves say so.
- Started ahead of its request (`names` in the first line), it loads modules and waits; see preload.
- The pipe is not inherited by other programs and a forked child never writes to it.

Code under test shares this process and could reach the key; see "What remains" in docs/tasks.md.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import hmac
import importlib
import importlib.util
import json
import os
import signal
import struct
import sys
import threading
import traceback
from types import SimpleNamespace
from typing import Any, NoReturn

BAD = ("failed", "error")
MOST_CONTROLS = 12
PYTEST = ("pytest", "_pytest", "pluggy")


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


def folded(so_far: str, report: Any) -> str:
    """The outcome of a test after one more report of it."""
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
    return outcome if outcome and so_far not in BAD else so_far


class Reporter:
    """pytest hooks that turn reports into one outcome per test id."""

    def __init__(self, pipe: Any, origin: Any) -> None:
        self.send, self.origin = pipe.send, origin
        self.open: dict[str, dict[str, Any]] = {}
        self.own: dict[str, bool] = {}
        origin.hookimpl(tryfirst=True)(Reporter.pytest_runtest_makereport)

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        own = self.origin.own(item, call)
        if own is not None:
            self.own[item.nodeid] = own and self.own.get(item.nodeid, True)

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
        state["o"] = folded(state["o"], report)
        if report.failed and not state["msg"]:
            state["msg"] = first_line(report)
        if report.when == "teardown":
            self.open.pop(report.nodeid)
            body = {"t": "test", "id": report.nodeid, "o": state["o"] or "error"}
            body.update(msg=state["msg"], s=round(state["s"], 4))
            if state["o"] in ("skipped", "xfailed"):
                body["own"] = self.own.get(report.nodeid, False)
            self.send(body)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        for nodeid, state in self.open.items():
            self.send({"t": "test", "id": nodeid, "o": "error", "msg": state["msg"], "s": 0.0})
        self.send({"t": "end", "status": int(exitstatus)})


def beside(name: str) -> Any:
    """A module of a file beside this one; it and what only it needs stay invisible."""
    before = set(sys.modules)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    spec: Any = importlib.util.spec_from_file_location("regreen_" + name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for new in set(sys.modules) - before:
        del sys.modules[new]
    return module


control_body, around = beside("control").control_body, beside("quiet")
Origin, Lines, Part = beside("origin").Origin, beside("lines").Lines, beside("part").Part
watch_pytest = beside("watch").watch_pytest


class Controls:
    """pytest hooks that run tests which must fail between the repository's own modules.

    Their reports come from the very functions that make those of real tests, but are given to
    nobody else: no log line, no count and no exit status knows of them. Their parent is no real
    test's, and they inherit no marker.
    """

    def __init__(self, pipe: Pipe, key: bytes, watch: Any, pytest: Any) -> None:
        self.send, self.key, self.watch, self.pytest = pipe.send, key, watch, pytest
        self.runner = sys.modules["_pytest.runner"]
        self.kinds: dict[int, str] = {}
        self.looks: dict[int, Any] = {}
        self.told: set[str] = set()
        pytest.hookimpl(hookwrapper=True, tryfirst=True)(Controls.pytest_runtest_protocol)

    def draw(self, number: int) -> bytes:
        return hmac.new(self.key, b"control %d" % number, hashlib.sha256).digest()

    def pytest_collection_finish(self, session: Any) -> None:
        items = list(session.items)
        homes = [id(item.getparent(self.pytest.File) or item.parent) for item in items]
        first = [n for n in range(1, len(items)) if homes[n] != homes[n - 1]]
        for number in sorted(first, key=self.draw)[: MOST_CONTROLS - 1]:
            kind = ("call", "setup", "collect")[self.draw(number)[-1] % 3]
            self.kinds[id(items[number])] = kind
        for number in sorted(range(1, len(items)), key=self.draw)[: MOST_CONTROLS - 1]:
            self.looks[id(items[number])] = items[number]
        if items:
            self.kinds[id(items[0])] = "call"

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Any:
        if id(item) in self.kinds:
            self.run(self.kinds[id(item)], item.session, item)
        elif id(item) in self.looks:
            self.tell()
        yield
        for kind in ("setup", "collect", "call") if nextitem is None else ():
            self.run(kind, item.session, None)

    def run(self, kind: str, session: Any, following: Any) -> None:
        """One control before `following`; whatever happens in it, the tests go on."""
        self.tell()
        outcome = ""
        name = following.name.partition("[")[0] if following is not None else "test_end"
        try:
            parent = self.make(self.place(), "controls", session)
            if kind == "collect":
                collector = unshown(self.make(self.collector(), name, parent))
                report = collector.ihook.pytest_make_collect_report(collector=collector)
                outcome = report.outcome
            else:
                item = self.item(kind, name, parent)
                for report in self.runner.runtestprotocol(item, log=False, nextitem=following):
                    outcome = folded(outcome, report)
        except Exception as error:  # noqa: BLE001 - a plugin that cannot bear it
            outcome = f"raised {type(error).__name__}"
            self.settle(session, following)
        self.tell()
        self.send({"t": "control", "kind": kind, "o": outcome})

    def tell(self) -> None:
        """Report what was replaced since the last time."""
        new = [name for name in self.watch.replaced() if name not in self.told]
        if new:
            self.told.update(new)
            self.send({"t": "replaced", "names": new[:50]})

    def make(self, cls: Any, name: str, parent: Any, **more: Any) -> Any:
        make = getattr(cls, "from_parent", cls)
        return make(name=name, parent=parent, **more)

    def item(self, kind: str, name: str, parent: Any) -> Any:
        parent.obj = SimpleNamespace(**{name: control_body})  # where pytest before 6 looks again
        item = unshown(self.make(self.pytest.Function, name, parent, callobj=control_body))
        item.fixturenames = ["no_such_fixture"] if kind == "setup" else []
        # What is set up for the tests around it, packages and folders, must stay as it is.
        chain = [node for node in parent.session._setupstate.stack if node is not parent.session]
        item.listchain = lambda: [parent.session, *chain, parent, item]
        item.iter_markers_with_node = lambda name=None: iter(())
        return item

    def place(self) -> Any:
        class Place(self.pytest.Collector):  # type: ignore[misc,name-defined]
            def collect(self) -> Any:
                return []

        return Place

    def collector(self) -> Any:
        class Broken(self.pytest.Collector):  # type: ignore[misc,name-defined]
            def collect(self) -> Any:
                raise ImportError("this control must fail")

        return Broken

    def settle(self, session: Any, following: Any) -> None:
        """Take down what a control left behind."""
        state = session._setupstate
        with contextlib.suppress(Exception):  # the next test reports it
            try:
                state.teardown_exact(following)
            except TypeError:  # pytest before 6.3
                state.teardown_exact(session, following)

    def pytest_sessionfinish(self) -> None:
        self.tell()


def unshown(node: Any) -> Any:
    """The same node, whose failure nobody spends time to show: its report goes no further."""
    node.repr_failure = node._repr_failure_py = lambda *_, **__: "this control must fail"
    return node


def import_pytest(root: str, send: Any) -> Any:
    """pytest without the repository on the path.

    A repository that provides a part of pytest is put back, and that is reported as a replacement.
    """
    root = os.path.join(os.path.realpath(root), "")
    path = list(sys.path)
    clean = [p for p in path if not os.path.join(os.path.realpath(p), "").startswith(root)]
    sys.path[:] = clean
    try:
        return importlib.import_module("pytest")
    except ImportError:
        if clean == path:
            raise
        for name in [n for n in sys.modules if n.split(".")[0] in PYTEST]:
            del sys.modules[name]
        sys.path[:] = path
        importlib.invalidate_caches()
        pytest = importlib.import_module("pytest")
        send({"t": "replaced", "names": ["pytest from the repository"]})
        return pytest


def own_pytest(root: str, send: Any) -> Any:
    """pytest, made to pass over byte code of tests, which a run could have left for itself, and to
    remember where statements are."""
    pytest = import_pytest(root, send)
    rewrite: Any = sys.modules.get("_pytest.assertion.rewrite")
    if hasattr(rewrite, "_read_pyc"):
        rewrite._read_pyc = no_byte_code
    beside("statements").remember_statements()
    return pytest


def no_byte_code(*_: Any, **__: Any) -> None:
    return None


no_byte_code.__module__ = "_pytest.assertion.rewrite"  # watched as what it stands for


class Ahead:
    """A run that was started ahead of its request: pytest and other modules are loaded."""

    def __init__(self, fd: int, first: dict[str, Any], preload: Any) -> None:
        pipe = Pipe(fd, bytes.fromhex(first["key"]))
        path, notes = list(sys.path), []  # type: tuple[list[str], list[Any]]
        self.pytest = own_pytest(first["root"], notes.append)
        self.watch = watch_pytest()
        sys.argv = [entry_point(self.pytest)]
        sys.path[:] = [os.getcwd(), *path]
        with around.quiet() as log:
            self.shelf = preload.Shelf(first["root"], log)
            refused = self.shelf.load(first["names"], first["deep"])
        around.remember_files([group.modules for group in self.shelf.groups])
        names = [n for n, m in self.shelf.base.items() if preload.inside(m, self.shelf.root)]
        if names or notes:
            refused["*"] = "the repository is loaded when Python starts"
        sys.path[:] = path
        loaded = sum(len(group.modules) for group in self.shelf.groups)
        pipe.send({"t": "ahead", "refused": refused, "loaded": loaded})
        if refused:
            os._exit(0)
        self.setup = json.loads(sys.stdin.buffer.read().decode())

    def serve(self, pipe: Pipe) -> None:
        """From now on hand out what was loaded; end the process if a run cannot use it."""

        owner = os.getpid()

        def refuse(why: str) -> NoReturn:
            if os.getpid() != owner:  # only the owner can tell; killed, its run is done again cold
                os.kill(owner, signal.SIGKILL)
            pipe.send({"t": "anew", "msg": why})
            os._exit(1)

        self.shelf.serve(refuse)


def entry_point(pytest: Any) -> str:
    return os.path.join(os.path.dirname(pytest.__file__), "__main__.py")


def run_pytest(setup: dict[str, Any], pipe: Pipe, key: bytes, ahead: Ahead | None) -> int:
    """One run of pytest; its status."""
    path = list(sys.path)
    pytest = ahead.pytest if ahead is not None else own_pytest(setup["root"], pipe.send)
    pipe.send({"t": "pytest", "version": pytest.__version__})
    watch = ahead.watch if ahead is not None else watch_pytest()
    controls = Controls(pipe, key, watch, pytest)
    sys.path[:] = [os.getcwd(), *path]
    sys.argv = [entry_point(pytest)]
    lines = Lines(setup["root"], setup["skip"]) if setup["coverage"] else None
    recorder = None
    if setup.get("survey"):
        recorder = beside("preload").Recorder(setup["root"])
        sys.meta_path.insert(0, recorder)
    if ahead is not None:
        ahead.serve(pipe)
    if lines is not None:
        lines.start()
    part = Part(pipe.send, setup["part"], pytest) if setup.get("part") else None
    where = [beside("where").Where(pipe.send, pytest)] if setup.get("where") else []
    origin = Origin(setup["root"], setup["skip"], pytest)
    reporter = Reporter(part or pipe, origin)
    order = [beside("order").Order(setup["order"], pytest)] if setup.get("order") else []
    whence = beside("whence").Whence(origin, pipe.send, pytest)
    plugins = [reporter, controls, whence, *order, *where, *([part] if part is not None else [])]
    try:
        status = int(pytest.main(list(setup["arguments"]), plugins=plugins))
    finally:
        for look in where:
            look.rest()
    controls.tell()
    if lines is not None:
        sys.settrace(None)
        threading.settrace(None)
        pipe.send({"t": "coverage", "files": lines.report()})
    if recorder is not None:
        pipe.send({"t": "survey", "names": recorder.survey()})
    return status


def close_input() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def main() -> None:
    fd = int(os.environ.pop("REGREEN_CHANNEL_FD"))
    os.set_inheritable(fd, False)
    setup = json.loads(sys.stdin.buffer.readline().decode())
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if place != here]
    if "names" not in setup:
        close_input()  # it may be a file, which can be read again
    beside("start").as_usual()
    ahead = Ahead(fd, setup, beside("preload")) if "names" in setup else None
    if ahead is not None:
        setup = ahead.setup
        close_input()
    key = bytes.fromhex(setup.pop("key"))
    pipe = Pipe(fd, key)
    pipe.send({"t": "start", "python": list(sys.version_info[:3])})
    status = 1
    if setup.get("elsewhere"):
        pipe.send({"t": "unmet", "what": beside("elsewhere").apply(setup["elsewhere"])})
    try:
        status = run_pytest(setup, pipe, key, ahead)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        pipe.send({"t": "crash", "msg": f"SystemExit: {stop.code}"})
    except BaseException as error:  # noqa: BLE001 - whatever ends pytest is a result to report
        traceback.print_exc()
        text = str(error).strip().split("\n")[0][:300]
        pipe.send({"t": "crash", "msg": f"{type(error).__name__}: {text}"})
    pipe.send({"t": "exit", "status": status})
    around.leave(status, atexit)


if __name__ == "__main__":
    main()
