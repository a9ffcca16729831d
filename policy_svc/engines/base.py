"""What an engine is: token ids in, sampled token ids with logprobs and policy versions out.

- `logprobs` are natural logs under the raw policy: softmax at temperature 1, before top-p, top-k
  or a structure cut it. At temperature 1 and top_p 1 they are the behaviour policy's too.
- Version spans cover every sampled token of a completion exactly once, in order, without gaps.
- The stop token that ended a completion is its last id; stop texts stay in the output.
- An aborted request is answered with what it sampled so far, marked ABORT, never lost.
- `load` is all or nothing: when it raises, the old weights serve on.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from policy_svc.structure import Kind, Structure
from regreen.rpc.errors import FailedPrecondition

TokenSink = Callable[[int, Sequence[int], Sequence[float]], None]
"""Called with (sample index, new token ids, their logprobs) as tokens are sampled."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class PauseMode(StrEnum):
    """What happens to running requests on a pause."""

    DRAIN = "drain"
    IN_PLACE = "in_place"
    ABORT = "abort"


Check = Awaitable[tuple[int, ...]]
"""Ends when weights are known to be those asked for, with the `weights.identity_of` their files."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; 0 switches `top_k` and `temperature` (greedy) off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    regex: str = ""
    json_schema: str = ""

    @property
    def structure(self) -> Structure | None:
        """What samples have to be, if anything."""
        if self.regex:
            return Structure(Kind.REGEX, self.regex)
        return Structure(Kind.JSON_SCHEMA, self.json_schema) if self.json_schema else None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it `n` times."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    n: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) were sampled under `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation; `token_exact` is False when ids were re-encoded from text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str
    token_exact: bool = True


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to a request; `cached_tokens` is 0 where an engine does not say."""

    completions: tuple[Completion, ...]
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves."""

    name: str
    model: str
    dtype: str
    vocabulary: int
    context_length: int
    end_of_turn_id: int
    token_exact: bool = True
    structures: bool = False
    """Whether `Sampling.regex` and `json_schema` are honoured."""
    swaps_weights: bool = True
    """Whether `load` works."""
    sleeps: bool = False
    """Whether `sleep` gives memory back."""
    receivers: int = 0
    """Ranks that `receive` has join a group; 0: it receives nothing."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Weights that a process waits to send to the other ranks of its group."""

    address: str
    port: int
    group: str
    backend: str
    receivers: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Name, type and shape, in the order of sending."""
    sha256: str
    """Of the weights file."""


class Engine(Protocol):
    """Samples from one model; every method belongs to the event loop that called `start`."""

    @property
    def info(self) -> EngineInfo:
        """What is served; valid after `start`."""
        ...

    @property
    def version(self) -> int:
        """Policy version of tokens sampled from now on."""
        ...

    async def start(self) -> None:
        """Load the base model. Raises: RegreenError when it cannot."""
        ...

    async def close(self) -> None:
        """End everything that was started; running requests fail."""
        ...

    async def generate(self, request: Request, on_tokens: TokenSink | None = None) -> Generation:
        """Sample. A cancelled call frees what it held.

        Raises:
            Unavailable: the engine died or cannot be reached; retry.
            InvalidArgument: the engine refuses the request.
        """
        ...

    async def load(self, version: int, path: Path, checked: Check | None = None) -> float:
        """Serve the weights at `path` (a folder or file of safetensors) as `version`.

        `checked` is awaited before they serve, and what it raises is raised. Returns the seconds in
        which no token was sampled.

        Raises:
            FailedPrecondition: the engine cannot swap weights, or they do not fit the model.
            DataLoss: the files cannot be read.
        """
        ...

    def moved(self, path: Path) -> None:
        """The weights that serve lie at `path` from now on: another name of the same bytes."""
        ...

    async def pause(self, mode: PauseMode) -> int:
        """Stop sampling (`in_place`, `abort`); the number of requests that were running."""
        ...

    async def resume(self) -> None:
        """Sample again."""
        ...

    async def abort(self, request_id: str | None) -> int:
        """End one request, or all for None; the number that ended."""
        ...

    async def receive(self, version: int, path: Path, offer: Offer) -> float:
        """Serve what is offered, the weights that lie at `path`, as `version`.

        Returns the seconds in which no token was sampled. When it raises, the old weights serve.

        Raises:
            FailedPrecondition: the engine receives nothing, or not from so many.
            Unavailable: not all of it came to all.
        """
        ...

    @property
    def asleep(self) -> bool:
        """Whether its memory is given back, as `start` may find it."""
        ...

    async def sleep(self) -> None:
        """Give the accelerator's memory back until `wake`; all of it or none.

        Nothing runs when it is called, and nothing is loaded or sampled before `wake`.

        Raises:
            FailedPrecondition: there is none to give back, or others are using it.
            Unavailable: it cannot be given back now; `asleep` says what came of it.
        """
        ...

    async def wake(self, version: int, path: Path | None) -> None:
        """Take the memory back and serve these weights as `version`; sleeps on when it raises.

        Without a path they are those that it slept with.

        Raises:
            FailedPrecondition: the weights do not fit the model.
            DataLoss: the files cannot be read.
            Unavailable: the memory cannot be had now.
        """
        ...


class Apart:
    """An engine that shares nothing with a learner: neither memory nor a process group."""

    async def receive(self, version: int, path: Path, offer: Offer) -> float:
        """Refuse."""
        raise FailedPrecondition("this engine receives no weights; only sglang does")

    @property
    def asleep(self) -> bool:
        """Never."""
        return False

    async def sleep(self) -> None:
        """Refuse."""
        raise FailedPrecondition(
            "this engine has no accelerator's memory to give back; only sglang has"
        )

    async def wake(self, version: int, path: Path | None) -> None:
        """Refuse: it never slept."""
        raise FailedPrecondition("this engine does not sleep")


def spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Join per-token versions into spans."""
    found: list[VersionSpan] = []
    for at, version in enumerate(versions):
        if found and found[-1].version == version:
            found[-1] = VersionSpan(version, found[-1].start, at + 1)
        else:
            found.append(VersionSpan(version, at, at + 1))
    return tuple(found)
