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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import filterfalse, zip_longest
from typing import Any

from sandbox_svc.builders.base import REPO
from sandbox_svc.builders.modules import folders_of
from sandbox_svc.builders.protect import paths_of

_PLUGIN = "-p"
_KINDS = ("functions", "classes")
_MOST_PATTERNS = 200
_NEVER = r"(?!)"
_WORDS_CHARS = 64 << 10
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True, slots=True)
class Declared:
    """pytest's settings of a repository; paths are relative to it."""

    patterns: tuple[str, ...] = ()
    """Of files of tests, beside the usual ones."""
    roots: tuple[str, ...] = ()
    """Where they lie; empty where anywhere, or where files alone are named."""
    everywhere: bool = True
    """Whether neither arguments nor settings say where they lie."""
    places: tuple[str, ...] = ()
    """Where modules are looked for."""
    plugins: tuple[str, ...] = ()
    """Modules that are loaded by name."""
    addopts: Mapping[str, str] = field(default_factory=dict)
    """By settings file."""
    names: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    """How each settings file wants functions and classes of tests to be called, if it says so."""

    def matches(self, path: str) -> bool:
        """Whether a pattern calls a file one of tests; one without a letter calls nothing so."""
        return self._inside(path) and _fits(path, tuple(filter(_telling, self.patterns)))

    def may_match(self, path: str) -> bool:
        """Whether one does that fits any file of Python, so that its text has to tell."""
        return self._inside(path) and _fits(path, tuple(filterfalse(_telling, self.patterns)))

    def _inside(self, path: str) -> bool:
        return self.everywhere or any(path.startswith(root + "/") for root in self.roots)

    def calls_test(self, name: str) -> bool:
        """Whether `name` or `Class::name`, called as usual, is a test by all settings too."""
        group, _, function = name.rpartition("::")
        return all(
            _is_called(function, functions) and (not group or _is_called(group, classes))
            for functions, classes in self.names
        )


def declared(settings: Mapping[str, str], words: Sequence[str]) -> Declared:
    """What settings files, as `protect.pytest_settings` reads them, and arguments declare."""
    named = [_at("", path.partition("::")[0]) for path in paths_of(words)]
    above = {"", *named, *(folder for path in named for folder in folders_of(path))}
    found: dict[str, list[str]] = {"python_files": [], "testpaths": [], "pythonpath": []}
    addopts, names = {}, []
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
        functions, classes = (_words(options.get(f"python_{kind}")) for kind in _KINDS)
        if functions or classes:
            names.append((tuple(functions or ["test"]), tuple(classes or ["Test"])))
    paths = (*named, *found["testpaths"])
    return Declared(
        tuple(found["python_files"][:_MOST_PATTERNS]),
        tuple(path for path in paths if path != "." and not path.endswith(".py")),
        not paths or "." in paths,
        tuple(found["pythonpath"]),
        tuple(_plugins(words)),
        addopts,
        tuple(names),
    )


def _plugins(words: Sequence[str]) -> Iterable[str]:
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
    options: dict[str, list[str]] = {}
    try:
        lines = [str(line) for way in found for _, section in way for line in section]
    except (TypeError, ValueError):  # a table of that name that is none of pytest's
        return {}
    name = ""
    for line in lines:
        if not line.startswith(" "):
            name, _, value = line.partition("=")
            options[name] = [value]
        elif name:
            options[name].append(line)
    return {name: "".join(parts) for name, parts in options.items()}


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(word) for word in value]
    text = value if isinstance(value, str) else ""
    try:
        return shlex.split(text) if len(text) <= _WORDS_CHARS else text.split()
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


def _fits(path: str, patterns: tuple[str, ...]) -> bool:
    """As pytest compares them: with a slash against the whole path, without against the name."""
    names, paths = _compiled(patterns)
    return bool(names.match(path.rpartition("/")[2]) or paths.match(f"/{path}"))


@lru_cache(maxsize=16)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    paths = [p if p[:1] == "/" else f"*/{p}" for p in patterns if "/" in p]
    kinds = ([p for p in patterns if "/" not in p], paths)
    names, paths_ = ("|".join(map(fnmatch.translate, some)) or _NEVER for some in kinds)
    return re.compile(names), re.compile(paths_)


def _is_called(name: str, patterns: Iterable[str]) -> bool:
    return any(name.startswith(p) or fnmatch.fnmatchcase(name, p) for p in patterns)
