"""Answers from a script: a policy without a model, for tests, demos and debugging.

- The same script, prompt and seed give the same tokens; nothing else matters.
- Texts are encoded with a real tokenizer, so token ids, spans and stop rules are real ones.
- Logprobs are 0 (each token had probability 1) and tokens are exact.

A script is JSON: {"responses": [{"text": "...", "when": "regex", "turn": 2}, ...]}.
The first response whose conditions hold answers: `when` is searched in the decoded prompt, `turn`
counts the assistant turns that the prompt holds, from 0. A response with `texts` gives sample i of
a group the i-th text (modulo their number), offset by the seed when `rotate` is set.
"""

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import (
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
    aborted: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedEngine:
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

    async def load(self, version: int, path: Path) -> float:
        """Change the version; the weights are opened, so that a bad checkpoint is refused."""
        try:
            Checkpoint(path)
        except WeightsError as error:
            raise FailedPrecondition(f"weights were not loaded: {error}") from error
        self._version = version
        return 0.0

    async def pause(self, mode: PauseMode) -> int:
        """Freeze or end what plays."""
        running = len(self._running)
        if mode is PauseMode.ABORT:
            await self.abort(None)
        elif mode is PauseMode.IN_PLACE:
            self._go.clear()
        return running

    async def resume(self) -> None:
        """Play on."""
        self._go.set()

    async def abort(self, request_id: str | None) -> int:
        """End requests with what they have."""
        chosen = [r for i, r in self._running.items() if request_id in (None, i)]
        for running in chosen:
            running.aborted.set()
        return len(chosen)

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
        ids: list[int] = []
        versions: list[int] = []
        reason = FinishReason.LENGTH
        for token in planned[: request.sampling.max_new_tokens]:
            if not await self._turn_to_play(running, response.delay_s):
                reason = FinishReason.ABORT
                break
            ids.append(token)
            versions.append(self._version)
            if on_tokens:
                on_tokens(index, [token], [0.0])
            if self._stops(request, ids):
                reason = FinishReason.STOP
                break
        text = self._tokenizer.decode(ids)
        return Completion(tuple(ids), (0.0,) * len(ids), spans(versions), reason, text)

    async def _turn_to_play(self, running: _Running, delay_s: float) -> bool:
        """Wait for the pause to end and the delay to pass; False when aborted meanwhile."""
        if delay_s or not self._go.is_set():
            go = asyncio.create_task(self._wait_turn(delay_s))
            aborted = asyncio.create_task(running.aborted.wait())
            try:
                await asyncio.wait((go, aborted), return_when=asyncio.FIRST_COMPLETED)
            finally:
                go.cancel()
                aborted.cancel()
        return not running.aborted.is_set()

    async def _wait_turn(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await self._go.wait()

    def _stops(self, request: Request, ids: list[int]) -> bool:
        sampling = request.sampling
        if ids[-1] == self._end_id or ids[-1] in sampling.stop_token_ids:
            return True
        if not sampling.stop:
            return False
        text = self._tokenizer.decode(ids, control=True)
        return any(stop in text for stop in sampling.stop)
