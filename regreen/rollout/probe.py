"""Runs inside a sandbox: what a developer can see about an environment, as JSON on stdout.

- Standard library only, Python 3.7 and later, no import of anything installed.
- Reads metadata files; executes nothing of the task.
"""

from __future__ import annotations  # sandboxes may run Python 3.7

import glob
import json
import os
import re
import sys

REPO, SITE = "/work/repo", "/work/env/lib/python*/site-packages"


def read(path: str) -> str:
    """Text of a file; empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""


def normalize(name: str) -> str:
    """PEP 503 normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def field(metadata: str, name: str) -> list[str]:
    """All values of a header field of a METADATA or PKG-INFO text."""
    head = metadata.partition("\n\n")[0]
    return [line.partition(":")[2].strip() for line in head.splitlines() if line.startswith(name)]


def requires(package: str, metadatas: dict[str, str]) -> list[str]:
    """Declared dependencies: from the metadata installed, from PKG-INFO, or from requires.txt."""
    for text in [metadatas.get(normalize(package), ""), read(os.path.join(REPO, "PKG-INFO"))]:
        found = [value for value in field(text, "Requires-Dist:") if "extra ==" not in value]
        if found:
            return found
    pattern = os.path.join(REPO, "**", "*.egg-info", "requires.txt")
    for path in glob.glob(pattern, recursive=True):
        plain = read(path).partition("[")[0]
        return [line.strip() for line in plain.splitlines() if line.strip()]
    return []


def main() -> None:
    """Print the facts."""
    modules: dict[str, str] = {}
    metadatas: dict[str, str] = {}
    for info in glob.glob(os.path.join(SITE, "*.dist-info")):
        metadata = read(os.path.join(info, "METADATA"))
        name = normalize((field(metadata, "Name:") or [""])[0])
        metadatas[name] = metadata
        tops = read(os.path.join(info, "top_level.txt")).split()
        if not tops:
            paths = [
                line.partition(",")[0] for line in read(os.path.join(info, "RECORD")).splitlines()
            ]
            tops = sorted({p.partition("/")[0] for p in paths if p.endswith((".py", ".so"))})
        for top in tops:
            top = top.partition(".")[0] if top.endswith((".py", ".so")) else top
            if re.match(r"[A-Za-z_]\w*$", top) and normalize(top) != name:
                modules.setdefault(top, name)
    package = sys.argv[1] if len(sys.argv) > 1 else ""
    found = {"modules": modules, "requires": requires(package, metadatas)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
