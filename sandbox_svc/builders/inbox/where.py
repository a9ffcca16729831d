"""Tells where the tests of a run come from, and where Python looked for modules meanwhile.

- Standard library only, Python 3.7 and newer.
- Told once, of the untouched State: what is not there is guessed by nobody afterwards.
"""

from __future__ import annotations

import os
import sys
from typing import Any

MOST = 2000


class Where:
    """pytest hooks that note the files of tests and the path of modules."""

    def __init__(self, send: Any, pytest: Any) -> None:
        self.send, self.pytest = send, pytest
        self.homes: dict[str, tuple[str, bool]] = {}
        self.places: dict[str, None] = {}
        self.files: dict[str, None] = {}
        self.others: dict[str, str] = {}
        self.told = False

    def pytest_collectstart(self, collector: Any) -> None:
        if isinstance(collector, self.pytest.File):
            tests = isinstance(collector, self.pytest.Module) and not is_doctest(collector)
            path, known = self.homes.get(collector.nodeid, (file_of(collector), False))
            self.homes[collector.nodeid] = (path, tests or known)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and report.nodeid in self.homes:
            path, tests = self.homes[report.nodeid]
            self.note(report.nodeid, path, tests)

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            self.note(item.nodeid, file_of(item), isinstance(item, self.pytest.Function))
        self.look()
        self.send({"t": "where", "roots": self.roots(session.config)})
        rootdir = getattr(session.config, "rootpath", None) or session.config.rootdir
        self.send({"t": "where", "rootdir": os.path.realpath(str(rootdir))})
        self.send({"t": "where", "plugins": plugins_of(session.config.pluginmanager)})
        if session.config.getoption("assertmode", "") == "rewrite":
            patterns = ["conftest.py", *session.config.getini("python_files")]
            self.send({"t": "where", "rewritten": [p for p in patterns if "/" not in p]})

    def pytest_sessionfinish(self) -> None:
        self.told = True
        self.look()
        self.send({"t": "where", "places": list(self.places), "files": list(self.files)})
        others = list(self.others.items())
        for begin in range(0, len(others), MOST):
            self.send({"t": "where", "others": others[begin : begin + MOST]})

    def rest(self) -> None:
        """Tell what is known where pytest did not begin, or did not end, as it should."""
        if not self.told:
            self.pytest_sessionfinish()

    def note(self, id: str, path: str, tests: bool) -> None:
        """What is no Python module is a file of tests, whoever reads it."""
        if tests or not path.endswith(".py"):
            self.files[path] = None
        else:
            self.others[id] = path

    def roots(self, config: Any) -> list[str]:
        named = [str(argument).partition("::")[0] for argument in config.args]
        return [os.path.realpath(path) for path in named if os.path.isdir(path)]

    def look(self) -> None:
        for place in sys.path:
            self.places[os.path.realpath(place or os.getcwd())] = None


def plugins_of(manager: Any) -> list[str]:
    """Files of the modules that are plugins, but for those of installed packages' metadata."""
    installed = [plugin for plugin, _ in manager.list_plugin_distinfo()]
    modules = [plugin for plugin in manager.get_plugins() if plugin not in installed]
    files = [getattr(plugin, "__file__", None) for plugin in modules]
    return sorted({os.path.realpath(path) for path in files if isinstance(path, str)})


def is_doctest(node: Any) -> bool:
    return type(node).__module__.rpartition(".")[2] == "doctest"


def file_of(node: Any) -> str:
    return os.path.realpath(str(getattr(node, "path", None) or node.fspath))
