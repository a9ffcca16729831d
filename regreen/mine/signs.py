"""Releases that broke builds and test runs of others, and what gives them away unread.

- A table of facts, each with the release notes that say so; `good` is the release before `bad`.
- A sign is text in a file that a build reads. It only says where to look: what breaks is run.
- A mend is a mechanical edit that the release notes ask for; it is a fix only once seen to work.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from regreen.tasks.model import Edit


@dataclass(frozen=True, slots=True)
class BuildBreak:
    """A release of a build tool after which some projects cannot be built."""

    tool: str
    good: str
    bad: str
    sign: re.Pattern[str]
    files: tuple[str, ...]
    mends: tuple[tuple[re.Pattern[str], str], ...]
    note: str
    changelog: str


@dataclass(frozen=True, slots=True)
class RunnerBreak:
    """A release of a test runner, or of a plugin, that makes configurations errors."""

    runner: str
    version: str
    day: date
    note: str
    changelog: str


def _re(text: str) -> re.Pattern[str]:
    return re.compile(text, re.MULTILINE)


_SETUPTOOLS = "https://setuptools.pypa.io/en/stable/history.html"
_PYTEST = "https://docs.pytest.org/en/stable/changelog.html"
_DASHED = r"^(author|maintainer|description|license|long|home|download|url|project)-([a-z]+)"
BUILD_BREAKS = (
    BuildBreak(
        tool="setuptools", good="77.0.3", bad="78.0.1",
        sign=_re(r"^(?:author|maintainer|description|license|long|home|download)-[a-z-]+ *[=:]"),
        files=("setup.cfg",),
        mends=((_re(_DASHED + r"-([a-z]+)-([a-z]+)(?= *[=:])"), r"\1_\2_\3_\4"),
               (_re(_DASHED + r"-([a-z]+)(?= *[=:])"), r"\1_\2_\3"),
               (_re(_DASHED + r"(?= *[=:])"), r"\1_\2")),
        note="keys of setup.cfg with a dash or a capital letter are errors",
        changelog=f"{_SETUPTOOLS}#v78-0-1",
    ),
    BuildBreak(
        tool="setuptools", good="81.0.0", bad="82.0.0",
        sign=_re(r"^\s*(?:import pkg_resources|from pkg_resources import)"),
        files=("setup.py",),
        mends=((_re(r"^import pkg_resources *$(?![\s\S]*pkg_resources)"), ""),),
        note="pkg_resources is gone",
        changelog=f"{_SETUPTOOLS}#v82-0-0",
    ),
    BuildBreak(
        tool="setuptools", good="57.5.0", bad="58.0.2",
        sign=_re(r"use_2to3"), files=("setup.py",),
        mends=((_re(r"^( *)use_2to3 *= *True *,?[ \t]*$"), r"\1"),
               (_re(r"\buse_2to3 *= *(?:True|PY3|[\w.]+) *,"), "")),
        note="2to3 conversion while building is gone",
        changelog=f"{_SETUPTOOLS}#v58-0-0",
    ),
    BuildBreak(
        tool="setuptools", good="65.7.0", bad="66.0.0",
        sign=_re(r"^Version: (?!v?\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?"
                 r"(?:\.post\d+)?(?:\.dev\d+)?\s*$).+"),
        files=("PKG-INFO",), mends=(),
        note="versions that PEP 440 does not know are errors",
        changelog=f"{_SETUPTOOLS}#v66-0-0",
    ),
)  # fmt: skip
RUNNER_BREAKS = (
    RunnerBreak("pytest", "7.2.0", date(2022, 10, 23), "nose-style setup warns; py is gone",
                f"{_PYTEST}#pytest-7-2-0-2022-10-23"),
    RunnerBreak("pytest", "8.0.0", date(2024, 1, 27), "nose support and py.path hooks are gone",
                f"{_PYTEST}#pytest-8-0-0-2024-01-27"),
    RunnerBreak("pytest", "9.0.0", date(2025, 11, 8), "deprecations of pytest 8 are errors",
                f"{_PYTEST}#pytest-9-0-0-2025-11-05"),
    RunnerBreak("pytest-asyncio", "1.0.0", date(2025, 5, 26), "the event_loop fixture is gone",
                "https://pytest-asyncio.readthedocs.io/en/stable/reference/changelog.html"),
)  # fmt: skip
"""Days before `culprits.EARLIEST` are moved there, as everywhere in the miner."""


def signed(texts: Mapping[str, str]) -> list[BuildBreak]:
    """The breaks of which a source archive bears a sign."""
    return [
        one
        for one in BUILD_BREAKS
        if any(one.sign.search(texts.get(path, "")) for path in one.files)
    ]


def mended(one: BuildBreak, texts: Mapping[str, str]) -> list[Edit]:
    """The edits that the release notes ask for."""
    edits: list[Edit] = []
    for path in one.files:
        text = texts.get(path, "")
        for pattern, new in one.mends:
            while match := pattern.search(text):
                line = _line(text, match.start())
                changed = pattern.sub(new, line)
                if not line or changed == line:
                    break
                edits.append(Edit(path=path, old=line, new=changed, count=text.count(line)))
                text = text.replace(line, changed)
    return edits


def _line(text: str, at: int) -> str:
    """The whole line around a place, so that an edit fits there only."""
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    return text[start : end if end >= 0 else len(text)]
