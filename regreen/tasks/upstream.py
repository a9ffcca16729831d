"""Takes named files out of a release, fetched by hash; nothing is unpacked to disk or run.

- Only regular files that were asked for are read, each bounded.
- The archive's single top-level directory is left out of the names.
"""

import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from regreen.pkgindex import PackageIndex
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.model import FileRecord

MAX_FILE_BYTES = 8 << 20


async def release_files(
    index: PackageIndex, package: str, sdist: FileRecord, paths: Sequence[str]
) -> dict[str, bytes]:
    """Contents of `paths` in a source archive.

    Raises:
        InvalidArgument: a path is not in the archive.
        Unavailable, NotFound, DataLoss: the archive cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="regreen-sdist-") as folder:
        archive = Path(folder) / "sdist.tar.gz"
        await index.download(package, sdist.filename, sdist.sha256, archive)
        return read_members(archive, paths)


def read_members(archive: Path, paths: Sequence[str]) -> dict[str, bytes]:
    """Contents of `paths` in a tar archive, below its top-level directory."""
    wanted, found = set(paths), dict[str, bytes]()
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if name not in wanted or not member.isfile() or member.size > MAX_FILE_BYTES:
                continue
            stream = tar.extractfile(member)
            if stream is not None:
                found[name] = stream.read(MAX_FILE_BYTES)
    missing = sorted(wanted - found.keys())
    if missing:
        raise InvalidArgument(
            "overlay.fix_paths", f"not in the archive: {missing[0]}", "correct it"
        )
    return found
