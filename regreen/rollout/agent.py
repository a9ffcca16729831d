"""The agent loop: render, generate, parse, act, observe; nothing else.

- Tokens are only ever appended: prompt ids, sampled ids, and the ids that `RenderChat` says
  follow a sampled turn. Text is never tokenized again.
- Every limit ends the loop with its own name; an output that gains nothing (no usable call, or a
  call and result seen before) is an observation, not an end, until there are too many in a row.
- The loop knows no reward and no grader.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from regreen.policy.v1 import ChatMessage
from regreen.rollout.actors import Actor, View
from regreen.rollout.calls import Call, CallError, parse_call
from regreen.rollout.context import EpisodeSpec
from regreen.rollout.logs import PrimaryError
from regreen.rollout.progress import TurnListener, TurnProgress, ignore
from regreen.rollout.prompts import harmless, without_turns
from regreen.rollout.record import TokenStream
from regreen.rollout.tools import Observation, Workbench
from regreen.rollout.toolset import ToolSet
from regreen.rollout.turn_scores import TurnScores
from regreen.rpc import traces
from regreen.rpc.errors import FailedPrecondition

if TYPE_CHECKING:
    from regreen.client.stack import Stack

Stop = Literal["passed", "gave-up", "turn-limit", "token-limit", "time-limit", "stuck", "changed"]
_LEAST_TOKENS = 8
_EDITS = frozenset({"write_file", "run_sh"})
_CHANGING = _EDITS | {"dependency_upgrade", "remove_dependency", "upgrade_gradle"}
"""Tools that may change files of the sandbox."""


@dataclass(slots=True)
class Agent:
    """One actor at one workbench; survives context resets."""

    stack: "Stack"
    bench: Workbench
    actor: Actor
    spec: EpisodeSpec
    tools: ToolSet
    trajectory_id: str
    deadline_s: float
    """On the scale of `clock`."""
    clock: Callable[[], float] = time.monotonic
    listener: TurnListener = ignore
    stream: TokenStream = field(default_factory=TokenStream)
    turns: int = 0
    error: PrimaryError | None = None
    """The error that is being repaired."""
    history: list[tuple[Call | None, Observation]] = field(default_factory=list)
    resumed_turns: int = 0
    """Of a branch: outputs of the prefix in the present context."""
    state_id: str = ""
    """With `knobs.keep_states`: the State that holds the sandbox's files as they are."""
    scores: TurnScores = field(init=False)

    def __post_init__(self) -> None:
        self.scores = self._scores(fresh=False)

    async def begin(self, messages: Sequence[ChatMessage], error: PrimaryError | None) -> None:
        """Start a fresh context with a prompt."""
        rendered = await self.stack.policy.render_chat(messages)
        fresh = not self.stream.turns
        self.stream.add_prompt(list(rendered.token_ids), rendered.text)
        self.error, self.history = error, []
        self.scores = self._scores(fresh=fresh)
        self._name_state()

    def _scores(self, *, fresh: bool) -> TurnScores:
        task = self.bench.task
        wanted = list(task.fail_to_pass) or list(task.environment.test.fail_to_pass)
        return TurnScores(wanted, task.pass_to_pass_count, fresh=fresh)

    def _name_state(self) -> None:
        """Record with the latest turn which State holds the files after it."""
        if self.spec.knobs.keep_states:
            self.stream.turns[-1].state_id = self.state_id

    def tell(self, doing: str, found: str = "") -> None:
        """Say what is done now, or what it found."""
        turn = self.turns + 1 if doing == "generate" else self.turns
        self.listener(TurnProgress(turn, self.spec.turns(), doing, found))

    async def run(
        self, turns: int, changed: Callable[[Observation], bool] = lambda seen: False
    ) -> Stop:
        """Act until something ends the episode, `turns` are used, or `changed` says so."""
        idle = 0
        for _ in range(turns):
            if self.clock() >= self.deadline_s:
                return "time-limit"
            room = self.spec.budget.context_tokens - len(self.stream.context)
            if room < _LEAST_TOKENS:
                return "token-limit"
            with traces.span("turn", turn=self.turns + 1):
                call, seen = await self._step(min(room, self.spec.budget.turn_tokens))
            if seen.ending:
                return seen.ending
            if changed(seen):
                return "changed"
            idle = idle + 1 if self._gained_nothing(call, seen) else 0
            if idle >= self.spec.budget.idle_turns:
                return "stuck"
        return "turn-limit"

    def _gained_nothing(self, call: Call | None, seen: Observation) -> bool:
        """Whether the latest output made no usable call, or one whose result was known already."""
        if call is None:
            return True
        for past, told in reversed(self.history[:-1]):
            if past == call and told.text == seen.text:
                return True
            if past is not None and past.key in _EDITS and told.ok:
                return False  # what was seen before an edit is worth another look
        return False

    async def _step(self, max_new_tokens: int) -> tuple[Call | None, Observation]:
        started = self.clock()
        view = View(
            self.stream.sending(),
            max_new_tokens,
            self.turns,
            self.trajectory_id,
            self.spec,
            self.tools,
            self.bench.facts,
            self.error,
            self.history,
        )
        self.tell("generate")
        sample = await self.actor.act(self.stack, view)
        said_s = self.clock() - started
        self.bench.spend("generate", said_s)
        self.turns += 1
        call: Call | None = None
        problem = ""
        try:
            call = parse_call(sample.text, self.tools)
        except CallError as error:
            problem = str(error)
        self.stream.add_sample(
            sample,
            tool=call.key if call else "",
            arguments_json=call.arguments_json if call else "",
            ok=call is not None,
            duration_s=said_s,
        )
        turn = self.stream.turns[-1]
        self.tell(call.key if call else "no usable call")
        if call is None:
            seen = Observation(f"error: {problem}", ok=False)
        else:
            seen = await self.bench.call(call)
            if call.key == "validate_and_build":
                self.tell(call.key, seen.headline)
        changed = call is not None and call.key in _CHANGING and (seen.ok or call.key == "run_sh")
        self.scores.saw(turn, changed=changed, validation=seen.validation)
        await self._observe(call, seen, self.clock() - started - said_s)
        if self.spec.knobs.keep_states and call is not None and call.key in _CHANGING:
            await self._keep_state()
        self._name_state()
        return call, seen

    async def _keep_state(self) -> None:
        try:
            self.state_id = await self.bench.keep_state(self.trajectory_id)
        except FailedPrecondition as error:
            if "overrun" not in error.metadata:
                raise
            self.state_id = ""  # the call has ended the sandbox, as the next one will be told

    async def _observe(self, call: Call | None, seen: Observation, seconds: float) -> None:
        name = call.name if call else "error"
        # A complaint about the call shows the format, so its tags must stay as they are.
        said = harmless(seen.text, self.tools) if call else without_turns(seen.text)
        text = self.tools.render_result(name, said)
        ids: list[int] = []
        if not seen.ending:
            rendered = await self.stack.policy.render_chat(
                [ChatMessage(role="user", content=text)],
                continues=True,
                last_token_id=self.stream.token_ids[-1],
            )
            ids = list(rendered.token_ids)
        self.stream.add_result(
            ids, text, tool=call.key if call else "", ok=seen.ok, duration_s=seconds
        )
        self.history.append((call, seen))
