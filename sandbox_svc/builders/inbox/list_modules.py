"""Lists the modules of an environment and its interpreter: `list_modules.py ENV PROJECT`.

- The top-level ones, and all below those that are named, by their whole names.
- Standard input is a JSON list of the named ones, which may be too many for arguments.
- Standard library only, Python 3.7 and newer; imports nothing of the environment.
- The project itself is left out: its modules are the repository's.
- Standard output is one JSON list of names.
"""

from __future__ import annotations

import json
import os
import re
import sys

MODULE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\.py|(\.[A-Za-z0-9_-]+)*\.so)?")


def module_of(entry: str) -> str:
    """The module that a name in a directory of modules stands for, or an empty string."""
    match = MODULE.fullmatch(entry)
    return match.group(1) if match and match.group(1) != "__pycache__" else ""


def below(file: str) -> set[str]:
    """The whole names of a module inside a package and of the packages around it."""
    *folders, name = file.split("/")
    module = module_of(name) if name.endswith((".py", ".so")) else ""
    if not module or not all(map(str.isidentifier, folders)):
        return set()
    names = {".".join(folders[:end]) for end in range(2, len(folders) + 1)}
    return names if module == "__init__" else names | {".".join([*folders, module])}


def standard() -> set[str]:
    """Modules of the interpreter that runs this."""
    names = set(sys.builtin_module_names) | set(getattr(sys, "stdlib_module_names", ()))
    library = os.path.dirname(os.__file__)
    for folder in (library, os.path.join(library, "lib-dynload")):
        names.update(map(module_of, os.listdir(folder) if os.path.isdir(folder) else ()))
    return names - {"", "site-packages"}


def installed(env: str, project: str, shared: frozenset[str]) -> set[str]:
    """Modules that the records of installed distributions name."""
    names: set[str] = set()
    library = os.path.join(env, "lib")
    folders = [os.path.join(library, n, "site-packages") for n in os.listdir(library)]
    for folder in filter(os.path.isdir, folders):
        for entry in os.listdir(folder):
            name = entry.partition("-")[0]
            if entry.endswith(".dist-info") and re.sub(r"[-_.]+", "-", name).lower() != project:
                names.update(recorded(os.path.join(folder, entry, "RECORD"), shared))
    return names


def recorded(path: str, shared: frozenset[str]) -> set[str]:
    """Top-level modules of the files that a RECORD lists, and those below the shared ones."""
    try:
        with open(path, encoding="utf-8", errors="replace") as source:
            files = [line.split(",")[0].strip('"') for line in source]
    except OSError:
        return set()
    modules = set()
    for file in files:
        first, slash, _ = file.partition("/")
        if slash or first.endswith((".py", ".so")):
            modules.add(module_of(first))
        if slash and first in shared:
            modules.update(below(file))
    return modules - {""}


if __name__ == "__main__":
    env, project = sys.argv[1:]
    found = standard() | installed(env, project, frozenset(json.load(sys.stdin)))
    sys.stdout.write(json.dumps(sorted(found)))
