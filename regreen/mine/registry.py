"""The package index as a polite miner asks it: from disk first, and within a budget.

- A page is asked for once in `PAGE_DAYS`; a file once, by its sha256.
- The budget counts pages and files that were really asked for. When it is spent, the run ends;
  nothing is asked without being counted. What uv asks goes through uv's own cache beside it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from packaging.utils import canonicalize_name

from regreen.pkgindex import IndexFile, PackageIndex
from regreen.rpc.errors import NotFound, ResourceExhausted

PAGE_DAYS = 7


class Registry(PackageIndex):
    """A package index with a memory on disk."""

    def __init__(self, urls: Sequence[str], folder: Path, *, budget: int) -> None:
        super().__init__(urls)
        self._folder, self._budget = folder, budget
        self.asked = 0
        """Requests of this run."""
        folder.mkdir(parents=True, exist_ok=True)

    async def files(self, name: str) -> list[IndexFile]:
        """All files of a package.

        Raises:
            NotFound: no index knows the package.
            ResourceExhausted: the budget is spent.
        """
        key = canonicalize_name(name)
        if key in self._pages:
            return self._pages[key]
        path = self._folder / f"{key}.json"
        page = _kept(path)
        if page is None:
            self._spend()
            try:
                page = await super().files(name)
            except NotFound:
                page = []
            path.write_text(json.dumps([asdict(entry) for entry in page]), "utf-8")
        if not page:
            raise NotFound(f"the package index has no package {key!r}")
        self._pages[key] = page
        return page

    async def download(self, name: str, filename: str, sha256: str, into: Path) -> Path:
        """Fetch one file by its sha256, or copy it from before; as `PackageIndex.download`."""
        kept = self._folder / "files" / sha256
        if not kept.exists():
            self._spend()
            await super().download(name, filename, sha256, kept)
        if into != kept:
            into.parent.mkdir(parents=True, exist_ok=True)
            into.write_bytes(kept.read_bytes())
        return into

    async def sdist(self, name: str, filename: str, sha256: str) -> bytes:
        """The bytes of a source archive."""
        path = self._folder / "files" / sha256
        await self.download(name, filename, sha256, path)
        return path.read_bytes()

    def drop(self, sha256: str) -> None:
        """Forget the bytes of a file that is not needed any more."""
        (self._folder / "files" / sha256).unlink(missing_ok=True)

    def _spend(self) -> None:
        if self.asked >= self._budget:
            raise ResourceExhausted(
                f"the budget of {self._budget} requests to the package index is spent; "
                "run again, or give more with --requests"
            )
        self.asked += 1


def _kept(path: Path) -> list[IndexFile] | None:
    try:
        if time.time() - path.stat().st_mtime > PAGE_DAYS * 86400:
            return None
        return [IndexFile(**entry) for entry in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
