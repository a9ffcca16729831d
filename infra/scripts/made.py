"""Files that scripts make: written, or with `--check` compared with what is there."""

import sys
from collections.abc import Mapping
from pathlib import Path


def keep(files: Mapping[Path, str], script: str) -> int:
    """Write what differs, or say that it does; the exit code."""
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if stale and "--check" in sys.argv:
        print(f"stale: {', '.join(path.name for path in stale)}; run infra/scripts/{script}.py")
        return 1
    for path in stale:
        path.write_text(files[path])
    return 0
