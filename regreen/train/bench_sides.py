"""The two sides of `regreen.train.bench`: Regreen's services, and TRL's trainer.

- Regreen is measured as services: what `regreen train` drives, over the same contracts, with the
  same checkpoint on disk; every byte and process that a user would pay for is inside the clock.
- TRL is one process of its own (`learner_svc.peer`), which takes a step when it is told to.
- Both sides sample the same number of tokens: where a sample ends early, it is asked to go on.
- A side's memory is the sum of the peaks of its processes, which is at least its own peak.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regreen.batch import Batch, Sample, VersionSpan
from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.learner import LearnerClient
from regreen.client.policy import PolicyClient
from regreen.learner import v1 as learner_pb
from regreen.policy import v1 as policy_pb
from regreen.stack.follow import following
from regreen.train.weights import Weights, weights_published

_START_S = 120.0
_LINE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """One step: groups of samples, tokens of each prompt, tokens sampled in each turn."""

    prompts: int = 4
    samples: int = 8
    prompt_tokens: int = 400
    new_tokens: int = 80
    turns: int = 1
    """Between two turns, as many tokens as a turn has come back from a tool."""


@dataclass(slots=True)
class Rollout:
    """A sample under way: its ids so far, and which of them were sampled."""

    prompt_tokens: int
    ids: list[int]
    mask: list[int]
    logprobs: list[float]
    spans: list[VersionSpan]
    text: str = ""

    @classmethod
    def begin(cls, prompt: Sequence[int]) -> "Rollout":
        """A sample that has its prompt only."""
        size = len(prompt)
        return cls(size, list(prompt), [0] * size, [0.0] * size, [])

    def take(self, completion: policy_pb.Completion) -> None:
        """Append what was sampled."""
        start = len(self.ids)
        for span in completion.versions:
            self.spans.append(VersionSpan(start + span.start, start + span.end, span.version))
        self.ids += completion.token_ids
        self.mask += [1] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        self.text += completion.text

    def observe(self, ids: Sequence[int]) -> None:
        """Append what a tool answered."""
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def sample(self, group: str, reward: float) -> Sample:
        """As a batch has it."""
        return Sample.make(
            self.ids,
            self.mask,
            logprobs=self.logprobs,
            group_id=group,
            prompt_len=self.prompt_tokens,
            reward=reward,
            spans=self.spans,
        )


def reward(text: str) -> float:
    """The peer's reward (`learner_svc.peer.reward`): how often a text says "e"."""
    return text.count("e") / max(1, len(text))


def batch_of(groups: Sequence[Sequence[Rollout]]) -> Batch:
    """One learner step's batch of finished samples."""
    return Batch(
        tuple(
            rollout.sample(f"grp_{number}", reward(rollout.text))
            for number, group in enumerate(groups)
            for rollout in group
        )
    )


def observation(turn: int, sample: int, tokens: int) -> list[int]:
    """Ordinary token ids that stand for a tool's answer; every sample's are its own."""
    return [300 + (turn * 7919 + sample * 104729 + at * 31) % 48000 for at in range(tokens)]


class Services:
    """A policy and a learner service, and one run on them."""

    def __init__(
        self,
        home: Path,
        model: Path,
        dtype: str,
        threads: int,
        *,
        policy: Sequence[str] = (),
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        """`policy` are further flags of the policy service; `hyperparameters` are of the run."""
        self._home, self._model, self._dtype, self._threads = home, model, dtype, threads
        self._flags = tuple(policy)
        self._hyperparameters = {"learning_rate": 1e-6} | dict(hyperparameters or {})
        self._processes: list[asyncio.subprocess.Process] = []
        self._run_id = f"bench-{dtype}"
        self._seed = 0
        self.learner_step = self.version = 0
        self.metrics: dict[str, float] = {}
        """The learner's, of the last step."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Services"]:
        """Both services started, the run begun; all ended on the way out."""
        channels = []
        try:
            dtype = "f32" if self._dtype == "fp32" else self._dtype
            threads = ("--threads", str(self._threads))
            policy = await self._start(
                "policy", "--no-restore", "--http", "", "--dtype", dtype, *threads, *self._flags
            )
            learner = await self._start("learner", "--keep-checkpoints", "1")
            channels = [connect(policy, Access()), connect(learner, Access())]
            self.policy = PolicyClient(channels[0], patience_s=_START_S)
            self.learner = LearnerClient(channels[1], patience_s=_START_S)
            self.served = await self.policy.get_policy()
            self.run = await self.learner.start_run(
                self._run_id,
                learner_pb.RUN_KIND_GRPO,
                str(self._model),
                hyperparameters=learner_pb.Hyperparameters(
                    dtype=self._dtype, **self._hyperparameters
                ),
            )
            yield self
        finally:
            for channel in channels:
                await channel.close()
            for process in reversed(self._processes):
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()

    async def _start(self, name: str, *arguments: str) -> str:
        address = f"unix:{self._home}/{name}.sock"
        if name == "policy":
            arguments += ("--model", str(self._model))
        flags = ["--listen", address, "--metrics", "127.0.0.1:0", "--home", str(self._home)]
        command = [sys.executable, "-m", f"{name}_svc", *flags, *arguments]
        with (self._home / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *following(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
            )
        self._processes.append(process)
        return address

    async def rollout(self, prompts: Sequence[Sequence[int]], shape: Shape) -> list[list[Rollout]]:
        """A group of samples for each prompt, each of all its turns."""
        return list(await asyncio.gather(*(self._group(prompt, shape) for prompt in prompts)))

    async def _group(self, prompt: Sequence[int], shape: Shape) -> list[Rollout]:
        group = [Rollout.begin(prompt) for _ in range(shape.samples)]
        # One request for all samples: their prompt is computed once.
        for rollout, completion in zip(
            group, await self._sample(prompt, shape.new_tokens, shape.samples), strict=True
        ):
            rollout.take(completion)
        ends = [shape.prompt_tokens + shape.new_tokens] * shape.samples
        await asyncio.gather(*map(self._fill, group, ends))
        for turn in range(1, shape.turns):
            for number, rollout in enumerate(group):
                rollout.observe(observation(turn, number, shape.new_tokens))
            ends = [end + 2 * shape.new_tokens for end in ends]
            await asyncio.gather(*map(self._fill, group, ends))
        return group

    async def _fill(self, rollout: Rollout, end: int) -> None:
        """Sample up to `end` tokens in all, also past an end of turn."""
        while len(rollout.ids) < end:
            (completion,) = await self._sample(rollout.ids, end - len(rollout.ids), 1)
            rollout.take(completion)

    async def _sample(
        self, ids: Sequence[int], tokens: int, n: int
    ) -> Sequence[policy_pb.Completion]:
        self._seed += 1
        sampling = policy_pb.Sampling(temperature=1.0, max_new_tokens=tokens, seed=self._seed)
        answer = await self.policy.generate(ids, sampling=sampling, n=n, timeout_s=3600.0)
        return answer.completions

    async def update(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """One step of the learner; its metrics."""
        batch = batch_of(groups)
        self.learner_step += 1
        answer = await self.learner.step(self._run_id, self.learner_step, batch=batch.to_bytes())
        return dict(answer.metrics)

    async def publish(self) -> Weights:
        """Have the learner write its weights where the policy finds them."""
        self.version += 1
        made = await self.learner.publish_weights(
            self._run_id, policy_version=self.version, driver_step=self.learner_step
        )
        return weights_published(made)

    async def load(self, weights: Weights) -> float:
        """Have the policy serve them; seconds."""
        began_s = time.perf_counter()
        await self.policy.load_version(weights.to_policy())
        return time.perf_counter() - began_s

    async def save(self) -> float:
        """Write the checkpoint that holds what was published; seconds."""
        began_s = time.perf_counter()
        await self.learner.save_checkpoint(
            self._run_id, policy_version=self.version, driver_step=self.learner_step
        )
        return time.perf_counter() - began_s

    async def live_when_whole(self) -> dict[str, float]:
        """The same by way of a checkpoint: its weights are served once all of it is written."""
        began_s = time.perf_counter()
        self.version += 1
        made = await self.learner.save_checkpoint(self._run_id, policy_version=self.version)
        save_s = time.perf_counter() - began_s
        digest = made.digest
        load_s = await self.load(
            Weights(made.uri, made.policy_version, digest.sha256, digest.size_bytes, made.run_id)
        )
        return {"save_s": save_s, "load_s": load_s, "live_s": save_s + load_s}

    async def warm_up(self) -> None:
        """A whole step of two short samples."""
        shape = Shape(prompts=1, samples=2, prompt_tokens=48, new_tokens=8)
        await self._parts([observation(0, 0, shape.prompt_tokens)], shape)

    async def step(self, prompts: Sequence[Sequence[int]], shape: Shape) -> dict[str, float]:
        """A whole step; seconds of its parts."""
        found, self.metrics = await self._parts(prompts, shape)
        if self.metrics["skipped"]:
            raise RuntimeError("the step taught nothing: all samples of each group are worth alike")
        return found

    async def _parts(
        self, prompts: Sequence[Sequence[int]], shape: Shape
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of the parts of a whole step, and the learner's metrics.

        As a driver does it: the policy loads the weights, then the rest of the checkpoint is
        written. The step ends when both are done, though a driver's next rollouts wait for the
        weights alone.
        """
        marks = [time.perf_counter()]
        groups = await self.rollout(prompts, shape)
        marks.append(time.perf_counter())
        metrics = await self.update(groups)
        marks.append(time.perf_counter())
        found = await self.live()
        ended_s = time.perf_counter()
        found |= {"rollout_s": marks[1] - marks[0], "update_s": marks[2] - marks[1]}
        return found | {"step_s": ended_s - marks[0]}, metrics

    async def live(self) -> dict[str, float]:
        """Have the weights at hand served and saved; seconds of both, and until they served."""
        began_s = time.perf_counter()
        weights = await self.publish()
        publish_s = time.perf_counter() - began_s
        load_s = await self.load(weights)
        save_s = await self.save()
        return {
            "publish_s": publish_s,
            "load_s": load_s,
            "live_s": publish_s + load_s,
            "save_s": save_s,
        }

    def peak_bytes(self) -> int:
        """The sum of the largest resident sets of all processes so far."""
        return sum(map(tree_peak_bytes, [process.pid for process in self._processes]))


def tree_peak_bytes(pid: int) -> int:
    """The largest resident sets of a process and its descendants, added up."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0  # it has just ended
    found = re.search(r"VmHWM:\s+(\d+)", status)
    own = int(found[1]) << 10 if found else 0
    return own + sum(map(tree_peak_bytes, children))


class Trl:
    """TRL's trainer in a process of its own."""

    def __init__(
        self, process: asyncio.subprocess.Process, ready: dict[str, Any], log: Path
    ) -> None:
        self._process, self.ready, self._log = process, ready, log

    @property
    def missing(self) -> str:
        """Why it cannot run; empty if it can."""
        return "" if self.ready["event"] == "ready" else str(self.ready["reason"])

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, home: Path, model: Path, dtype: str, threads: int, shape: Shape
    ) -> AsyncIterator["Trl"]:
        """The trainer, ready for its first step; ended on the way out."""
        options = {"model": model, "output": home, "dtype": dtype, "threads": threads}
        options |= {"prompts": shape.prompts, "samples": shape.samples}
        options |= {"prompt-tokens": shape.prompt_tokens, "new-tokens": shape.new_tokens}
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with (home / "trl.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *following([sys.executable, "-m", "learner_svc.peer", *arguments]),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LINE_BYTES,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"},
            )
        try:
            yield cls(process, await _answer(process, home / "trl.log"), home / "trl.log")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def step(self) -> dict[str, float]:
        """A whole step; seconds of its parts, and the peak of the process's memory.

        Nothing where it cannot run, or ended meanwhile.
        """
        if self.missing:
            return {}
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # the answer tells that it has ended
            self._process.stdin.write(b"\n")
            await self._process.stdin.drain()
        answer = await _answer(self._process, self._log)
        if answer.pop("event") == "missing":
            self.ready = {**self.ready, "event": "missing", **answer}
            return {}
        return answer


async def _answer(process: asyncio.subprocess.Process, log: Path) -> dict[str, Any]:
    """What it says next; that it is missing where it has ended (-9: out of memory, mostly)."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        tail = log.read_text(errors="replace").strip()[-600:]
        why = f"TRL's trainer ended with {await process.wait()}; its log ends: {tail}"
        return {"event": "missing", "reason": why}
    answer: dict[str, Any] = json.loads(line)
    return answer
