"""The process of `regreen.rules.apart`: texts and rules in, texts out, as JSON.

- It bounds itself before it reads anything.
"""

import json
import resource
import sys

import libcst as cst

from regreen.rules.library import BY_NAME

MEMORY_BYTES = 2 << 30
CPU_S = 100


def applied(text: str, names: list[str]) -> tuple[str, list[str]]:
    """A text as these rules leave it, and those that changed it."""
    changed = []
    for name in names:
        new = BY_NAME[name].apply(text)
        if new != text:
            text = new
            changed.append(name)
    return text, changed


def main() -> None:
    """Answer one request."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found = {}
    for path, (text, names) in json.load(sys.stdin).items():
        try:
            found[path] = applied(text, names)
        except (cst.ParserSyntaxError, RecursionError, MemoryError):
            continue
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
