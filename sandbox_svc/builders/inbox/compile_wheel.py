"""Byte code of what a wheel holds: `compile_wheel.py WHEEL SITE-PACKAGES FILE`.

- Standard library only, Python 3.7 and newer; started with `-I -S` in a sandbox that has the wheel
  and nothing of a task, it reads sources and runs none of them.
- The file is what `marshal` makes of a dictionary: installed path to the sha256 of the source and
  its code. It is of use to the very interpreter that wrote it.
"""

from __future__ import annotations

import hashlib
import marshal
import re
import sys
import zipfile

UNUSED = re.compile(r"(?:^|/)tests?/|\.dist-info/|\.data/(?!purelib/|platlib/)")
INSIDE = re.compile(r"[^/]+\.data/(?:purelib|platlib)/")
MOST_BYTES, MOST_CODE = 4 << 20, 48 << 20
"""Of a module and of all code; what goes beyond is compiled where it is installed."""


def compiled(wheel: str, site: str) -> dict[str, tuple[bytes, bytes]]:
    found: dict[str, tuple[bytes, bytes]] = {}
    room = MOST_CODE
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".py") or UNUSED.search(member.filename):
                continue
            if member.file_size > MOST_BYTES:
                continue
            path, source = f"{site}/{INSIDE.sub('', member.filename)}", archive.read(member)
            try:
                code = marshal.dumps(compile(source, path, "exec", dont_inherit=True))
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue  # as compileall: it has none
            room -= len(code)
            if room < 0:
                break
            found[path] = (hashlib.sha256(source).digest(), code)
    return found


def main(wheel: str, site: str, out: str) -> None:
    with open(out, "wb") as file:
        marshal.dump(compiled(wheel, site), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
