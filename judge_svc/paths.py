"""What a path is to a validation: test, configuration, harness, start-up hook, or plain source.

- Pure functions of the path and of the task's protected paths.
- A path is one thing only; the order of `kind_of` decides.
"""

import re
from collections.abc import Collection
from enum import StrEnum
from pathlib import PurePosixPath

from regreen.testpaths import CONFTEST, PYTEST_INI, SHARED_INI, runs_at_start

_TEST_DIRS = {"test", "tests", "testing", "testsuite", "unittests"}
_TEST_FILE = re.compile(r"(?:test_.*|.*_tests?|tests?)\.py\Z")
_SHADOWS = re.compile(
    r"(?:src/)?(?:pytest|_pytest|pluggy|unittest|coverage|xdist)(?:\.py|/.*\.py)\Z"
)
_INI = {*PYTEST_INI, *SHARED_INI, ".coveragerc"}
_CI = re.compile(
    r"(?:\.github/(?:workflows|actions)/.*|\.gitlab-ci\.ya?ml|\.travis\.ya?ml|azure-pipelines\.ya?ml"
    r"|\.?appveyor\.ya?ml|\.circleci/.*|Jenkinsfile|bitbucket-pipelines\.ya?ml|\.cirrus\.ya?ml)\Z"
)
_SCRIPT = re.compile(
    r"(?:.*/)?(?:[Mm]akefile|GNUmakefile|justfile|noxfile\.py|tasks\.py|run_?tests?\.\w+)\Z"
)
_REQUIREMENTS = re.compile(
    r"(?:.*/)?(?:requirements[^/]*\.(?:txt|in|lock)|constraints[^/]*\.txt)\Z"
)
_BUILD = {"setup.py", "conf.py"}


class PathKind(StrEnum):
    """What a path is."""

    TEST = "test"
    CONFTEST = "conftest"
    STARTUP = "startup"
    SHADOW = "shadow"
    INI = "ini"
    CI = "ci"
    SCRIPT = "script"
    REQUIREMENTS = "requirements"
    BUILD = "build"
    SOURCE = "source"
    DATA = "data"


def kind_of(path: str, protected: Collection[str] = ()) -> PathKind:
    """The one kind of `path`."""
    parts = PurePosixPath(path)
    name = parts.name
    if name == CONFTEST:
        return PathKind.CONFTEST
    if runs_at_start(path):
        return PathKind.STARTUP
    if _SHADOWS.match(path):
        return PathKind.SHADOW
    if name in _INI:
        return PathKind.INI
    if _CI.match(path):
        return PathKind.CI
    if _SCRIPT.match(path):
        return PathKind.SCRIPT
    if _REQUIREMENTS.match(path):
        return PathKind.REQUIREMENTS
    in_tests = bool(_TEST_DIRS & {p.lower() for p in parts.parts[:-1]})
    if name.endswith(".py") and (_TEST_FILE.match(name) or in_tests or _within(path, protected)):
        return PathKind.TEST
    if not name.endswith(".py"):
        return PathKind.DATA
    return PathKind.BUILD if name in _BUILD else PathKind.SOURCE


def _within(path: str, protected: Collection[str]) -> bool:
    return any(
        path == p.rstrip("/") or path.startswith(p.rstrip("/") + "/") for p in protected if p
    )
