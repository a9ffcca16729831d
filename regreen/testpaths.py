"""Files that a test run takes up by their name alone; left out by the validator, seen by the judge.

- Python, its package metadata and pytest look for them; no line of a diff has to mention them.
- Names are compared in one case and one Unicode form: that is what readers of metadata do, and
  what no reader takes is no loss.
"""

import re
import unicodedata

CONFTEST = "conftest.py"
PYTEST_INI = frozenset({"pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml"})
"""Read by pytest alone, whatever is in them."""
SHARED_INI = frozenset({"pyproject.toml", "setup.cfg", "tox.ini"})
"""Read by pytest and by builds."""
_START_MODULES = frozenset({"sitecustomize", "usercustomize"})
_START_FILES = ("pyvenv.cfg", ".pth", "._pth", ".start")
_CODE = (".py", ".pyw", ".pyc", ".pyo", ".so", ".pyd")
_METADATA = (".egg-info", ".dist-info", ".egg-link", ".egg")
_SECTIONS = frozenset({"pytest", "tool:pytest"})
_EQUALS = re.compile(r"[=:]")


def folded(name: str) -> str:
    """A name as the loosest of its readers compares it."""
    return unicodedata.normalize("NFKC", name).casefold()


def runs_at_start(path: str) -> bool:
    """Whether Python may run a file before the program that it was started for."""
    *folders, name = (folded(part) for part in path.split("/"))
    module = name.partition(".")[0] in _START_MODULES and name.endswith(_CODE)
    return module or name.endswith(_START_FILES) or not _START_MODULES.isdisjoint(folders)


def is_metadata(path: str) -> bool:
    """Whether a file may tell of an installed package, and so register a plugin of pytest."""
    parts = [folded(part) for part in path.split("/")]
    return "egg-info" in parts or any(part.endswith(_METADATA) for part in parts)


def pytest_part(text: str) -> list[list[tuple[str, list[str]]]]:
    """The sections of an INI file that pytest takes for its own, once for each way to end lines.

    Its parser ends them where others do not, at a form feed for example; before its version 2 it
    did not. A header has no comment behind its bracket and no blanks inside: with them it is
    another section, which is told as well, since older parsers may not agree.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found = [_sections(lines) for lines in (text.splitlines(), text.split("\n"))]
    return found if any(found) else []


def _option(line: str) -> str:
    """A name and its value, with one sign between them and no blanks around that."""
    name, *value = _EQUALS.split(line.strip(), maxsplit=1)
    return "=".join((name.rstrip(), *(part.lstrip() for part in value)))


def _sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in lines:
        head = re.split(r"[#;]", line)[0].rstrip() if line.startswith("[") else ""
        if head.endswith("]"):
            name = head[1:-1]
            inside = name.strip() in _SECTIONS
            if inside:
                found.append((name, []))
        elif inside and line.strip() and line.lstrip()[0] not in "#;":
            goes_on = line[0].isspace() or line[0] == "["
            found[-1][1].append(" " + line.strip() if goes_on else _option(line))
    return found
