"""The releases of a project on disk, asked of the index once a day.

- Resolving asks the index about every package; what a project requires seldom changes between two
  repairs, and what the index offers seldom within a day.
- An entry holds what was resolved for equal requirements, interpreter and indexes; the files of the
  project do not matter. One that is damaged, or of another day or Regreen, is resolved anew.
"""

import contextlib
import hashlib
import os
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from google.protobuf.message import DecodeError

from regreen.blobs import Digest
from regreen.common import v1 as common_pb
from regreen.pkgindex import index_urls
from regreen.sandbox import v1 as pb
from regreen.tasks.local import Project, environment_of


async def pinned_environment(project: Project, tree: Digest, folder: Path) -> pb.EnvironmentSpec:
    """`environment_of`, whose answers of today are kept in `folder`.

    Raises:
        InvalidArgument: a package or release is not on the index.
        Unavailable: the index cannot be reached.
    """
    path = folder / f"{datetime.now(UTC).date().isoformat()}-{_key(project)}"
    spec = _kept(path)
    if spec is None:
        spec = await environment_of(project, tree)
        with contextlib.suppress(OSError):  # on a full disk it is resolved again the next time
            _keep(path, spec)
    spec.source_tree.CopyFrom(common_pb.Digest(sha256=tree.sha256, size_bytes=tree.size_bytes))
    return spec


def _key(project: Project) -> str:
    asked = replace(project, root=Path(), pin_files=(), notes=())
    return hashlib.sha256(repr((asked, index_urls(), version("regreen"))).encode()).hexdigest()


def _kept(path: Path) -> pb.EnvironmentSpec | None:
    try:
        data = path.read_bytes()
        digest, body = data[:32], data[32:]
        if hashlib.sha256(body).digest() != digest:
            return None
        return pb.EnvironmentSpec.FromString(body)
    except (OSError, DecodeError):
        return None


def _keep(path: Path, spec: pb.EnvironmentSpec) -> None:
    """Write an entry whole or not at all, in place of those of other days."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        if not other.name.startswith(path.name[:10]):
            other.unlink(missing_ok=True)
    body = spec.SerializeToString(deterministic=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name[:10], dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
