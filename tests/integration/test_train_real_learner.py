"""The drivers with the real learner in its own process, killed and started again."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from regreen.client.stack import Endpoints, Stack
from regreen.common import v1 as common_pb
from regreen.train.config import GrpoConfig, SftConfig
from regreen.train.experts import KEPT, recipe
from regreen.train.rl import train_grpo
from regreen.train.sft import train_sft
from tests.integration import dataset_samples as samples
from tests.integration.train_services import (
    Killed,
    World,
    admitted,
    rollout,
    scripted_workers,
    world,
)

pytestmark = pytest.mark.slow
VOCAB = 997


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


class LearnerProcess:
    """`python -m learner_svc`, which can be killed and comes back at the same address."""

    def __init__(self, home: Path) -> None:
        self.home, self.port, self.kills = home, _free_port(), 0
        self.process: asyncio.subprocess.Process | None = None
        self.again: asyncio.Future[None] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        arguments = ["--listen", self.address, "--metrics", "127.0.0.1:0", "--engine", "plain"]
        with (self.home / "learner.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "learner_svc", *arguments, "--home", str(self.home),
                stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill(self) -> None:
        """kill -9, and start it again as a supervisor would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.kills += 1
        self.again = asyncio.ensure_future(self.start())

    async def stop(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def learner(home: Path) -> AsyncIterator[LearnerProcess]:
    process = LearnerProcess(home)
    await process.start()
    try:
        yield process
    finally:
        await process.stop()


@pytest.fixture
async def place(dataset_address: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world(dataset_address, tmp_path) as found:
        yield found


def stack_of(place: World, process: LearnerProcess) -> Stack:
    endpoints = Endpoints(
        dataset=place.dataset, policy=place.policy_address, learner=process.address
    )
    return Stack(endpoints, patience_s=60.0)


async def experts(stack: Stack) -> tuple[str, ...]:
    tasks = await admitted(stack, 3)
    for index, task_id in enumerate(tasks):
        for style, tokens in enumerate((32 + 4 * index, 36 + 4 * index)):
            found = samples.trajectory(task_id, tokens=tokens)
            found.token_ids[:] = [(7 * n + tokens) % VOCAB for n in range(tokens)]
            found.mode, found.actor = common_pb.MODE_KEEP_NEW, "expert"
            found.group_index = style
            found.labels.update({"recipe": recipe(SftConfig(name="any")), KEPT: "2"})
            await stack.trajectories.commit_trajectory(found)
    return tasks


async def test_supervised_weights_are_bit_equal_after_a_kill(
    place: World, tiny_model: Path, tmp_path: Path
):
    async with learner(tmp_path) as process, stack_of(place, process) as stack:
        tasks = await experts(stack)

        def config(**changes) -> SftConfig:
            return SftConfig(
                name=samples.fresh("sft"), tasks=tasks, modes=("keep_new",), epochs=3, batch_size=2,
                checkpoint_every=2, base_uri=str(tiny_model),
                hyperparameters={"learning_rate": 1e-2}, **changes,
            )  # fmt: skip

        quiet = await train_sft(stack, config())

        def listener(progress):
            if progress.stage == "sft" and progress.done == 3 and process.kills == 0:
                process.kill()

        disturbed = await train_sft(stack, config(), listener)
        losses = await stack.runs.list_metrics(disturbed.run_id, names=["learner/loss"])
    assert process.kills == 1
    assert (quiet.steps, disturbed.steps) == (9, 9)
    assert quiet.sha256 == disturbed.sha256 != ""
    assert losses[-1].value < losses[0].value


async def test_grpo_goes_on_through_kills_of_the_learner(
    place: World, tiny_model: Path, tmp_path: Path
):
    async with learner(tmp_path) as process, stack_of(place, process) as stack:
        tasks = await admitted(stack)
        config = GrpoConfig(
            name=samples.fresh("grpo"), tasks=tasks, steps=3, groups_per_step=2, group_size=2,
            base_uri=str(tiny_model), hyperparameters={"learning_rate": 1e-3}, concurrency=0,
            idle_deadline_s=60.0,
        )  # fmt: skip

        def listener(progress):
            if progress.stage == "learn" and not progress.done and process.kills < 2:
                process.kill()

        async with scripted_workers(place, "", 1):
            result = await train_grpo(stack, config, listener)
        queue = await stack.queue.get_queue(result.run_id)
        metrics = await stack.runs.list_metrics(result.run_id, names=["learner/grad_norm"])
        records = (await stack.runs.list_checkpoints(result.run_id)).checkpoints
    assert process.kills == 2
    assert result.state == "done"
    assert {state for state, count in queue.groups.items() if count} == {"acknowledged"}
    ids = [id for record in records for id in record.group_ids]
    assert len(ids) == len(set(ids)) == queue.groups["acknowledged"]
    assert metrics
    assert place.policy.serving.digest.sha256 == result.sha256


async def test_a_run_credits_turns_where_it_asks_for_it(
    place: World, tiny_model: Path, tmp_path: Path
):
    def scored(lease, version):
        found = rollout(lease, version)
        found.turns[1].score = 0.5
        return found

    name = "learner/turn_scored_fraction"
    async with learner(tmp_path) as process, stack_of(place, process) as stack:
        tasks = await admitted(stack)
        means = {}
        for coefficient in (0.0, 0.4):
            config = GrpoConfig(
                name=samples.fresh("grpo"), tasks=tasks, steps=1, groups_per_step=2, group_size=2,
                base_uri=str(tiny_model), concurrency=0, idle_deadline_s=60.0,
                hyperparameters={"learning_rate": 1e-3, "turn_score_coefficient": coefficient},
            )  # fmt: skip
            async with scripted_workers(place, "", 1, scored):
                result = await train_grpo(stack, config)
            found = await stack.runs.list_metrics(result.run_id, names=[name])
            means[coefficient] = [metric.value for metric in found]
    assert means == {0.0: [], 0.4: [1.0]}


@pytest.mark.timeout(600)  # five starts of the learner
async def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    place: World, tiny_model: Path, tmp_path: Path
):
    told: list[str] = []
    async with learner(tmp_path) as process, stack_of(place, process) as stack:
        tasks = await admitted(stack)
        config = GrpoConfig(
            name=samples.fresh("grpo"), tasks=tasks, steps=3, groups_per_step=2, group_size=2,
            base_uri=str(tiny_model), hyperparameters={"learning_rate": 1e-3}, concurrency=0,
            idle_deadline_s=60.0, recovery_deadline_s=5.0,
        )  # fmt: skip

        def stop_after_the_second_step(progress):
            if (progress.stage, progress.done, progress.detail) == ("checkpoint", 1, "step 2"):
                raise Killed

        def listener(progress):
            if progress.stage == "recover":
                told.append(progress.detail)

        async with scripted_workers(place, "", 1):
            with pytest.raises(Killed):
                await train_grpo(stack, config, stop_after_the_second_step)
            run = await stack.runs.get_run(config.name)
            newest, before = (await stack.runs.list_checkpoints(run.id)).checkpoints
            weights = Path(newest.uri) / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-4] + b"!!!!")
            result = await train_grpo(stack, config, listener)
        queue = await stack.queue.get_queue(run.id)
        records = (await stack.runs.list_checkpoints(run.id)).checkpoints
    assert result.state == "done"
    assert [(r.step, r.id == before.id) for r in records] == [(3, False), (2, False), (1, True)]
    assert newest.id not in {record.id for record in records}
    ids = [id for record in records for id in record.group_ids]
    assert len(ids) == len(set(ids)) == queue.groups["acknowledged"]
    assert place.policy.serving.digest.sha256 == result.sha256
    assert any("goes on from the checkpoint of step 1" in detail for detail in told), told
    assert any("does not match its digest" in detail for detail in told), told
