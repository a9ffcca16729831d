"""Who acts in an episode: the policy, or a script that speaks through the same tokens.

- Every actor gives exact token ids from the policy service; the loop cannot tell them apart.
- The policy's logprobs and versions are kept as sampled; a script has logprob 0 and version 0.
- A sample that the policy service aborted is never recorded: it is drawn again, boundedly.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from regreen.policy import v1 as policy_pb
from regreen.rollout.calls import Call
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.facts import Facts
from regreen.rollout.logs import PrimaryError
from regreen.rollout.record import Sample
from regreen.rollout.tools import Observation
from regreen.rollout.toolset import ToolSet
from regreen.rpc.errors import Unavailable

if TYPE_CHECKING:
    from regreen.client.stack import Stack

_ABORT_TRIES = 5


@dataclass(frozen=True, slots=True)
class View:
    """What an actor may look at when it is its turn."""

    context: Sequence[int]
    """Token ids of the current segment."""
    max_new_tokens: int
    turn: int
    """Outputs so far in the episode."""
    trajectory_id: str
    spec: EpisodeSpec
    tools: ToolSet
    facts: Facts
    error: PrimaryError | None
    """The error to repair now."""
    history: Sequence[tuple[Call | None, Observation]] = ()
    """What was called in this segment, and what came back."""


class Actor(Protocol):
    """Says what to do next."""

    @property
    def name(self) -> str:
        """`policy`, `expert` or `baseline:<name>`."""
        ...

    async def act(self, stack: "Stack", view: View) -> Sample:
        """The next output."""
        ...


def sampling_of(
    spec: EpisodeSpec, tools: ToolSet, *, seed: int, max_new_tokens: int
) -> policy_pb.Sampling:
    """Sampling settings of one turn: a call ends the turn."""
    return policy_pb.Sampling(
        temperature=spec.sampling.temperature,
        top_p=spec.sampling.top_p,
        top_k=spec.sampling.top_k,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop=[tools.call_close],
    )


def sample_of(completion: policy_pb.Completion) -> Sample:
    """A completion as the record keeps it."""
    return Sample(
        completion.text,
        tuple(completion.token_ids),
        tuple(completion.logprobs),
        tuple((span.version, span.start, span.end) for span in completion.versions),
        policy_pb.FinishReason.Name(completion.finish_reason)[14:].lower(),
        completion.token_exact,
    )


@dataclass(slots=True)
class PolicyActor:
    """The current policy. `first` is an output that a group sampled from `prompt` already."""

    first: Sample | None = None
    prompt: tuple[int, ...] = ()
    name: str = field(default="policy", init=False)

    async def act(self, stack: "Stack", view: View) -> Sample:
        """Sample one output.

        Raises:
            Unavailable: the service aborted this output again and again.
        """
        first, self.first = self.first, None
        if first is not None and first.finish != "abort" and tuple(view.context) == self.prompt:
            return first
        sampling = sampling_of(
            view.spec,
            view.tools,
            seed=view.spec.turn_seed(view.turn),
            max_new_tokens=view.max_new_tokens,
        )
        for _ in range(_ABORT_TRIES):
            response = await stack.policy.generate(
                view.context,
                sampling=sampling,
                trajectory_id=view.trajectory_id,
            )
            completion = response.completions[0]
            if completion.finish_reason != policy_pb.FINISH_REASON_ABORT:
                return sample_of(completion)
        raise Unavailable("the policy service keeps aborting this request")


class Slip(str):
    """What a script says as a mistake to recover from: shown in the context, never learned."""

    __slots__ = ()


@dataclass(slots=True)
class ScriptedActor:
    """A script over what is visible; `decide` gives the text of the next output, or a `Slip`."""

    name: str
    decide: Callable[[View], Awaitable[str]]

    async def act(self, stack: "Stack", view: View) -> Sample:
        """The script's text as the policy's own tokens."""
        text = await self.decide(view)
        ids = (await stack.policy.tokenize(text=text)).token_ids
        versions = ((0, 0, len(ids)),) if ids else ()
        learned = not isinstance(text, Slip)
        return Sample(str(text), tuple(ids), (0.0,) * len(ids), versions, learned=learned)
