"""The bounds that a project declares, where they stand in its files, and looser ones.

- Read as text: `setup.py` is never executed. What is put together at run time is not found.
- Only a bound that rules a release out is changed, and only its upper part.
"""

import io
import re
import tarfile
from collections.abc import Mapping

from packaging.requirements import Requirement

from regreen.tasks.model import Edit

FILES = re.compile(
    r"^(?:setup\.py|setup\.cfg|pyproject\.toml|requirements[^/]*\.txt|requirements/[^/]*\.txt)$"
)
MAX_BYTES = 200_000


def own_bounds(archive: bytes) -> dict[str, str]:
    """Texts of the files of a source archive that may declare requirements."""
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            fits = member.isfile() and FILES.match(path) and member.size <= MAX_BYTES
            stream = tar.extractfile(member) if fits else None
            if stream is not None:
                try:
                    found[path] = stream.read().decode("utf-8")
                except UnicodeDecodeError:
                    continue
    return found


def loosened(
    texts: Mapping[str, str], ruled_out: Mapping[str, Requirement], pins: Mapping[str, str]
) -> list[Edit]:
    """Edits that let the pinned releases in; nothing if a bound is nowhere to be found."""
    edits: list[Edit] = []
    for name in sorted(ruled_out):
        found = []
        for path, text in sorted(texts.items()):
            found += _of_file(path, text, name, pins[name])
        if not found:
            return []
        edits += found
    return edits


def _of_file(path: str, text: str, name: str, version: str) -> list[Edit]:
    """Edits of one file: PEP 508 lines, and poetry's tables."""
    word = re.escape(name).replace(r"\-", "[-_.]")
    bound = r"(?:[ \t]*[<>=!~]=?=?[ \t]*[\w.*+!]+(?:[ \t]*,(?=[ \t]*[<>=!~]))?)+"
    plain = re.compile(rf"(?i)(?<![\w.-])({word}(?:\s*\[[\w, -]*\])?[ \t]*\(?)({bound})")
    table = re.compile(rf'(?im)^({word}\s*=\s*(?:\{{.*?version\s*=\s*)?")([^"\n]+)(?=")')
    edits: dict[str, Edit] = {}
    patterns = [plain, table] if path == "pyproject.toml" else [plain]
    for pattern in patterns:
        for match in pattern.finditer(text):
            new = match[1] + _lower(match[2], version)
            if match[0] != new and match[0] not in edits:
                count = text.count(match[0])
                edits[match[0]] = Edit(path=path, old=match[0], new=new, count=count)
    return list(edits.values())


def _lower(bounds: str, version: str) -> str:
    """The lower part of a bound, or one that begins with a pin's series."""
    trailing = bounds[len(bounds.rstrip()) :]
    kept = [part.strip() for part in bounds.split(",") if part.strip().startswith((">", "!="))]
    first = re.search(r"[\d][\w.]*", bounds)
    start = first[0].removesuffix(".*").rstrip(".") if first else version
    pinned = re.search(r"==|~=|\^|~|^\d", bounds.strip()) is not None
    return (",".join(kept) or (f">={start}" if pinned else "")) + trailing
