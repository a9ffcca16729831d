"""What of a State's tests its untouched run did not see, from the text of its repository.

- Where pytest has not collected all, settings tell which files are tests, and where plugins and
  modules lie.
- Of a file or folder that could not be collected it is told which tests have to be there once it
  is: what the source exports could empty it otherwise.
"""

import fnmatch
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from regreen.rpc.errors import InfraError
from regreen.testpaths import CONFTEST
from sandbox_svc.backends.base import Box, Command
from sandbox_svc.builders.base import ENV, REPO, TOOLS
from sandbox_svc.builders.declared import Declared, declared
from sandbox_svc.builders.modules import SOURCE_FOLDERS
from sandbox_svc.builders.protect import by_name, words_of
from sandbox_svc.builders.standing import Where, file_of, inside

_BY_NAME = ("-k", "-m")
_BY_PATH = ("--deselect", "--ignore", "--ignore-glob")
"""Options that leave tests out; their value may be a word of its own."""
_DEEP = 8
"""Plugins that load plugins, one after the other."""
_LISTING_BYTES = 64 << 20
_SHOWN_CHARS = 300

Text = Mapping[str, Any]
"""Of one file, as `inbox/read_tests.py` reads it."""


async def completed(
    box: Box, facts: Mapping[str, Any], where: Where, errors: Iterable[str], files: Sequence[str]
) -> tuple[Where, dict[str, Any]]:
    """Where a State's tests come from, and more facts.

    `errors` are the ids that could not be collected, `files` those of the repository that could be
    imported, `box` one in which nothing has run.

    Raises:
        InfraError: the files cannot be read.
    """
    test = facts["spec"]["test"]
    words = words_of(test["arguments"], test["environment"])
    settings = declared(facts["settings"], words)
    seen = {path for path in map(inside, where.files) if path}
    errors, start = frozenset(errors), inside(where.rootdir) or ""
    unseen = not where.whole or bool({_below(start, file_of(e)) for e in errors} - seen)
    if unseen or errors:
        failing = {_below(start, file_of(e)) for e in errors} & {*files}
        where = await _by_text(box, settings, where, files, failing, test["environment"])
    modules = errors | {id for id in test["fail_to_pass"] if "::" not in id}
    expected = await _expected(box, settings, where, modules, files, words)
    return where, {"expected": expected, "notes": _notes(settings, whole=not unseen)}


def _below(folder: str, path: str) -> str:
    return f"{folder}/{path}" if folder else path


def _notes(settings: Declared, *, whole: bool) -> list[str]:
    notes = [
        f"addopts of {path} are not used ({options[:_SHOWN_CHARS]}); give what the tests need in "
        "test.arguments"
        for path, options in sorted(settings.addopts.items())
    ]
    if not whole:
        notes.append(
            "not all could be collected; which files are tests, plugins and places of modules was "
            "read from settings: name others in test.protected_paths"
        )
    return notes


async def _by_text(
    box: Box,
    settings: Declared,
    where: Where,
    files: Sequence[str],
    failing: Collection[str],
    environment: Mapping[str, str],
) -> Where:
    unsure = [path for path in files if path.endswith(".py") and settings.may_match(path)]
    configuration = [path for path in files if path.rpartition("/")[2] == CONFTEST]
    texts = dict(await _read(box, {*unsure, *configuration, *failing}))
    tests = [path for path in files if settings.matches(path)]
    tests += [path for path in unsure if texts[path]["tests"]]
    places = {*settings.places, *environment.get("PYTHONPATH", "").split(":")}
    places = {place for place in places if place}
    around, held = ("", *SOURCE_FOLDERS, *places), frozenset(files)
    named = {*settings.plugins, *environment.get("PYTEST_PLUGINS", "").split(",")}
    named |= {name for path in (*configuration, *failing) for name in _plugins(texts, path)}
    plugins: set[str] = set()
    for _ in range(_DEEP):
        fresh = {p for name in named for p in _files_of(name.strip(), around, held)} - plugins
        if not fresh:
            break
        plugins |= fresh
        texts |= await _read(box, fresh)
        named = {name for path in fresh for name in _plugins(texts, path)}
    return replace(
        where,
        files=_joined(where.files, tests),
        roots=_joined(where.roots, settings.roots),
        places=_joined(where.places, places),
        plugins=_joined(where.plugins, plugins),
    )


def _plugins(texts: Mapping[str, Text], path: str) -> Sequence[str]:
    found: Sequence[str] = texts[path]["plugins"] if path in texts else ()
    return found


def _joined(told: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    paths = (path if path.startswith("/") else f"{REPO}/{path}" for path in more)
    return tuple(sorted({*told, *paths}))


def _files_of(module: str, places: Iterable[str], held: frozenset[str]) -> Iterable[str]:
    """Files of the repository that a module with such a name could be."""
    for place in places:
        start = f"{place}/{module.replace('.', '/')}" if place else module.replace(".", "/")
        yield from {f"{start}.py", f"{start}/__init__.py"} & held


async def _expected(
    box: Box,
    settings: Declared,
    where: Where,
    modules: frozenset[str],
    files: Sequence[str],
    words: Sequence[str],
) -> dict[str, list[str]]:
    """By what is required as a whole, a file, folder or class: ids that are in it for certain."""
    if any(word.startswith(_BY_NAME) for word in words):
        return {}
    start = inside(where.rootdir) or ""
    told = frozenset(path for path in map(inside, where.files) if path)
    configuration = {path for path in files if path.rpartition("/")[2] == CONFTEST}
    tests = {path for path in files if path in told or by_name(path, ()) == "test"}
    found: dict[str, list[str]] = {}
    for module in modules:
        path = _below(start, file_of(module))
        below = () if path.endswith(".py") else (p for p in tests if p.startswith(f"{path}/"))
        found[module] = [path] if path in tests else sorted(below)
    texts = await _read(box, {*configuration, *(path for some in found.values() for path in some)})
    choosing = [p.rpartition("/")[0] for p in configuration if p in texts and texts[p]["chooses"]]
    left_out = [_below(start, value) for value in _values(words)]
    expected: dict[str, list[str]] = {}
    for module, some in found.items():
        group = module.partition("::")[2]
        ids = expected[module] = []
        for path in some:
            if path not in texts or any(_is_in(path, folder) for folder in choosing):
                continue
            names = [n for n in texts[path]["tests"] if settings.calls_test(n)]
            for name in names:
                id = f"{path}::{name}"
                if name.startswith(f"{group}::" if group else "") and not _is_out(id, left_out):
                    ids.append(id[len(start) + 1 :] if start else id)
    return expected


def _is_in(path: str, folder: str) -> bool:
    return not folder or path.startswith(folder + "/")


def _values(words: Sequence[str]) -> Iterable[str]:
    """What arguments leave out by its path."""
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option in _BY_PATH:
            yield (value if equals else following).removeprefix("./").rstrip("/")


def _is_out(id: str, left_out: Iterable[str]) -> bool:
    path = id.partition("::")[0]
    return any(
        id.startswith(one) or fnmatch.fnmatch(path, one) or fnmatch.fnmatch(f"{REPO}/{path}", one)
        for one in left_out
    )


async def _read(box: Box, paths: Iterable[str]) -> Mapping[str, Text]:
    """What files say, by path."""
    wanted = sorted(path for path in paths if path.endswith(".py"))
    if not wanted:
        return {}
    done = await box.run(
        Command(
            (f"{ENV}/bin/python", "-I", "-S", f"{TOOLS}/lib/read_tests.py"),
            cwd=REPO,
            stdin=json.dumps(wanted).encode(),
            output_bytes=_LISTING_BYTES,
        )
    )
    if not done.ok or done.stdout.truncated:
        raise InfraError(f"files of tests cannot be read: {done.stderr.text[-500:]}")
    try:
        found: Mapping[str, Text] = json.loads(done.stdout.text)
    except ValueError:
        raise InfraError("files of tests cannot be read: no answer") from None
    return found
