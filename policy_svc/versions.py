"""Which weights serve: loads versions by reference and remembers the current one.

- A load that fails leaves the old version serving; a load that was asked for twice is done once,
  also from another place: the same version of the same bytes is not loaded, only looked for there.
- Versions of one run only go up, unless the caller says `allow_older`; another run may start low.
- The bytes are hashed before they serve when the caller gives a digest, while an engine may read
  them; those that serve are not hashed again under another name of their file.
- The current version is written down (atomically) after each switch, so that a service that was
  killed serves the same version when it comes back, if its bytes are still those.
"""

import asyncio
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from policy_svc import metrics
from policy_svc.engines.base import Engine, Offer
from policy_svc.engines.stepper import WeightsError
from policy_svc.engines.weights import INDEX, SINGLE, identity_of
from policy_svc.offered import OfferedWeights, form_at
from regreen.blobs import Digest, check_digest, open_blobs
from regreen.rpc.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegreenError,
)
from regreen.rpc.logging import get

_KEPT_DOWNLOADS = 2


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """Weights by reference; an empty `uri` is the base model, an empty `sha256` is not checked."""

    version: int = 0
    uri: str = ""
    sha256: str = ""
    size_bytes: int = 0
    run_id: str = ""
    step: int = 0

    @property
    def digest(self) -> Digest | None:
        """The digest, if one was given."""
        return Digest(self.sha256, self.size_bytes) if self.sha256 else None


@dataclass(frozen=True, slots=True)
class Serving:
    """The version that serves, its local weights, and since when (seconds since the epoch)."""

    policy: PolicyVersion
    path: Path
    since_s: float


class WeightSource:
    """Finds the local path of weights; fetches blobs into `folder`."""

    def __init__(self, base: Path, folder: Path, offered: OfferedWeights | None = None) -> None:
        self._base, self._folder, self._offered = base, folder, offered

    async def path_of(
        self, policy: PolicyVersion, serving: Path, known: Path | None = None
    ) -> Path:
        """Return a safetensors file, or a folder with one, whose digest was checked.

        What is at `serving` is not removed. The file of `known` has been checked.

        Raises:
            NotFound: nothing is there.
            DataLoss: its bytes do not match the digest.
            InvalidArgument: the URI is no path and no blob with a digest.
        """
        path, checked = await self.find(policy, serving)
        if not checked and (known is None or not _one_file(path, known)):
            await self.verify(path, policy)
        return path

    async def find(self, policy: PolicyVersion, serving: Path) -> tuple[Path, bool]:
        """The same, and whether the digest was checked, or there is none: what is fetched, is.

        Raises: as `path_of`.
        """
        if not policy.uri:
            return self._base, True
        if policy.digest is not None:
            check_digest(policy.digest, "policy.digest")
        parts = urlsplit(policy.uri)
        if parts.scheme in ("", "file"):
            path = Path(unquote(parts.path))
            if not path.is_absolute():
                raise InvalidArgument(
                    "policy.uri", f"{policy.uri!r} is relative", "make it absolute"
                )
            if path.is_file() or _is_checkpoint(path):
                return path, not policy.sha256
            if self._offered is not None and policy.sha256 and not path.is_dir():
                return await self._offered.path_of(policy.sha256, {serving}), True
        return await self._fetch(policy), True

    async def verify(self, path: Path, policy: PolicyVersion) -> tuple[int, ...]:
        """See that a file at hand has the digest; its `identity_of`. Raises: as `path_of`."""
        file = _file(path)
        if not file.is_file():
            raise InvalidArgument(
                "policy.digest", "cannot be checked for sharded weights", "omit it"
            )
        before = _identity(path)
        found = await asyncio.to_thread(_digest, file)
        if found.sha256 != policy.sha256:
            raise DataLoss(f"{file} has the digest {found}, not {policy.digest}")
        if _identity(path) != before:
            raise DataLoss(f"{file} was changed while it was read")
        return before

    async def _fetch(self, policy: PolicyVersion) -> Path:
        digest = policy.digest
        if digest is None:
            raise NotFound(f"no weights at {policy.uri}; for a blob store, give the digest too")
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"{digest.sha256}.safetensors"
        if not target.is_file():
            self._prune()
            parts = urlsplit(policy.uri)
            if parts.scheme in ("", "file") and not Path(unquote(parts.path)).is_dir():
                raise NotFound(f"no weights at {policy.uri}")
            await open_blobs(policy.uri).get_file(digest, target)
        return target

    def _prune(self) -> None:
        files = sorted(self._folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime)
        for file in files[: max(0, len(files) - _KEPT_DOWNLOADS + 1)]:
            file.unlink(missing_ok=True)


class Versions:
    """The one place that changes an engine's weights."""

    def __init__(
        self, engine: Engine, source: WeightSource, record: Path, serving: Serving
    ) -> None:
        self._engine, self._source, self._record = engine, source, record
        self._serving = serving
        self._lock = asyncio.Lock()
        metrics.VERSION.set(serving.policy.version)

    @property
    def serving(self) -> Serving:
        """What serves now."""
        return self._serving

    async def load(
        self, policy: PolicyVersion, *, allow_older: bool = False, offer: Offer | None = None
    ) -> tuple[PolicyVersion, float]:
        """Switch to a version; what serves now, and the seconds without sampling.

        What is offered is received in place of being read, and read where that fails.

        The switch goes on when the caller leaves, so that engine and record never differ.

        Raises:
            InvalidArgument, NotFound, DataLoss: see `WeightSource.path_of`.
            FailedPrecondition: the version is older, or the weights do not fit.
        """
        _check_number(policy)
        if offer and offer.sha256 != policy.sha256:
            raise InvalidArgument(
                "offer.digest", "is not that of the policy", "offer what is to be loaded"
            )
        return await asyncio.shield(self._load(policy, allow_older, offer))

    async def _load(
        self, policy: PolicyVersion, allow_older: bool, offer: Offer | None
    ) -> tuple[PolicyVersion, float]:
        async with self._lock:
            current = self._serving.policy
            if _same(policy, current):
                return current, 0.0
            if _same(replace(policy, uri=""), replace(current, uri="")) and policy.sha256:
                return await self._move(policy), 0.0
            _check_order(policy, current, allow_older)
            start_s = time.monotonic()
            received = await self._received(policy, offer) if offer else None
            if received:
                path, pause_s = received
                await self._serve(policy, path, time.monotonic() - start_s)
                return policy, pause_s
            try:
                path, pause_s = await self._read(policy)
            except BaseException:
                metrics.LOADS.labels("failed").inc()
                raise
            await self._serve(policy, path, time.monotonic() - start_s)
            return policy, pause_s

    async def _read(self, policy: PolicyVersion) -> tuple[Path, float]:
        """Where the weights lie that the engine loaded, and the seconds without sampling."""
        path, checked = await self._source.find(policy, self._serving.path)
        if checked:
            return path, await self._engine.load(policy.version, path)
        check = asyncio.create_task(self._source.verify(path, policy))
        try:
            return path, await self._engine.load(policy.version, path, check)
        finally:
            check.cancel()
            await asyncio.gather(check, return_exceptions=True)

    async def _received(self, policy: PolicyVersion, offer: Offer) -> tuple[Path, float] | None:
        """Where the weights lie that were received, and the seconds without sampling; None: not."""
        try:
            # What lies there is read only if servers fail later; then its digest is looked at.
            path = await self._source.path_of(replace(policy, sha256=""), self._serving.path)
            pause_s = await self._engine.receive(policy.version, path, offer)
        except RegreenError as error:
            metrics.RECEIVED.labels("failed").inc()
            get().warning("not received, to be read", version=policy.version, error=error.message)
            return None
        metrics.RECEIVED.labels("received").inc()
        return path, pause_s

    async def sleep(self) -> None:
        """Have the engine sleep, after a load that is under way. Raises: see `Engine.sleep`."""
        async with self._lock:
            await self._engine.sleep()

    async def wake(
        self, policy: PolicyVersion | None = None, *, allow_older: bool = False
    ) -> PolicyVersion:
        """Have the engine awake with a version, or with that which serves; what serves now.

        Raises:
            InvalidArgument, NotFound, DataLoss, FailedPrecondition: as `load`; it sleeps on.
            Unavailable: the engine cannot wake now.
        """
        if policy:
            _check_number(policy)
        async with self._lock:
            current = self._serving.policy
            new = policy or current
            if policy and not _same(policy, current):
                if _same(replace(policy, uri=""), replace(current, uri="")) and policy.sha256:
                    new = await self._move(policy)
                else:
                    return await self._wake_with(policy, allow_older)
            held = self._engine.version == new.version  # unless the service was begun anew
            await self._engine.wake(new.version, None if held else self._serving.path)
            return new

    async def _wake_with(self, policy: PolicyVersion, allow_older: bool) -> PolicyVersion:
        _check_order(policy, self._serving.policy, allow_older)
        start_s = time.monotonic()
        try:
            path = await self._source.path_of(policy, self._serving.path)
            await self._engine.wake(policy.version, path)
        except BaseException:
            metrics.LOADS.labels("failed").inc()
            raise
        await self._serve(policy, path, time.monotonic() - start_s)
        return policy

    async def _serve(self, policy: PolicyVersion, path: Path, took_s: float) -> None:
        """Write down what serves from now on."""
        self._serving = Serving(policy, path, time.time())
        await asyncio.to_thread(write_record, self._record, self._serving)
        metrics.LOADS.labels("loaded").inc()
        metrics.LOAD_SECONDS.observe(took_s)
        metrics.VERSION.set(policy.version)
        get().info("policy version", version=policy.version, uri=policy.uri)

    async def _move(self, policy: PolicyVersion) -> PolicyVersion:
        """What serves is to be found at another place from now on."""
        serving = self._serving.path
        path = await self._source.path_of(policy, serving, known=serving)
        self._engine.moved(path)
        self._serving = Serving(policy, path, self._serving.since_s)
        await asyncio.to_thread(write_record, self._record, self._serving)
        return policy


def _same(asked: PolicyVersion, current: PolicyVersion) -> bool:
    return replace(asked, step=0) == replace(current, step=0)


def _check_number(asked: PolicyVersion) -> None:
    if asked.version < 0:
        raise InvalidArgument("policy.version", f"is {asked.version}", "use 0 or more")


def _check_order(asked: PolicyVersion, current: PolicyVersion, allow_older: bool) -> None:
    if allow_older or asked.version > current.version or asked.run_id != current.run_id:
        return
    raise FailedPrecondition(
        f"version {asked.version} is not newer than {current.version}, which serves; "
        "set allow_older to go back"
    )


def write_record(path: Path, serving: Serving) -> None:
    """Write down what serves; atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    value = {
        "policy": asdict(serving.policy),
        "path": str(serving.path),
        "since_s": serving.since_s,
    }
    with partial.open("w") as handle:
        json.dump(value, handle)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def read_record(path: Path) -> Serving | None:
    """Return what served last, if its weights are still there."""
    try:
        value = json.loads(path.read_bytes())
        weights = Path(value["path"])
        serving = Serving(PolicyVersion(**value["policy"]), weights, float(value["since_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return serving if weights.is_file() or _is_checkpoint(weights) else None


def _file(path: Path) -> Path:
    return path if path.is_file() else path / SINGLE


def _identity(path: Path) -> tuple[int, ...]:
    try:
        return identity_of(path)
    except WeightsError as error:
        raise NotFound(f"no weights there any more: {error}") from error


def _one_file(path: Path, other: Path) -> bool:
    """Whether both are names of one file."""
    try:
        return _file(path).samefile(_file(other))
    except OSError:
        return False


def is_whole(serving: Serving) -> bool:
    """Whether weights with a digest still match it: they may not have reached the disk."""
    expected, file = serving.policy.sha256, _file(serving.path)
    form = form_at(serving.path)
    if form is not None and form.sha256 == expected:
        expected = form.weights.sha256
    return not expected or (file.is_file() and _digest(file).sha256 == expected)


def _is_checkpoint(path: Path) -> bool:
    return (path / SINGLE).is_file() or (path / INDEX).is_file()


def _digest(path: Path) -> Digest:
    with path.open("rb") as source:
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        return Digest(sha256, source.tell())
