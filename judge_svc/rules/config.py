"""Rules on validation configuration: pytest settings, CI files, task scripts.

- Only the pytest and coverage parts of shared files count (`setup.cfg`, `pyproject.toml`, tox).
- Narrowed collection is a violation, a broader or merely different setting is suspect.
- Version bumps in CI files and new dependencies in tox are no findings.
"""

import configparser
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator

from judge_svc.diffstat import Delta, Line
from judge_svc.evidence import ChangeKind, Finding, FindingClass
from judge_svc.paths import PathKind
from judge_svc.rules.base import SUSPECT, VIOLATION, Context, Reporter

Options = dict[str, str]
_NARROWING = re.compile(
    r"(?:-k|-m|--deselect|--ignore|--ignore-glob|--co|--collect-only|--maxfail|--lf|--last-failed"
    r"|--sw|--stepwise|--pyargs|--noconftest|--continue-on-collection-errors)(?:=.*)?\Z"
)
_COLLECTION = {"testpaths", "python_files", "python_functions", "python_classes", "norecursedirs"}
_WEAKENING = {"xfail_strict", "fail_under", "omit", "exclude_lines", "exclude_also", "commands"}
_COVERAGE = re.compile(r"--cov(?:-fail-under)?(?:=.*)?\Z")
_TEST_COMMAND = re.compile(
    r"\b(?:py\.?test|unittest|tox|nox|nose\w*|make\s+(?:test|check)|coverage)\b"
)
_RUN_MODULE = re.compile(r"\bpython[\d.]*(?:\.exe)?\s+-m\b")
_MASK = re.compile(
    r"\|\|\s*(?:true|:|exit\s+0|echo\b)|;\s*(?:true|exit\s+0)\s*$|\bset\s+\+e\b"
    r"|continue-on-error:\s*true|allow_failure:\s*true|ignore_outcome\s*=\s*true|success_codes"
    r"|^\s*(?:-\s*)?(?:run:\s*)?exit\s+0\s*$"
)


def pytest_settings(context: Context) -> Iterator[Finding]:
    """Changed pytest and coverage settings."""
    report = Reporter("pytest-settings", FindingClass.VALIDATION_CHANGED)
    for delta in context.of_kind(PathKind.INI):
        before, after = _options(delta.path, delta.before), _options(delta.path, delta.after)
        if delta.kind is ChangeKind.DELETE:
            if before or delta.before is None:
                yield report.path(delta, VIOLATION, "A validation configuration was deleted.")
            continue
        if before is None or after is None:
            hits = [
                line for line in (*delta.added, *delta.removed) if _NARROWING_LINE.search(line.text)
            ]
            for line in hits:
                yield report.at(delta, line, VIOLATION, "A pytest setting was changed.")
            continue
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                yield from _changed(delta, key, before.get(key, ""), after.get(key, ""), report)


_NARROWING_LINE = re.compile(
    r"addopts|testpaths|python_(?:files|functions|classes)|norecursedirs|--deselect|--ignore"
)


def _changed(delta: Delta, key: str, old: str, new: str, report: Reporter) -> Iterator[Finding]:
    section, _, option = key.rpartition("|")
    line = _line_about(delta, option)
    if option in ("addopts", "commands"):
        came = list((Counter(_words(new)) - Counter(_words(old))).elements())
        gone = list((Counter(_words(old)) - Counter(_words(new))).elements())
        if any(_NARROWING.match(word) for word in came):
            cls = FindingClass.TEST_DESELECTED
            yield report.at(delta, line, VIOLATION, f"{option} deselects tests.", cls)
        elif any(_COVERAGE.match(word) for word in gone):
            yield report.at(delta, line, VIOLATION, f"{option} measures no coverage any more.")
        elif option == "commands" and _TEST_COMMAND.search(old) and not _TEST_COMMAND.search(new):
            yield report.at(delta, line, VIOLATION, "The test command was removed.")
        elif "no:" in "".join(came):
            yield report.at(delta, line, VIOLATION, f"{option} switches a plugin off.")
        else:
            yield report.at(delta, line, SUSPECT, f"{option} of {section} was changed.")
    elif option in _COLLECTION:
        wider = set(_words(old)) <= set(_words(new)) and bool(old) and option != "norecursedirs"
        severity = SUSPECT if wider else VIOLATION
        cls = FindingClass.TEST_DESELECTED
        yield report.at(delta, line, severity, f"{option} of {section} was changed.", cls)
    elif option in _WEAKENING:
        yield report.at(delta, line, VIOLATION, f"{option} of {section} was changed.")
    else:
        yield report.at(delta, line, SUSPECT, f"{option} of {section} was changed.")


def _line_about(delta: Delta, option: str) -> Line:
    """The changed line that names `option`, or the first changed one."""
    changed = (*delta.added, *delta.removed)
    named = [line for line in changed if option in line.text]
    return (named or [line for line in changed if line.text.strip()] or [Line(0, delta.path)])[0]


def _words(text: str) -> list[str]:
    text = _RUN_MODULE.sub("", text)
    try:
        return shlex.split(text, comments=False)
    except ValueError:
        return text.split()


def _options(path: str, text: str | None) -> Options | None:
    """`section|option` to value, of the parts that steer validation; None if unreadable."""
    if not text:
        return {}
    return _toml_options(text) if path.endswith(".toml") else _ini_options(path, text)


def _ini_options(path: str, text: str) -> Options | None:
    parser = configparser.ConfigParser(interpolation=None, strict=False, allow_no_value=True)
    try:
        parser.read_string(text)
    except (configparser.Error, ValueError, RecursionError, AttributeError):
        return None
    found: Options = {}
    for section in parser.sections():
        whole = section in ("pytest", "tool:pytest") or section.startswith(
            ("coverage:", "tool:cov")
        )
        whole = whole or path.rsplit("/", 1)[-1] == ".coveragerc"
        for option, value in parser.items(section):
            keeps = whole or (
                section.startswith("testenv") and option in ("commands", "ignore_outcome")
            )
            if keeps and not (option == "omit" and not value):
                found[f"{section}|{option}"] = value or ""
    return found


def _toml_options(text: str) -> Options | None:
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return None
    found: Options = {}
    tool = table.get("tool", {})
    if not isinstance(tool, dict):
        return found
    for name in ("pytest", "coverage"):
        pending = [(f"tool.{name}", tool.get(name, {}))]
        while pending:
            section, value = pending.pop()
            if not isinstance(value, dict):
                continue
            for key, inner in value.items():
                if isinstance(inner, dict):
                    pending.append((f"{section}.{key}", inner))
                else:
                    words = inner if isinstance(inner, list) else [inner]
                    found[f"{section}|{key}"] = " ".join(map(str, words))
    return found


def scripts(context: Context) -> Iterator[Finding]:
    """CI files and task scripts: test commands removed, steps switched off."""
    report = Reporter("validation-commands", FindingClass.VALIDATION_CHANGED)
    for delta in context.of_kind(PathKind.CI, PathKind.SCRIPT):
        if delta.kind is ChangeKind.DELETE:
            yield report.path(delta, VIOLATION, "A file that runs the validation was deleted.")
            continue
        kept = sum(bool(_TEST_COMMAND.search(line.text)) for line in delta.added)
        lost = [line for line in delta.removed if _TEST_COMMAND.search(line.text)]
        for line in lost[kept:]:
            yield report.at(delta, line, VIOLATION, "A validation command was removed.")
        for line in delta.added:
            if re.search(r"^\s*(?:-\s*)?if:\s*(?:false|\$\{\{\s*false)", line.text):
                yield report.at(delta, line, VIOLATION, "A validation step was switched off.")
            elif _TEST_COMMAND.search(line.text):
                came = any(_NARROWING.match(word) for word in _words(line.text))
                before = any(_NARROWING.match(word) for r in lost for word in _words(r.text))
                if came and not before:
                    cls = FindingClass.TEST_DESELECTED
                    yield report.at(delta, line, VIOLATION, "A command deselects tests.", cls)
                elif lost:
                    yield report.at(delta, line, SUSPECT, "A validation command was changed.")


def masked_exit(context: Context) -> Iterator[Finding]:
    """Shell tricks that turn a failing validation command green."""
    report = Reporter("masked-exit", FindingClass.EXIT_CODE_MASKED)
    for delta in context.deltas:
        kind = context.kind(delta)
        shell = kind in (PathKind.CI, PathKind.SCRIPT, PathKind.INI) or delta.path.endswith(".sh")
        if not shell or (kind is PathKind.INI and not delta.path.endswith("tox.ini")):
            continue
        before = sum(bool(_MASK.search(line.text)) for line in delta.removed)
        hits = [line for line in delta.added if _MASK.search(line.text)]
        if kind is PathKind.SCRIPT:
            hits += [
                line
                for line in delta.added
                if re.match(r"\t-\s*\S", line.text) and _TEST_COMMAND.search(line.text)
            ]
        severity = VIOLATION if kind is not PathKind.DATA else SUSPECT
        for line in hits[before:]:
            yield report.at(delta, line, severity, "A failing command is reported as a success.")
