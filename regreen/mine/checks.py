"""Checks of our own that run beside a project's tests: does it resolve, does it build.

- A check is a test file below `FOLDER`, which no build and no search for packages looks at; its
  path is among the task's test arguments, so that a diff cannot change it.
- Its text is in the record: a later Regreen changes no task that there is.
- It runs in the sandbox, without a network, with the releases and build tools that the State
  offers.
"""

import re
from collections.abc import Sequence
from importlib import resources

from regreen.tasks.model import Added

FOLDER = ".regreen/checks"


def requirements_check(names: Sequence[str]) -> Added:
    """The lock is a resolution of the declared requirements, of which these are some."""
    return _check("test_regreen_requirements.py", r"^NAMES = .*$", f"NAMES = {sorted(names)!r}")


def build_check(name: str, version: str, modules: Sequence[str], tests: Sequence[str]) -> Added:
    """The project can be built, installed and used installed."""
    facts = (name, version, sorted(modules), list(tests))
    text = f"NAME, VERSION, MODULES, TESTS = {', '.join(map(repr, facts))}"
    return _check("test_regreen_build.py", r"^NAME, VERSION, .*$", text)


def _check(filename: str, line: str, text: str) -> Added:
    source = (
        resources.files("regreen.mine").joinpath(f"data/checks/{filename}.txt").read_text("utf-8")
    )
    content = re.sub(line, lambda _: text, source, count=1, flags=re.MULTILINE)
    return Added(path=f"{FOLDER}/{filename}", content=content)
