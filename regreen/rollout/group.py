"""The shared start of n rollouts of one task: their first prompt, and outputs sampled from it.

- The first output of all members comes from one `Generate(n)` call, so that the prompt is computed
  once; a member uses its share only if its prompt is, id for id, the one that was sent.
- That call depends on the group alone, never on which members run together: a member that is tried
  again or replayed on its own asks for the same outputs and takes the same one.
"""

from dataclasses import dataclass

from regreen.common.v1 import PIPELINE_FULL
from regreen.dataset import v1 as pb
from regreen.ids import derive_seed
from regreen.rollout.actors import PolicyActor, sample_of, sampling_of
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.episode import Runner, check_fair
from regreen.rollout.facts import Facts
from regreen.rollout.full import first_opening
from regreen.rollout.held import held_sandbox
from regreen.rollout.record import Sample
from regreen.rollout.simplified import opening


@dataclass(frozen=True, slots=True)
class SharedStart:
    """A first prompt and outputs that were sampled from it together."""

    prompt: tuple[int, ...]
    samples: tuple[Sample, ...]

    def actor(self, group_index: int) -> PolicyActor:
        """The policy with the first output of a member."""
        return PolicyActor(self.samples[group_index], self.prompt)


async def shared_start(runner: Runner, task: pb.Task, spec: EpisodeSpec, size: int) -> SharedStart:
    """Sample the first outputs of all `size` members of a group in one call.

    Raises:
        RegreenError: trouble of the platform, or the task is not prepared here.
    """
    check_fair(task, spec)
    facts = await _facts(runner, task)
    tools = runner.tools(spec)
    begin = first_opening if spec.pipeline == PIPELINE_FULL else opening
    rendered = await runner.stack.policy.render_chat(
        begin(task, facts, spec, tools, runner.knowledge)
    )
    prompt = tuple(rendered.token_ids)
    room = spec.budget.context_tokens - len(prompt)
    response = await runner.stack.policy.generate(
        prompt,
        n=size,
        sampling=sampling_of(
            spec,
            tools,
            seed=derive_seed(spec.group_seed, "first"),
            max_new_tokens=max(1, min(room, spec.budget.turn_tokens)),
        ),
    )
    samples = tuple(sample_of(completion) for completion in response.completions)
    return SharedStart(prompt, samples)


async def _facts(runner: Runner, task: pb.Task) -> Facts:
    known = runner.facts.peek(task)
    if known is not None:
        return known
    async with held_sandbox(runner.stack, task.state_id, {"task": task.id}) as sandbox_id:
        return await runner.facts.get(runner.stack, task, sandbox_id)
