"""Offers weights to policies that do not see the learner's folders: through the blob store.

Layout of `sync/` of a run: `state.json`, the form of the newest weights by its digest, and a file
that is being written.

- What is offered is a form of a weights file: the same tensors, rounded to bf16 as servers compute.
  Its digest is its own; the file's digest names it (`regreen.weight_sync`).
- Blobs are in the store before the name that leads to them is, so that an offer is whole or absent.
- What is put is written down before, flushed: a learner that was killed removes it later if no
  offer came to need it.
- A chain begins with a snapshot, and a new one begins after `snapshot_every` versions, once a delta
  or all of a chain would be more than a snapshot, or where its last form is gone or damaged.
- The newest two chains stay, all older ones are removed: whoever catches up has time for it.
- The form that the next delta is taken from is hashed before a process first uses it.
"""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from learner_svc import metrics
from learner_svc.checkpoint import (
    ADAPTER,
    WEIGHTS,
    FileEntry,
    Saved,
    copies_of,
    disk_errors,
    need_space,
)
from learner_svc.published import Published
from learner_svc.record import replace_text
from regreen.blobs import Digest, ObjectBlobs, digest_of, digest_of_file
from regreen.rpc.errors import DataLoss, RegreenError
from regreen.rpc.logging import get
from regreen.weight_delta import DeltaError, FileDigest, Made, encode, form_of, mapped, write_pieces
from regreen.weight_sync import NOTE, Link, Offer, name_of

_FOLDER = "sync"
_STATE = "state.json"
_FORM = ".form"
_DELTA = ".delta"
KEPT_CHAINS = 2


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """How weights are offered."""

    how: str = "path"
    """path (not at all), full or delta."""
    dtype: str = "bf16"
    snapshot_every: int = 20


@dataclass(frozen=True, slots=True)
class Offered:
    """An offer in the blob store."""

    digest: Digest
    """Of the offer's blob."""
    offer: Offer


@dataclass(slots=True)
class _State:
    """What a run has in the blob store."""

    offered: list[Offered] = field(default_factory=list)
    """Oldest first."""
    put: list[Digest] = field(default_factory=list)
    """Every blob of the run that may be there."""


class WeightSync:
    """Offers the weights of runs; one call of a run at a time."""

    def __init__(self, blobs: ObjectBlobs, config: SyncConfig) -> None:
        self._blobs, self._config = blobs, config
        self._sound: set[str] = set()
        """Forms that this process wrote or hashed."""

    async def offer(self, run: Path, made: Published | Saved) -> Offered | None:
        """Offer weights of the run in the folder `run`; None where weights go by path alone.

        What was offered is not offered again.

        Raises:
            DiskFull: no space for their form.
            RegreenError: the blob store does not take them; calling again goes on.
        """
        if self._config.how == "path":
            return None
        folder, entry = run / _FOLDER, _entry(made)
        state = await asyncio.to_thread(_read, folder)
        known = next((one for one in state.offered if one.offer.sha256 == entry.sha256), None)
        if known and await self._blobs.named(name_of(entry.sha256)) == known.digest:
            return known
        with metrics.SYNC_SECONDS.time(), disk_errors(folder):
            need_space(folder, entry.size_bytes)
            offer, files = await self._make(folder, state, made)
            return await self._put(folder, state, offer, files)

    async def offer_saved(self, run: Path, saved: Saved) -> None:
        """Offer the weights of a checkpoint, which is whole whether they can be offered or not."""
        try:
            await self.offer(run, saved)
        except (RegreenError, OSError) as error:
            get().warning("weights of a checkpoint are not offered", problem=str(error))

    async def _make(
        self, folder: Path, state: _State, made: Published | Saved
    ) -> tuple[Offer, list[Path]]:
        """The offer, and the small files that it names."""
        stamp = made.position if isinstance(made, Published) else made.manifest
        form = await asyncio.to_thread(self._write_form, folder, made.path, stamp.run_id)
        link, chain = await self._link(folder, state, form)
        files = await asyncio.to_thread(_small_files, made.path)
        offer = Offer(
            _entry(made).sha256,
            stamp.run_id,
            stamp.policy_version,
            self._config.dtype,
            (*chain, link),
            {name: digest for name, (_, digest) in files.items()},
        )
        return offer, [path for path, _ in files.values()]

    def _write_form(self, folder: Path, source: Path, run_id: str) -> FileDigest:
        try:
            weights = mapped(source / WEIGHTS)
            pieces = form_of(weights, {NOTE: run_id}, bf16=self._config.dtype == "bf16")
            with (folder / _FORM).open("wb") as target:
                return write_pieces(target, pieces)
        except DeltaError as error:
            raise DataLoss(f"{source / WEIGHTS} cannot be read: {error}") from error

    async def _link(
        self, folder: Path, state: _State, form: FileDigest
    ) -> tuple[Link, tuple[Link, ...]]:
        """The link of a form, and the chain that it is one of: empty for a snapshot."""
        weights = Digest(form.sha256, form.size_bytes)
        chain = state.offered[-1].offer.chain if state.offered else ()
        why = self._why_snapshot(state, chain)
        if not why:
            base = folder / _name(chain[-1].weights)
            made = await asyncio.to_thread(self._delta, folder, base, chain[-1].weights, weights)
            before = sum(link.delta.size_bytes for link in chain if link.delta is not None)
            if made is None:
                why = "the weights before are gone or damaged"
            elif before + made.size_bytes >= weights.size_bytes:
                why = "the deltas would be more than a snapshot"
            else:
                delta = await asyncio.to_thread(digest_of_file, folder / _DELTA)
                _tell("delta", made.size_bytes, changed=made.changed / max(made.elements, 1))
                return Link(weights, delta), chain
        _tell("snapshot", weights.size_bytes, why=why)
        return Link(weights), ()

    def _why_snapshot(self, state: _State, chain: tuple[Link, ...]) -> str:
        if self._config.how == "full":
            return "weight_sync is full"
        if not chain:
            return "nothing was offered before"
        if state.offered[-1].offer.dtype != self._config.dtype:
            return "sync_dtype was another"
        return "snapshot_every" if len(chain) >= self._config.snapshot_every else ""

    def _delta(self, folder: Path, base: Path, before: Digest, after: Digest) -> Made | None:
        """Write the delta to the form at hand; None where the base will not do."""
        try:
            if before.sha256 not in self._sound and digest_of_file(base) != before:
                return None
            digests = (
                FileDigest(before.sha256, before.size_bytes),
                FileDigest(after.sha256, after.size_bytes),
            )
            old, new = mapped(base), mapped(folder / _FORM)
            with (folder / _DELTA).open("wb") as target:
                return encode(old, new, digests, target.write)
        except (FileNotFoundError, DeltaError) as error:
            get().warning("no delta of weights", problem=str(error))
            return None

    async def _put(
        self, folder: Path, state: _State, offer: Offer, small: Iterable[Path]
    ) -> Offered:
        content, link = offer.to_bytes(), offer.chain[-1]
        offered = Offered(digest_of(content), offer)
        state.put = [*dict.fromkeys([*state.put, *offer.blobs, offered.digest])]
        await asyncio.to_thread(_write, folder, state)
        for path in small:
            await self._blobs.put_file(path)
        await self._blobs.put_file(folder / (_DELTA if link.delta is not None else _FORM))
        await self._blobs.put(content)
        await self._blobs.name(name_of(offer.sha256), offered.digest, replace=True)
        if self._config.how == "delta":
            (folder / _FORM).replace(folder / _name(offer.weights))
            self._sound = {offer.weights.sha256}
        state.offered = [one for one in state.offered if one.offer.sha256 != offer.sha256]
        state.offered.append(offered)
        await asyncio.to_thread(_write, folder, state)
        await self._prune(folder, state)
        return offered

    async def _prune(self, folder: Path, state: _State) -> None:
        """Remove the chains before the newest ones, and what nothing needs."""
        begins = [*dict.fromkeys(one.offer.chain[0] for one in state.offered)][-KEPT_CHAINS:]
        old = [one for one in state.offered if one.offer.chain[0] not in begins]
        state.offered = [one for one in state.offered if one not in old]
        needed = {digest for one in state.offered for digest in (one.digest, *one.offer.blobs)}
        for one in old:
            name = name_of(one.offer.sha256)
            if await self._blobs.named(name) == one.digest:  # not another run's by now
                await self._blobs.unname(name)
        for digest in [digest for digest in state.put if digest not in needed]:
            await self._blobs.delete(digest)
        state.put = [digest for digest in state.put if digest in needed]
        await asyncio.to_thread(_write, folder, state)
        kept = {_STATE, _name(state.offered[-1].offer.weights)}
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()


def _entry(made: Published | Saved) -> FileEntry:
    return made.entry if isinstance(made, Published) else made.manifest.weights


def _small_files(source: Path) -> dict[str, tuple[Path, Digest]]:
    adapters = sorted((source / ADAPTER).iterdir()) if (source / ADAPTER).is_dir() else []
    return {
        path.relative_to(source).as_posix(): (path, digest_of_file(path))
        for path in [*copies_of(source), *adapters]
    }


def _tell(kind: str, size_bytes: int, **more: object) -> None:
    metrics.SYNCS.labels(kind).inc()
    metrics.SYNC_BYTES.labels(kind).inc(size_bytes)
    get().info("weights offered", kind=kind, size_bytes=size_bytes, **more)


def _name(digest: Digest) -> str:
    return f"{digest.sha256}.safetensors"


def _read(folder: Path) -> _State:
    """What was written down last; what cannot be read is as nothing."""
    try:
        raw: dict[str, Any] = json.loads((folder / _STATE).read_bytes())
        offered = [
            Offered(Digest(**one["digest"]), Offer.from_bytes(one["offer"].encode()))
            for one in raw["offered"]
        ]
        return _State(offered, [Digest(**digest) for digest in raw["put"]])
    except FileNotFoundError:
        return _State()
    except (DataLoss, ValueError, KeyError, TypeError, AttributeError) as error:
        get().warning("what was offered is not known any more", problem=str(error))
        return _State()


def _write(folder: Path, state: _State) -> None:
    raw = {
        "offered": [
            {"digest": asdict(one.digest), "offer": one.offer.to_bytes().decode()}
            for one in state.offered
        ],
        "put": [asdict(digest) for digest in state.put],
    }
    replace_text(folder / _STATE, json.dumps(raw, indent=1))
