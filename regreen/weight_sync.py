"""Weights in a blob store: what a learner offers and a policy far from it takes.

- The digest of a weights file is the name of all its forms: the name `weights-SHA256` stands for an
  `Offer`, which says which blobs give the tensors of that file as a policy serves them.
- An offer is complete in itself: a chain from a snapshot, which is a weights file, over the deltas
  since (`regreen.weight_delta`). Who has any weights of the chain goes on from there, who has none
  takes the snapshot; nobody has to ask the learner.
- A form names its run in its notes, so that no two runs share one, and each removes its own.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from regreen.blobs import Digest, check_digest
from regreen.rpc.errors import DataLoss, InvalidArgument

FORMAT = "regreen-weight-offer-1"
NOTE = "regreen.run"
"""Note of a form: the run that it is of."""
MAX_LINKS = 1000


@dataclass(frozen=True, slots=True)
class Link:
    """Weights that a chain goes through."""

    weights: Digest
    """Of their file; of the first link it is the blob, too."""
    delta: Digest | None = None
    """The blob that makes them of those before; none of the first."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Weights by the blobs that give them."""

    sha256: str
    """Digest of the weights file that they are a form of."""
    run_id: str
    policy_version: int
    dtype: str
    """bf16 or fp32."""
    chain: tuple[Link, ...]
    """The snapshot first; what comes last is offered."""
    files: dict[str, Digest]
    """Small files of the folder (configuration, tokenizer, adapters)."""

    @property
    def weights(self) -> Digest:
        """Digest of the file that comes of it."""
        return self.chain[-1].weights

    @property
    def blobs(self) -> list[Digest]:
        """The blobs of its weights, and of the files that are the run's alone."""
        own = [digest for name, digest in self.files.items() if "/" in name]
        deltas = [link.delta for link in self.chain if link.delta is not None]
        return [self.chain[0].weights, *deltas, *own]

    def to_bytes(self) -> bytes:
        """As it is stored."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Offer":
        """What `to_bytes` gave.

        Raises:
            DataLoss: it is of another format, or says what cannot be.
        """
        try:
            raw: dict[str, Any] = json.loads(content)
            if raw.pop("format") != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}")
            chain = tuple(_link(link) for link in raw.pop("chain"))
            files = {name: _digest(digest) for name, digest in raw.pop("files").items()}
            offer = cls(**raw, chain=chain, files=files)
            _check(offer)
        except (ValueError, KeyError, TypeError, AttributeError, InvalidArgument) as error:
            raise DataLoss(f"an offer of weights cannot be read: {error}") from error
        return offer


def name_of(sha256: str) -> str:
    """The name, in a blob store, of the offer of a weights file."""
    return f"weights-{sha256}"


def _check(offer: Offer) -> None:
    check_digest(Digest(offer.sha256, 0))
    if not 1 <= len(offer.chain) <= MAX_LINKS:
        raise ValueError(f"a chain of {len(offer.chain)} links")
    if [link.delta is None for link in offer.chain] != [n == 0 for n in range(len(offer.chain))]:
        raise ValueError("a chain that does not begin with its only snapshot")
    for name in offer.files:
        parts = name.split("/")
        if len(parts) > 2 or any(not part or part.startswith(".") for part in parts):
            raise ValueError(f"a file of the name {name[:80]!r}")


def _link(raw: dict[str, Any]) -> Link:
    delta = raw["delta"]
    return Link(_digest(raw["weights"]), None if delta is None else _digest(delta))


def _digest(raw: dict[str, Any]) -> Digest:
    return check_digest(Digest(str(raw["sha256"]), int(raw["size_bytes"])))
