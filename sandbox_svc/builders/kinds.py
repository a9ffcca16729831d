"""What a path that a run wrote is to its verdict."""

from collections.abc import Mapping
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from regreen.testpaths import CONFTEST, PYTEST_INI, SHARED_INI, runs_at_start
from sandbox_svc.builders.base import ENV, LOCK, REPO, FileChange
from sandbox_svc.builders.modules import (
    CODE,
    SOURCE_FOLDERS,
    folders_of,
    given,
    may_be_link,
    module_of,
    source_of,
)
from sandbox_svc.builders.protect import by_name, protection

PYCACHE = "/work/pycache"
_CONFIGURATION = "validation-configuration"
_SITE = "/site-packages"


class Kind(Enum):
    """What the verdict has to do with a path."""

    STATES = "of the State, if it has it"
    TAKEN_UP = "taken up by its name, new or not"
    LINK = "taken up by its name if it is a link, else of the State if it has it"


class Kinds:
    """What a path is to the verdicts on one State."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._roots = frozenset(facts["protected"])
        self._settings = frozenset((*facts["settings"], LOCK))
        tests = [f"{REPO}/{folder}" for folder in facts["folders"]]
        usual = [REPO, *(f"{REPO}/{folder}" for folder in SOURCE_FOLDERS)]
        self._places = frozenset((*facts["places"], *usual, *tests))
        """Where Python may look for modules."""
        self._names = frozenset((*facts["foreign"], *facts["stems"]))
        """Modules that tests, or what they import, may ask for."""
        self._shared = frozenset(name for name in facts["foreign"] if "." in name)
        within = {*facts["folders"], *self._roots}
        self._asked = within.union(*map(folders_of, within))
        """Where pytest looks for its settings, on the way to a test."""
        self._tests, self._rewritten = frozenset(facts["files"]), tuple(facts["rewritten"])

    def of(self, path: str) -> Kind | None:
        """None if the verdict does not hang on it."""
        if path.endswith("/."):  # a folder in which there is nothing
            return None
        if path.startswith(PYCACHE + "/"):
            return self._of_byte_code(source_of(path[len(PYCACHE) :]), path)
        kind = self._usual(path)
        if kind is not Kind.TAKEN_UP and self._stands_for_a_module(path):
            return Kind.LINK if may_be_link(path) else Kind.TAKEN_UP
        return kind

    def is_data(self, path: str) -> bool:
        """Whether a file is read by tests alone: no code, no settings, no test itself."""
        if not path.startswith(REPO + "/"):
            return False
        inside = path[len(REPO) + 1 :]
        name = inside.rpartition("/")[2]
        special = name in (*PYTEST_INI, *SHARED_INI) or runs_at_start(inside)
        code = name.endswith(CODE) or inside in self._tests or inside in self._settings
        return not special and not code

    def _of_byte_code(self, source: str, path: str) -> Kind | None:
        """Nobody reads what pytest compiled, nor other byte code of what it compiles itself."""
        if "-pytest" in path.rpartition("/")[2].lower():
            return None
        inside = source[len(REPO) + 1 :] if source.startswith(REPO + "/") else ""
        name = inside.rpartition("/")[2]
        rewritten = any(fnmatchcase(name, pattern) for pattern in self._rewritten)
        if rewritten and (name == CONFTEST or inside in self._tests):
            return None
        return Kind.STATES if self._usual(source) is not None else None

    def _stands_for_a_module(self, path: str) -> bool:
        found = given(path)
        if found is None:
            return False
        folder, name = found
        there = folder in self._places or (folder.startswith(ENV) and folder.endswith(_SITE))
        return (there and name in self._names) or self._stands_inside(path)

    def _stands_inside(self, path: str) -> bool:
        """Whether it stands for a module of a package that the repository shares with another."""
        above = (place for place in self._places if path.startswith(place + "/"))
        return any(module_of(path[len(place) + 1 :]) in self._shared for place in above)

    def _usual(self, path: str) -> Kind | None:
        if path.startswith(ENV + "/"):
            return Kind.TAKEN_UP if path.endswith("/") or runs_at_start(path) else Kind.STATES
        if not path.startswith(REPO + "/"):
            return None
        path = path[len(REPO) + 1 :]
        if path.endswith("/"):  # a folder that nobody can look into
            inside = any(root.startswith(path) for root in self._roots)
            tests = inside or by_name(path + "x", self._roots) == "test"
            return Kind.TAKEN_UP if tests else None
        if "__pycache__" in path.split("/"):
            return self._of_byte_code(f"{REPO}{source_of(f'/{path}')}", path)
        if self._is_asked_for(path):
            return Kind.TAKEN_UP
        held = by_name(path, self._roots) in ("test", _CONFIGURATION)
        return Kind.STATES if held or path in self._settings else None

    def _is_asked_for(self, path: str) -> bool:
        """Whether pytest, or Python as it starts, takes up a new file of this name here."""
        folder, _, name = path.rpartition("/")
        if name in PYTEST_INI or name == CONFTEST:
            return folder in self._asked
        if name in SHARED_INI:
            return protection(FileChange(path, b""), self._roots, {}) == _CONFIGURATION
        if f"{REPO}/{path}" in self._places:
            return True  # Python takes an archive for a folder of modules
        if not runs_at_start(path):
            return False
        if runs_at_start(f"{folder}/x"):  # it lies in a package of such a name
            folder = folder.rpartition("/")[0]
        return folder in self._asked or f"{REPO}/{folder}" in self._places
