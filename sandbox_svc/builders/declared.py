"""What settings say of a State's tests by their text, where no run of them can tell.

- Needed where pytest ends before it has collected all: its `conftest.py` or a plugin cannot be
  imported.
- Every settings file counts that pytest might take for the arguments: that protects more, not less.
- Names are those of pytest's reference: https://docs.pytest.org/en/stable/reference/reference.html
"""

import fnmatch
import json
import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from sandbox_svc.builders.base import REPO
from sandbox_svc.builders.modules import folders_of

_PLUGIN = "-p"
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True, slots=True)
class Declared:
    """pytest's settings of a repository; paths are relative to it."""

    patterns: tuple[str, ...] = ()
    """Of files of tests, beside the usual ones."""
    roots: tuple[str, ...] = ()
    """Where they lie."""
    places: tuple[str, ...] = ()
    """Where modules are looked for."""
    plugins: tuple[str, ...] = ()
    """Modules that are loaded by name."""
    addopts: Mapping[str, str] = field(default_factory=dict)
    """By settings file."""
    usual: bool = True
    """Whether tests have the usual names inside their files."""

    def matches(self, path: str) -> bool:
        """Whether a pattern calls a file one of tests; one without a letter calls nothing so."""
        return any(_match(path, pattern) for pattern in self.patterns if _telling(pattern))

    def may_match(self, path: str) -> bool:
        """Whether one does that fits any file of Python, so that its text has to tell."""
        inside = not self.roots or any(path.startswith(root + "/") for root in self.roots)
        return inside and any(_match(path, p) for p in self.patterns if not _telling(p))


def declared(settings: Mapping[str, str], words: Iterable[str]) -> Declared:
    """What settings files, as `protect.pytest_settings` reads them, and arguments declare."""
    words = tuple(words)
    named = [
        _at("", word.partition("::")[0])
        for before, word in zip(("", *words), words, strict=False)
        if not word.startswith("-") and before != _PLUGIN
    ]
    above = {"", *named, *(folder for path in named for folder in folders_of(path))}
    found: dict[str, list[str]] = {"python_files": [], "testpaths": [], "pythonpath": []}
    addopts, usual = {}, True
    for path, text in sorted(settings.items()):
        folder = path.rpartition("/")[0]
        if not text or (folder not in above and path not in words):
            continue
        options = _options(text)
        found["python_files"] += _words(options.get("python_files"))
        for name in ("testpaths", "pythonpath"):
            found[name] += [_at(folder, word) for word in _words(options.get(name))]
        if more := _words(options.get("addopts")):
            addopts[path] = shlex.join(more)
        usual = usual and options.keys().isdisjoint(("python_functions", "python_classes"))
    folders = [path for path in (*named, *found["testpaths"]) if not path.endswith(".py")]
    return Declared(
        tuple(found["python_files"]),
        tuple(path for path in folders if path not in ("", ".")),
        tuple(found["pythonpath"]),
        tuple(_plugins(words)),
        addopts,
        usual,
    )


def _plugins(words: tuple[str, ...]) -> Iterable[str]:
    """Modules that arguments load, `-p NAME` or `-pNAME`; `no:NAME` takes one away."""
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        name = following if word == _PLUGIN else word[2:] if word.startswith(_PLUGIN) else ""
        if name and not name.startswith("no:"):
            yield name


def _options(text: str) -> Mapping[str, Any]:
    """The options in pytest's part of one settings file."""
    try:
        found = json.loads(text)
    except ValueError:  # unreadable: pytest cannot read it either
        return {}
    if isinstance(found, dict):
        older = found.get("ini_options")
        return {**found, **(older if isinstance(older, dict) else {})}
    options: dict[str, str] = {}
    try:
        sections = [lines for way in found for _, lines in way]
    except (TypeError, ValueError):  # a table of that name that is none of pytest's
        return {}
    for lines in sections:
        name = ""
        for line in lines:
            if not line.startswith(" "):
                name, _, value = line.partition("=")
                name = name.strip()
                options[name] = value
            elif name:
                options[name] += line
    return options


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(word) for word in value]
    text = value if isinstance(value, str) else ""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _at(folder: str, path: str) -> str:
    """A path that is named in a folder of the repository; "." outside of it and for itself."""
    if path.startswith("/"):
        inside = f"{path}/".startswith(f"{REPO}/")
        folder, path = "", f"{path}/"[len(REPO) + 1 :] if inside else ""
    plain = posixpath.normpath(posixpath.join(folder, path))
    return "." if plain == ".." or plain.startswith("../") else plain


def _telling(pattern: str) -> bool:
    return bool(_LETTER.search(pattern.removesuffix(".py")))


def _match(path: str, pattern: str) -> bool:
    if "/" in pattern:
        return fnmatch.fnmatch(f"/{path}", pattern if pattern[:1] == "/" else f"*/{pattern}")
    return fnmatch.fnmatch(path.rpartition("/")[2], pattern)
