"""Weights that a learner offers through a blob store, for a policy that does not see its folders.

Layout: a folder for each weights file, by its digest: its form (`model.safetensors`), small files,
and `form.json`, which says what they are.

- A folder is whole under its name or not there: written beside it, renamed.
- Deltas are applied in the order of their chain, each to weights that are here, and what comes out
  is checked by its digest before the next.
- Where no weights of a chain are here, or a delta or its base is damaged or gone, the snapshot is
  taken and the deltas after it: a fallback, counted and logged with its reason.
- What serves stays, and one more; all else is removed.
"""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from policy_svc import metrics
from policy_svc.engines.weights import SINGLE
from regreen.blobs import Digest, ObjectBlobs, digest_of_file
from regreen.rpc.errors import DataLoss, NotFound
from regreen.rpc.logging import get
from regreen.weight_delta import Delta, DeltaError, mapped
from regreen.weight_sync import Link, Offer, name_of

_ABOUT = "form.json"
_PARTIAL = ".partial"
_KEPT = 2


@dataclass(frozen=True, slots=True)
class Form:
    """A folder with the form of a weights file."""

    path: Path
    sha256: str
    """Digest of the weights file."""
    weights: Digest
    """Of the form."""
    files: Mapping[str, Digest]


class OfferedWeights:
    """Takes what is offered; one call at a time."""

    def __init__(self, blobs: ObjectBlobs, folder: Path) -> None:
        self._blobs, self._folder = blobs, folder
        self._sound: set[Path] = set()
        """Folders whose weights this process wrote or hashed."""

    async def path_of(self, sha256: str, keep: Collection[Path]) -> Path:
        """The folder with the form of a weights file; the folders `keep` are not removed.

        Raises:
            NotFound: it is not offered, or no longer.
            DataLoss: what is offered is damaged.
        """
        target = self._folder / sha256
        if await asyncio.to_thread(self._is_sound, target):
            return target
        digest = await self._blobs.named(name_of(sha256))
        if digest is None:
            raise NotFound(f"the blob store offers no weights of the digest {sha256}")
        offer = Offer.from_bytes(await self._blobs.get(digest))
        if offer.sha256 != sha256:
            raise DataLoss(f"under the name of the weights {sha256} others are offered")
        await asyncio.to_thread(self._clear, {*keep, target})
        partial = self._folder / _PARTIAL
        partial.mkdir(parents=True)
        await self._take(offer, partial)
        await self._small_files(offer, partial)
        await asyncio.to_thread(_put, partial, target, offer)
        self._sound.add(target)
        return target

    async def _take(self, offer: Offer, partial: Path) -> None:
        """Write the weights, from what is here if that goes, else from the snapshot."""
        chain = offer.chain
        here = {form.weights: form.path for form in self._forms()}
        at = next((n for n in reversed(range(len(chain))) if chain[n].weights in here), None)
        if at is not None:
            base = here[chain[at].weights]
            try:
                if at + 1 == len(chain):
                    await asyncio.to_thread(_copy_sound, base / SINGLE, offer.weights, partial)
                await self._apply(base / SINGLE, chain[at + 1 :], partial)
                return
            except (DeltaError, DataLoss, FileNotFoundError) as error:
                self._sound.discard(base)  # it may be the base that is damaged
                _fell_back("damaged", error)
            except NotFound as error:
                _fell_back("missing", error)
        elif len(chain) > 1:
            _fell_back("no_base", None)
        await self._blobs.get_file(chain[0].weights, partial / SINGLE)
        _fetched("snapshot", chain[0].weights)
        try:
            await self._apply(partial / SINGLE, chain[1:], partial)
        except DeltaError as error:
            raise DataLoss(
                f"offered weights are damaged until the next snapshot: {error}"
            ) from error

    async def _apply(self, base: Path, links: Collection[Link], partial: Path) -> None:
        """Write what links make of the weights file `base` into the folder `partial`."""
        for link in links:
            assert link.delta is not None
            delta = partial / ".delta"
            await self._blobs.get_file(link.delta, delta)
            _fetched("delta", link.delta)
            await asyncio.to_thread(_apply, base, delta, link.weights, partial / ".next")
            delta.unlink()
            (partial / ".next").replace(partial / SINGLE)
            base = partial / SINGLE

    async def _small_files(self, offer: Offer, partial: Path) -> None:
        here = {
            digest: form.path / name
            for form in self._forms()
            for name, digest in form.files.items()
        }
        for name, digest in offer.files.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            if digest in here and await asyncio.to_thread(_is, here[digest], digest):
                await asyncio.to_thread(_copy, here[digest], path)
            else:
                await self._blobs.get_file(digest, path)

    def _is_sound(self, path: Path) -> bool:
        """Whether a folder is there and holds what it says; hashed once by this process."""
        form = form_at(path)
        if form is None:
            return False
        if path not in self._sound and not _is(path / SINGLE, form.weights):
            get().warning("weights that were fetched are damaged", path=str(path))
            return False
        self._sound.add(path)
        return True

    def _forms(self) -> list[Form]:
        """Oldest first."""
        if not self._folder.is_dir():
            return []
        found = [form for path in self._folder.iterdir() if (form := form_at(path)) is not None]
        return sorted(found, key=lambda form: (form.path / _ABOUT).stat().st_mtime_ns)

    def _clear(self, keep: Collection[Path]) -> None:
        """Make room for one more, and remove what a killed process left."""
        shutil.rmtree(self._folder / _PARTIAL, ignore_errors=True)
        kept = {path.resolve() for path in keep}
        old = [form.path for form in self._forms() if form.path.resolve() not in kept]
        for path in old[: max(0, len(old) - _KEPT + 1)]:
            shutil.rmtree(path)
            self._sound.discard(path)


def form_at(path: Path) -> Form | None:
    """What a folder holds; None where it holds no form, or not a whole one."""
    try:
        raw = json.loads((path / _ABOUT).read_bytes())
        files = {name: Digest(**digest) for name, digest in raw["files"].items()}
        form = Form(path, str(raw["of"]), Digest(**raw["weights"]), files)
        whole = (path / SINGLE).stat().st_size == form.weights.size_bytes
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return form if whole and not path.name.startswith(".") else None


def _put(partial: Path, target: Path, offer: Offer) -> None:
    about = {
        "of": offer.sha256,
        "weights": asdict(offer.weights),
        "files": {name: asdict(digest) for name, digest in offer.files.items()},
    }
    (partial / _ABOUT).write_text(json.dumps(about, indent=1))
    if target.exists():  # damaged; whatever has it open goes on with what it opened
        shutil.rmtree(target)
    partial.rename(target)


def _apply(base: Path, delta: Path, expected: Digest, target: Path) -> None:
    """Write what a delta makes of a base.

    Raises:
        DeltaError: one of them is damaged, or the delta is of other weights.
    """
    found = Delta(mapped(delta))
    if (found.result.sha256, found.result.size_bytes) != (expected.sha256, expected.size_bytes):
        raise DeltaError(f"a delta makes the weights {found.result.sha256}, not {expected}")
    with target.open("wb") as file:
        found.apply(mapped(base), file.write)


def _copy_sound(base: Path, expected: Digest, partial: Path) -> None:
    """The weights are here: those of other masters that are rounded to the same."""
    if not _is(base, expected):
        raise DeltaError(f"{base} is damaged")
    _copy(base, partial / SINGLE)


def _copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _is(path: Path, digest: Digest) -> bool:
    try:
        return digest_of_file(path) == digest
    except OSError:
        return False


def _fetched(kind: str, digest: Digest) -> None:
    metrics.FETCHES.labels(kind).inc()
    metrics.FETCH_BYTES.labels(kind).inc(digest.size_bytes)


def _fell_back(reason: str, error: Exception | None) -> None:
    metrics.FALLBACKS.labels(reason).inc()
    get().warning("weights are taken whole", reason=reason, problem=str(error or ""))
