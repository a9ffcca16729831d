"""The token stream of an episode and the Trajectory it becomes.

- Append-only: the prompt of turn n with its sample is a bit-exact prefix of the prompt of turn
  n+1 of the same segment; `check` proves it from hashes taken when each prompt was sent.
- A segment begins with a PROMPT turn; the full pipeline resets the context by starting a new one.
- Turns cover the stream without gaps; mask, logprobs and versions are set on tokens that the actor
  said and that may be learned from, and on no others.
- Text is never turned into ids here: ids come from the policy service alone.
"""

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from regreen.dataset import v1 as pb
from regreen.rpc.errors import InfraError


@dataclass(frozen=True, slots=True)
class Sample:
    """One output of an actor, as exact token ids."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[tuple[int, int, int]] = ()
    """(version, start, end) over `token_ids`."""
    finish: str = "stop"
    """`stop`, `length` or `abort`."""
    token_exact: bool = True
    learned: bool = True
    """Whether its tokens may carry loss; not those of a mistake that a script shows on purpose."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One unbroken context of a trajectory: what a learner may treat as one sequence."""

    token_ids: tuple[int, ...]
    loss_mask: bytes
    logprobs: tuple[float, ...]
    versions: tuple[tuple[int, int, int], ...]
    """(version, start, end) relative to the segment."""
    prompt_tokens: int
    start: int
    """Of its first token in the trajectory."""

    def turn_scores(self, trajectory: pb.Trajectory) -> list[float]:
        """Of each token of its trajectory's the own score of its turn; 0 where it has no loss."""
        found = [0.0] * len(self.token_ids)
        for turn in trajectory.turns:
            if turn.score:
                for place in range(turn.token_start - self.start, turn.token_end - self.start):
                    if 0 <= place < len(found) and self.loss_mask[place]:
                        found[place] = turn.score
        return found


@dataclass(slots=True)
class TokenStream:
    """Everything said in an episode, as tokens and as turns."""

    token_ids: list[int] = field(default_factory=list)
    mask: bytearray = field(default_factory=bytearray)
    logprobs: list[float] = field(default_factory=list)
    versions: list[pb.TokenVersion] = field(default_factory=list)
    turns: list[pb.Turn] = field(default_factory=list)
    token_exact: bool = True
    segment_start: int = 0
    _sent: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def context(self) -> list[int]:
        """Ids of the current segment: the prompt of the next sample."""
        return self.token_ids[self.segment_start :]

    def sending(self) -> list[int]:
        """The context, remembered by hash so that `check` can prove that it never changed."""
        context = self.context
        self._sent.append((self.segment_start, len(self.token_ids), _hash(context)))
        return context

    def add_prompt(self, token_ids: Sequence[int], text: str) -> None:
        """Begin a segment."""
        self.segment_start = len(self.token_ids)
        self._append(token_ids)
        self._turn(pb.TURN_ROLE_PROMPT, text, len(token_ids), ok=True)

    def add_prefix(self, token_ids: Sequence[int], turns: Sequence[pb.Turn]) -> None:
        """Begin with the context of another trajectory, from a prompt on; it carries no loss."""
        offset = turns[0].token_start - len(self.token_ids)
        self.segment_start = len(self.token_ids)
        self._append(token_ids)
        for turn in turns:
            copy = pb.Turn()
            copy.CopyFrom(turn)
            copy.index = len(self.turns)
            copy.token_start -= offset
            copy.token_end -= offset
            self.turns.append(copy)

    def add_sample(
        self, sample: Sample, *, tool: str, arguments_json: str, ok: bool, duration_s: float = 0.0
    ) -> None:
        """What the actor said, call parsed or not."""
        start = len(self.token_ids)
        if len(sample.logprobs) == len(sample.token_ids):
            logprobs = [float(value) for value in sample.logprobs]
        elif not sample.token_exact:
            logprobs = [0.0] * len(sample.token_ids)
        else:
            raise InfraError("the policy returned another number of logprobs than of tokens")
        self._append(sample.token_ids)
        if sample.learned:
            self.mask[start:] = b"\x01" * len(sample.token_ids)
            self.logprobs[start:] = logprobs
            for version, first, last in sample.versions:
                self.versions.append(
                    pb.TokenVersion(version=version, start=start + first, end=start + last)
                )
        self.token_exact = self.token_exact and sample.token_exact
        turn = self._turn(pb.TURN_ROLE_POLICY, sample.text, len(sample.token_ids), ok=ok)
        turn.tool, turn.arguments_json = tool, arguments_json
        turn.duration.FromNanoseconds(int(duration_s * 1e9))

    def add_result(
        self, token_ids: Sequence[int], text: str, *, tool: str, ok: bool, duration_s: float = 0.0
    ) -> None:
        """A tool's result; no ids when the policy will not see it any more."""
        self._append(token_ids)
        turn = self._turn(pb.TURN_ROLE_TOOL, text, len(token_ids), ok=ok)
        turn.tool = tool
        turn.duration.FromNanoseconds(int(duration_s * 1e9))

    def check(self) -> None:
        """Prove the invariants of this module.

        Raises:
            InfraError: the stream was tampered with; it must not be trained on.
        """
        for start, end, digest in self._sent:
            if _hash(self.token_ids[start:end]) != digest:
                raise InfraError("a prompt that was sent is no prefix of the token stream")
        size = len(self.token_ids)
        position = 0
        for turn in self.turns:
            if turn.token_start != position or turn.token_end < position:
                raise InfraError("turns do not cover the token stream")
            position = turn.token_end
        if position != size or len(self.mask) != size or len(self.logprobs) != size:
            raise InfraError("token stream, mask and logprobs differ in length")
        covered = bytearray(size)
        for span in self.versions:
            covered[span.start : span.end] = b"\x01" * (span.end - span.start)
        if self.token_exact and covered != self.mask:
            raise InfraError("policy versions do not cover the sampled tokens")
        if any(not math.isfinite(value) for value in self.logprobs):
            raise InfraError("a logprob is not finite")

    def fill(self, trajectory: pb.Trajectory) -> None:
        """Write the stream into a trajectory, checked."""
        self.check()
        trajectory.token_ids[:] = self.token_ids
        trajectory.loss_mask = bytes(self.mask)
        trajectory.logprobs[:] = self.logprobs
        del trajectory.versions[:]
        trajectory.versions.extend(_merged(self.versions))
        del trajectory.turns[:]
        trajectory.turns.extend(self.turns)
        trajectory.token_exact = self.token_exact
        trajectory.prompt_tokens = self.turns[0].token_end if self.turns else 0

    def _append(self, token_ids: Sequence[int]) -> None:
        self.token_ids.extend(token_ids)
        self.mask.extend(bytes(len(token_ids)))
        self.logprobs.extend([0.0] * len(token_ids))

    def _turn(self, role: pb.TurnRole.ValueType, text: str, size: int, *, ok: bool) -> pb.Turn:
        end = len(self.token_ids)
        turn = pb.Turn(
            index=len(self.turns),
            role=role,
            text=text,
            token_start=end - size,
            token_end=end,
            ok=ok,
        )
        self.turns.append(turn)
        return turn


def segments(trajectory: pb.Trajectory) -> Iterator[Segment]:
    """The unbroken contexts of a trajectory, in order; one in the simplified pipeline."""
    starts = [t.token_start for t in trajectory.turns if t.role == pb.TURN_ROLE_PROMPT]
    prompts = [t.token_end for t in trajectory.turns if t.role == pb.TURN_ROLE_PROMPT]
    ends = [*starts[1:], len(trajectory.token_ids)]
    for start, prompt_end, end in zip(starts, prompts, ends, strict=True):
        spans = tuple(
            (v.version, max(v.start, start) - start, min(v.end, end) - start)
            for v in trajectory.versions
            if v.start < end and v.end > start
        )
        yield Segment(
            tuple(trajectory.token_ids[start:end]),
            trajectory.loss_mask[start:end],
            tuple(trajectory.logprobs[start:end]),
            spans,
            prompt_end - start,
            start,
        )


def _merged(spans: Sequence[pb.TokenVersion]) -> Iterator[pb.TokenVersion]:
    last: pb.TokenVersion | None = None
    for span in spans:
        if last is not None and last.version == span.version and last.end == span.start:
            last.end = span.end
            continue
        if last is not None:
            yield last
        last = pb.TokenVersion(version=span.version, start=span.start, end=span.end)
    if last is not None:
        yield last


def _hash(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()
