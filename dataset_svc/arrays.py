"""The token stream of a trajectory as one blob: ids, loss mask, logprobs, policy versions.

- Packing is deterministic: equal streams give equal bytes and so one digest.
- Unpacking gives back every bit: ids as int32, mask as uint8, logprobs as float32.
- A stream that `check` accepts masks out everything that the policy did not sample.

Layout, inside one zstd frame: the line `regreen.tokens/1`, a line of JSON
`{"tokens": n, "logprobs": m, "mask": k, "versions": [[version, start, end], ...]}`, then the three
arrays, little-endian, in the order ids, logprobs, mask.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regreen.blobs import compress, decompress
from regreen.rpc.errors import DataLoss, InvalidArgument

MAX_BLOB_BYTES = 1 << 30
_MAGIC = b"regreen.tokens/1\n"
_LOGPROB_SLACK = 1e-3
"""Rounding in an engine's log-softmax may put a certain token's logprob just above zero."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """All tokens of one trajectory, in order; n tokens."""

    token_ids: NDArray[np.int32]
    """Shape [n]: prompt, sampled tokens and tool results."""
    loss_mask: NDArray[np.uint8]
    """Shape [n]: 1 where the policy sampled the token."""
    logprobs: NDArray[np.float32]
    """Shape [n], natural log: of each sampled token when it was sampled, 0 elsewhere."""
    versions: tuple[tuple[int, int, int], ...] = ()
    """(policy version, first token, one past the last), in order."""

    def __len__(self) -> int:
        return len(self.token_ids)


def stream_of(
    token_ids: Sequence[int],
    loss_mask: bytes,
    logprobs: Sequence[float],
    versions: Sequence[tuple[int, int, int]] = (),
) -> TokenStream:
    """A stream from plain sequences; nothing is checked."""
    return TokenStream(
        np.asarray(token_ids, np.int32),
        np.frombuffer(loss_mask, np.uint8),
        np.asarray(logprobs, np.float32),
        tuple(versions),
    )


def pack(stream: TokenStream) -> bytes:
    """The stream as one compressed blob."""
    header = {
        "tokens": len(stream.token_ids),
        "logprobs": len(stream.logprobs),
        "mask": len(stream.loss_mask),
        "versions": [list(span) for span in stream.versions],
    }
    body = [
        _MAGIC,
        json.dumps(header, separators=(",", ":")).encode() + b"\n",
        stream.token_ids.astype("<i4").tobytes(),
        stream.logprobs.astype("<f4").tobytes(),
        stream.loss_mask.tobytes(),
    ]
    return compress(b"".join(body))


def unpack(blob: bytes) -> TokenStream:
    """The stream that `pack` made `blob` from.

    Raises:
        DataLoss: it is no such blob.
    """
    content = decompress(blob, MAX_BLOB_BYTES)
    if not content.startswith(_MAGIC):
        raise DataLoss("blob holds no token stream")
    line_end = content.find(b"\n", len(_MAGIC))
    try:
        header = json.loads(content[len(_MAGIC) : line_end])
        tokens, logprobs, mask = header["tokens"], header["logprobs"], header["mask"]
        versions = tuple((int(v), int(a), int(b)) for v, a, b in header["versions"])
        body = memoryview(content)[line_end + 1 :]
        if len(body) != 4 * tokens + 4 * logprobs + mask:
            raise DataLoss("token stream has the wrong length")
        return TokenStream(
            np.frombuffer(body[: 4 * tokens], "<i4").astype(np.int32),
            np.frombuffer(body[len(body) - mask :], np.uint8),
            np.frombuffer(body[4 * tokens : 4 * (tokens + logprobs)], "<f4").astype(np.float32),
            versions,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"token stream is damaged: {error}") from error


def check(stream: TokenStream, *, exact: bool, prompt_tokens: int) -> None:
    """Refuse a stream whose parts do not agree.

    `exact` says that it may be trained on; mask and logprobs may be missing only if it may not.

    Raises:
        InvalidArgument: names the field and the first wrong position.
    """
    count = len(stream)
    _check_length("loss_mask", len(stream.loss_mask), count, exact)
    _check_length("logprobs", len(stream.logprobs), count, exact)
    _first("token_ids", stream.token_ids < 0, "is negative", "give 0 or more")
    _first("loss_mask", stream.loss_mask > 1, "is neither 0 nor 1", "give one of them")
    _first("logprobs", ~np.isfinite(stream.logprobs), "is not finite", "give natural logarithms")
    _first("logprobs", stream.logprobs > _LOGPROB_SLACK, "is positive", "give natural logarithms")
    if not 0 <= prompt_tokens <= count:
        raise InvalidArgument(
            "trajectory.prompt_tokens",
            f"is {prompt_tokens} of {count} tokens",
            f"give 0 to {count}",
        )
    if len(stream.loss_mask):
        _first(
            "loss_mask",
            stream.loss_mask[:prompt_tokens] != 0,
            "marks a token of the prompt",
            "give 0 there",
        )
        if len(stream.logprobs):
            stray = (stream.loss_mask == 0) & (stream.logprobs != 0)
            _first("logprobs", stray, "is not 0 on a token that was not sampled", "give 0")
    covered = _check_versions(stream.versions, count)
    if exact:
        _first(
            "versions",
            (stream.loss_mask == 1) & ~covered,
            "has no span for this sampled token",
            "cover it",
        )


def _check_length(field: str, length: int, count: int, exact: bool) -> None:
    if length == count or (length == 0 and not exact):
        return
    raise InvalidArgument(
        f"trajectory.{field}", f"has {length} entries for {count} tokens", "give one per token"
    )


def _check_versions(spans: Sequence[tuple[int, int, int]], count: int) -> NDArray[np.bool_]:
    covered = np.zeros(count, np.bool_)
    previous = 0
    for position, (version, start, end) in enumerate(spans):
        field = f"trajectory.versions[{position}]"
        if not previous <= start < end <= count:
            raise InvalidArgument(
                field,
                f"[{start}, {end}) is empty, out of order or past the {count} tokens",
                "give ordered, disjoint, half-open spans",
            )
        if version < 0:
            raise InvalidArgument(f"{field}.version", "is negative", "give 0 or more")
        covered[start:end] = True
        previous = end
    return covered


def _first(field: str, wrong: NDArray[np.bool_], problem: str, remedy: str) -> None:
    if wrong.any():
        raise InvalidArgument(f"trajectory.{field}[{int(wrong.argmax())}]", problem, remedy)
