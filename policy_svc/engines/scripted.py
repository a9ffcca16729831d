"""Answers from a script: a policy without a model, for tests, demos and debugging.

- The same script, prompt and seed give the same tokens; nothing else matters.
- Texts are encoded with a real tokenizer, so token ids, spans and stop rules are real ones.
- Logprobs are 0 (each token had probability 1) and tokens are exact.
- With `delay_s` it simulates an engine of that pace: tokens come when they are due, and a sample
  that nobody streams wakes once, not for each token, so that a thousand cost what their calls cost.

A script is JSON: {"responses": [{"text": "...", "when": "regex", "turn": 2}, ...]}.
The first response whose conditions hold answers: `when` is searched in the decoded prompt, `turn`
counts the assistant turns that the prompt holds, from 0. A response with `texts` gives sample i of
a group the i-th text (modulo their number), offset by the seed when `rotate` is set.
"""

import asyncio
import bisect
import re
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import (
    Apart,
    Check,
    Completion,
    EngineInfo,
    FinishReason,
    Generation,
    PauseMode,
    Request,
    TokenSink,
    spans,
)
from policy_svc.engines.stepper import WeightsError
from policy_svc.engines.weights import Checkpoint
from regreen.rpc.errors import FailedPrecondition

_ASSISTANT = "<|im_start|>assistant\n"


class Response(BaseModel):
    """One scripted answer and when it applies."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    """The answer."""
    texts: list[str] = Field(default_factory=list)
    """Answers of the samples of a group."""
    when: str = ""
    """Regular expression searched in the decoded prompt; empty always holds."""
    turn: int | None = Field(default=None, ge=0)
    """Number of earlier assistant turns in the prompt; null always holds."""
    rotate: bool = False
    """Shift `texts` by the seed, so that different groups see different orders."""
    delay_s: float = Field(default=0.0, ge=0)
    """Time per token."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Response":
        if (self.text is None) == (not self.texts):
            raise ValueError("give either text or texts")
        re.compile(self.when)
        return self


class Script(BaseModel):
    """A whole script."""

    model_config = ConfigDict(extra="forbid")

    responses: list[Response] = Field(min_length=1)
    """Tried in order; the first that applies answers."""

    @classmethod
    def read(cls, path: Path) -> "Script":
        """Read a script file. Raises: FailedPrecondition naming what is wrong in it."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError, re.error) as error:
            raise FailedPrecondition(f"script {path}: {error}") from error


@dataclass(slots=True)
class _Running:
    """A request that plays."""

    aborted: bool = False
    wakes: list[asyncio.Event] = field(default_factory=list)
    """One for each sample: set when its time is over, or something changes meanwhile."""

    def wake(self) -> None:
        """Have every sample look at what has changed."""
        for event in self.wakes:
            event.set()


class ScriptedEngine(Apart):
    """An `Engine` that reads its answers from a `Script`."""

    def __init__(self, script: Script, tokenizer: Tokenizer, end_id: int, context: int) -> None:
        self._script, self._tokenizer, self._end_id = script, tokenizer, end_id
        self._context, self._version = context, 0
        self._running: dict[str, _Running] = {}
        self._go = asyncio.Event()
        self._go.set()

    @property
    def info(self) -> EngineInfo:
        """What is served."""
        return EngineInfo(
            "scripted", "script", "none", self._tokenizer.size, self._context, self._end_id
        )

    @property
    def version(self) -> int:
        """The version that was loaded last."""
        return self._version

    async def start(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """End everything."""
        await self.abort(None)

    async def generate(self, request: Request, on_tokens: TokenSink | None = None) -> Generation:
        """Play the first response that applies."""
        prompt = self._tokenizer.decode(request.prompt_token_ids, control=True)
        response = self._choose(prompt)
        running = self._running[request.request_id] = _Running()
        try:
            samples = [
                self._play(request, response, index, running, on_tokens)
                for index in range(request.n)
            ]
            return Generation(tuple(await asyncio.gather(*samples)))
        finally:
            self._running.pop(request.request_id, None)

    async def load(self, version: int, path: Path, checked: Check | None = None) -> float:
        """Change the version; the weights are opened, so that a bad checkpoint is refused."""
        if checked:
            await checked
        try:
            Checkpoint(path)
        except WeightsError as error:
            raise FailedPrecondition(f"weights were not loaded: {error}") from error
        self._version = version
        self._wake_all()
        return 0.0

    def moved(self, path: Path) -> None:
        """Nothing is read again."""

    async def pause(self, mode: PauseMode) -> int:
        """Freeze or end what plays."""
        running = len(self._running)
        if mode is PauseMode.ABORT:
            await self.abort(None)
        elif mode is PauseMode.IN_PLACE:
            self._go.clear()
            self._wake_all()
        return running

    async def resume(self) -> None:
        """Play on."""
        self._go.set()

    async def abort(self, request_id: str | None) -> int:
        """End requests with what they have."""
        chosen = [r for i, r in self._running.items() if request_id in (None, i)]
        for running in chosen:
            running.aborted = True
            running.wake()
        return len(chosen)

    def _wake_all(self) -> None:
        for running in self._running.values():
            running.wake()

    def _choose(self, prompt: str) -> Response:
        turn = max(0, prompt.count(_ASSISTANT) - 1)
        for response in self._script.responses:
            if response.turn not in (None, turn):
                continue
            if re.search(response.when, prompt, re.DOTALL):
                return response
        raise FailedPrecondition(f"the script has no response for turn {turn} of this prompt")

    async def _play(
        self,
        request: Request,
        response: Response,
        index: int,
        running: _Running,
        on_tokens: TokenSink | None,
    ) -> Completion:
        texts = response.texts or [response.text or ""]
        shift = request.sampling.seed if response.rotate else 0
        planned = [*self._tokenizer.encode(texts[(index + shift) % len(texts)]), self._end_id]
        planned = planned[: request.sampling.max_new_tokens]
        planned, reason = self._until_stop(request, planned)
        versions: list[int] = []
        wake = asyncio.Event()
        running.wakes.append(wake)
        while len(versions) < len(planned):
            due = 1 if on_tokens else len(planned) - len(versions)
            version = self._version
            came = await self._wait_turn(running, wake, response.delay_s, due)
            if running.aborted:
                reason = FinishReason.ABORT
                break
            fresh = planned[len(versions) : len(versions) + came]
            versions += [version] * len(fresh)
            if on_tokens and fresh:
                on_tokens(index, fresh, [0.0] * len(fresh))
        ids = planned[: len(versions)]
        text = self._tokenizer.decode(ids)
        return Completion(tuple(ids), (0.0,) * len(ids), spans(versions), reason, text)

    async def _wait_turn(
        self, running: _Running, wake: asyncio.Event, delay_s: float, due: int
    ) -> int:
        """Wait until `due` tokens have come, or something changed; how many have come."""
        while not self._go.is_set() and not running.aborted:
            resumed = asyncio.create_task(self._go.wait())
            woken = asyncio.create_task(wake.wait())
            await asyncio.wait((resumed, woken), return_when=asyncio.FIRST_COMPLETED)
            resumed.cancel()
            woken.cancel()
            wake.clear()
        if not delay_s or running.aborted:
            return due
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        wake.clear()  # what changed before is known
        timer = loop.call_later(delay_s * due, wake.set)
        try:
            await wake.wait()
        finally:
            timer.cancel()
        return min(due, round((loop.time() - began_s) / delay_s))

    def _until_stop(self, request: Request, planned: list[int]) -> tuple[list[int], FinishReason]:
        """The tokens up to the first that ends the sample, and why it ends there."""
        sampling, reason = request.sampling, FinishReason.LENGTH
        ends = {self._end_id, *sampling.stop_token_ids}
        for at, token in enumerate(planned):
            if token in ends:
                planned, reason = planned[: at + 1], FinishReason.STOP
                break

        def stopped(count: int) -> bool:
            text = self._tokenizer.decode(planned[:count], control=True)
            return any(stop in text for stop in sampling.stop)

        if sampling.stop and stopped(len(planned)):
            count = bisect.bisect_left(range(len(planned)), True, key=stopped)
            return planned[:count], FinishReason.STOP
        return planned, reason
