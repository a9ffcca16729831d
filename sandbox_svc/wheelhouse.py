"""Release files by content, and the offline wheelhouses that are made of them.

- A file is in the store if and only if its bytes have the sha256 of its name; names appear by
  rename, so a crash leaves nothing half-written under a final name.
- A wheelhouse is a directory of hard links named by its content; once there it never changes.
- Nothing is fetched that is here already; concurrent requests for one file merge.
- No code of a package runs here.
- Every name and digest is checked again before it becomes part of a path.
"""

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from regreen.pkgindex import PackageIndex, index_urls, interpreter_tags, wheel_fits
from regreen.rpc.errors import (
    DataLoss,
    InfraError,
    InvalidArgument,
    MissingDependency,
    NotFound,
    Unavailable,
)
from sandbox_svc.backends import fds
from sandbox_svc.builders.base import (
    DistFile,
    Pin,
    Progress,
    Stage,
    check_filename,
    check_sha256,
)
from sandbox_svc.fetches import Fetches

FETCHERS = 8


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of a release, in the store."""

    name: str
    version: str
    filename: str
    sha256: str


class DistStore:
    """Release files under one directory, fetched from the user's package index when missing."""

    def __init__(self, root: Path, open_index: Callable[[], PackageIndex] | None = None) -> None:
        self.root = root
        self._open_index = open_index or (lambda: PackageIndex(index_urls()))
        self._fetching: dict[str, asyncio.Task[None]] = {}
        for name in ("files", "built", "houses", "compiled"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the file with this digest is or would be.

        Raises:
            InvalidArgument: it is no digest.
        """
        check_sha256(sha256)
        return self.root / "files" / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def adopt(self, source: Path) -> DistFile:
        """Take a local file into the store."""
        content = source.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        self._place(content, self.path(sha256))
        return DistFile(source.name, sha256)

    def _place(self, content: bytes, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".part-", dir=final.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
                os.fchmod(out.fileno(), 0o644)
            os.replace(temporary, final)
        finally:
            Path(temporary).unlink(missing_ok=True)

    async def ensure(
        self,
        wanted: Sequence[tuple[str, DistFile]],
        progress: Progress = lambda _: None,
        fetches: Fetches | None = None,
    ) -> None:
        """Have every (package name, file) here; `fetches` sees to what has to be asked for.

        Raises:
            MissingDependency: a file is missing and the index does not give it, or leads to a
                host that may not be asked.
        """
        missing = {f.sha256: (name, f) for name, f in wanted if not self.has(f.sha256)}
        if not missing:
            return
        started, done = time.monotonic(), 0
        progress(Stage("fetch", 0, len(missing)))
        gate = asyncio.Semaphore(FETCHERS)
        async with self._open_index() as index:
            if fetches is not None:
                fetches.watch(index)

            async def one(name: str, file: DistFile) -> None:
                nonlocal done
                async with gate:
                    await self._merged(index, name, file)
                done += 1
                eta_s = (time.monotonic() - started) / done * (len(missing) - done)
                progress(Stage("fetch", done, len(missing), file.filename, eta_s))

            tasks = [asyncio.create_task(one(name, f)) for name, f in missing.values()]
            try:
                await asyncio.gather(*tasks)
            except (Unavailable, NotFound, DataLoss) as error:
                raise MissingDependency(
                    f"{len(missing) - done} of {len(missing)} package files are not here and "
                    f"cannot be fetched: {error}; check the package index (REGREEN_INDEX_URL)"
                ) from error
            except OSError as error:
                if error.errno in fds.FULL:
                    raise fds.no_space(f"no space for package files in {self.root}") from error
                if error.errno in fds.NONE_LEFT:
                    raise fds.exhausted("package files") from error
                raise InfraError(f"package files cannot be stored: {error}") from error
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _merged(self, index: PackageIndex, name: str, file: DistFile) -> None:
        """Fetch one file, or wait for the call that already fetches it."""
        while not self.has(file.sha256):
            running = self._fetching.get(file.sha256)
            if running is not None:
                await asyncio.wait([running])
                if not running.cancelled() and running.exception() is not None:
                    running.result()
                continue
            task = asyncio.ensure_future(self._download(index, name, file))
            self._fetching[file.sha256] = task
            try:
                await task
            finally:
                self._fetching.pop(file.sha256, None)

    async def _download(self, index: PackageIndex, name: str, file: DistFile) -> None:
        await index.download(name, file.filename, file.sha256, self.path(file.sha256))

    def built(self, key: str) -> Wheel | None:
        """The wheel that was built under this key earlier, if its bytes are still here."""
        try:
            fields = json.loads((self.root / "built" / f"{key}.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        wheel = Wheel(**fields)
        return wheel if self.has(wheel.sha256) else None

    def record_built(self, key: str, name: str, version: str, filename: str, data: bytes) -> Wheel:
        """Store a wheel that a preparation sandbox built.

        Raises:
            InvalidArgument: it has not the name of a wheel.
        """
        check_filename(filename)
        if not filename.endswith(".whl"):
            raise InvalidArgument("filename", f"{filename!r} is no wheel", "build a wheel")
        sha256 = hashlib.sha256(data).hexdigest()
        self._place(data, self.path(sha256))
        wheel = Wheel(name, version, filename, sha256)
        fields = {"name": name, "version": version, "filename": filename, "sha256": sha256}
        self._place(json.dumps(fields).encode(), self.root / "built" / f"{key}.json")
        return wheel

    def compiled(self, key: str) -> Path:
        """Where the byte code of a wheel is or would be.

        Raises:
            InvalidArgument: the key is no digest.
        """
        check_sha256(key)
        return self.root / "compiled" / key[:2] / key

    def keep_compiled(self, key: str, data: bytes) -> None:
        """Store byte code that a sandbox made of a wheel."""
        self._place(data, self.compiled(key))

    def compiled_folder(self, keys: Iterable[str]) -> Path:
        """A directory with the byte code of these wheels, as far as it is here."""
        there = {key: self.compiled(key) for key in sorted(keys) if self.compiled(key).is_file()}
        return self._linked("c", "\n".join(there), there)

    def house(self, wheels: Iterable[Wheel]) -> Path:
        """A directory with these wheels and an `index.json`; the same set gives the same path."""
        chosen = sorted(set(wheels), key=astuple)
        index: dict[str, dict[str, list[dict[str, str]]]] = {}
        for wheel in chosen:
            files = index.setdefault(wheel.name, {}).setdefault(wheel.version, [])
            files.append({"filename": wheel.filename, "sha256": wheel.sha256})
        text = json.dumps(index, sort_keys=True, indent=0).encode()
        final = self.root / "houses" / hashlib.sha256(text).hexdigest()[:32]
        if (final / "index.json").is_file():
            return final
        building = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root / "houses"))
        try:
            for wheel in chosen:
                check_filename(wheel.filename)
                os.link(self.path(wheel.sha256), building / wheel.filename)
            (building / "index.json").write_bytes(text)
            (building / "index.json").chmod(0o644)
            _settle(building, final)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return final

    def folder(self, files: Iterable[DistFile]) -> Path:
        """A directory that shows stored files under their names; the same set, the same path."""
        chosen = sorted(set(files), key=lambda f: f.filename)
        text = "\n".join(f"{f.sha256} {f.filename}" for f in chosen)
        return self._linked("f", text, {f.filename: self.path(f.sha256) for f in chosen})

    def _linked(self, kind: str, text: str, files: Mapping[str, Path]) -> Path:
        """A directory of hard links by name, itself named by a text that says what it holds."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        final = self.root / "houses" / f"{kind}{digest[:31]}"
        if final.is_dir():
            return final
        building = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root / "houses"))
        try:
            for name, path in files.items():
                check_filename(name)
                os.link(path, building / name)
            _settle(building, final)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return final


def _settle(building: Path, final: Path) -> None:
    """Give a finished directory its name; another process may have been faster."""
    building.chmod(0o755)
    try:
        os.rename(building, final)
    except OSError as error:
        if not final.is_dir():
            raise InfraError(f"{final.name} cannot be placed: {error}") from error


def pick(pin: Pin, python: str) -> DistFile | None:
    """The file of a release to install on `python`: a wheel that fits here, else an sdist."""
    tags = interpreter_tags(python)
    fits = [f for f in pin.files if f.filename.endswith(".whl") and wheel_fits(f.filename, tags)]
    if fits:
        return min(fits, key=lambda f: (f.filename.endswith("-any.whl"), f.filename))
    sdists = [f for f in pin.files if not f.filename.endswith(".whl")]
    return sdists[0] if sdists else None
