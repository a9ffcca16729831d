"""`regreen train --dry-run`: the plan, the refusals of the real command, and nothing written."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from learner_svc.run import RunsConfig
from learner_svc.runs import Runs
from learner_svc.servicer import LearnerServicer
from regreen.blobs import open_blobs
from regreen.client.stack import Stack
from regreen.learner import v1 as learner_pb
from regreen.rpc.server import Server
from regreen.settings import ServiceSettings
from regreen.train.rows import all_runs
from regreen.train.sft import train_sft
from tests.integration import dataset_samples as samples
from tests.integration.commands import regreen, stack_home
from tests.integration.test_train_sft import config_of, expert, with_experts
from tests.integration.train_services import LearnerState, World, admitted, world

SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "tie_word_embeddings": True,
}


@dataclass
class Scene:
    """A stack with the real learner; `world` has the small one, for runs that were trained."""

    world: World
    home: Path
    learner_home: Path
    address: str
    model: Path

    async def left(self) -> tuple[int, list[str]]:
        """Runs that are recorded, and files of the learner."""
        async with self.world.stack() as stack:
            runs = [run async for run in all_runs(stack)]
        files = self.learner_home.rglob("*")
        return len(runs), sorted(str(path) for path in files)


@pytest.fixture
async def scene(dataset_address: str, tmp_path: Path) -> AsyncIterator[Scene]:
    model, at = tmp_path / "model", tmp_path / "learner-home"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    runs = Runs(at, open_blobs(at / "blobs"), RunsConfig(processes=2))
    settings = ServiceSettings(listen="127.0.0.1:0", metrics="127.0.0.1:0", home=at, drain_s=0.1)
    server = Server(settings, [])
    learner_pb.add_LearnerServiceServicer_to_server(LearnerServicer(runs, "deepspeed"), server.grpc)
    try:
        async with server, world(dataset_address, tmp_path) as place:
            place.policy.serving.uri = str(model)
            home = stack_home(
                tmp_path,
                dataset=place.dataset,
                policy=place.policy_address,
                learner=server.address,
            )
            yield Scene(place, home, at, server.address, model)
    finally:
        await runs.close()


def task_words(tasks: tuple[str, ...]) -> list[str]:
    return [word for task in tasks for word in ("--task", task)]


async def test_a_grpo_plan_says_what_would_be_done_and_leaves_nothing(scene: Scene):
    async with scene.world.stack() as stack:
        tasks = await admitted(stack)
    name, before = samples.fresh("planned"), await scene.left()
    words = ["train", "grpo", "--name", name, "--start", "base", *task_words(tasks)]
    words += ["--steps", "5", "--groups", "3", "--group-size", "4", "--pipeline", "full"]
    words += ["--hyper", "micro_batch_tokens=512", "--dry-run"]
    code, out, err = await regreen(scene.home, *words, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["action"], plan["steps"], plan["steps_done"]) == ("start", 5, 0)
    assert (plan["tasks"], plan["modes"]) == (list(tasks), ["any_fix"])
    assert (plan["pipelines"], plan["grader"]) == (["full"], "build_gates")
    assert (plan["start"], plan["weights"]["uri"]) == ("base", str(scene.model))
    assert plan["amounts"] == {
        "groups": 15,
        "groups_per_step": 3,
        "group_size": 4,
        "rollouts": 60,
        "most_rollouts": 140,
    }
    learner = plan["learner"]
    per_layer = 64 * 16 * 16 + 3 * 64 * 128 + 2 * 64
    assert int(learner["parameters"]) == 1000 * 64 + 4 * per_layer
    assert int(learner["estimated_memory_bytes"]) > 600 << 20
    assert int(learner["available_memory_bytes"]) > int(learner["estimated_memory_bytes"])
    assert learner["hyperparameters"]["micro_batch_tokens"] == 512
    assert learner["hyperparameters"]["clip_high"] == pytest.approx(0.28)
    assert (learner["engine"], plan["time"]) == ("deepspeed", None)
    code, out, err = await regreen(scene.home, *words)
    assert code == 0, err
    assert "no earlier run was measured" in out
    assert "GiB available" in out
    code, out, err = await regreen(scene.home, *words, "--hyper", "sequence_parallel=2")
    assert code == 0, err
    assert "2 ranks divide each sequence" in " ".join(out.split())
    assert await scene.left() == before
    assert scene.world.policy.loaded == []


async def test_a_supervised_plan_counts_what_is_there_and_what_is_to_be_made(scene: Scene):
    async with scene.world.stack() as stack:
        tasks = await with_experts(stack)
        bare = await admitted(stack, 2)
    name, before = samples.fresh("planned"), await scene.left()
    words = ("train", "sft", "--name", name, "--batch-size", "2", "--dry-run", "--json")
    code, out, err = await regreen(scene.home, *words, *task_words(tasks))
    assert code == 0, err
    plan = json.loads(out)
    assert plan["amounts"]["trajectories"] == 9
    assert (plan["amounts"]["experts_to_make"], plan["steps"], plan["notes"]) == (0, 10, [])
    code, out, err = await regreen(scene.home, *words, *task_words((*tasks, *bare)))
    assert code == 0, err
    plan = json.loads(out)
    assert plan["amounts"]["experts_to_make"] == 6
    assert "2 sets of up to 3 expert trajectories would be made first" in plan["notes"][0]
    assert await scene.left() == before


async def test_a_time_is_that_of_an_earlier_run_which_is_named(scene: Scene):
    small = scene.world
    async with small.stack() as stack:
        tasks = await with_experts(stack)
        earlier = config_of(tasks)
        result = await train_sft(stack, earlier)
        for step in range(1, result.steps + 1):
            await stack.runs.record_metrics(result.run_id, step, {"seconds/learn": 3.0})
    words = ("train", "sft", "--name", samples.fresh("timed"), "--batch-size", "4", "--dry-run")
    code, out, err = await regreen(scene.home, *words, *task_words(tasks), "--json")
    assert code == 0, err
    plan = json.loads(out)
    # 9 trajectories, 2 epochs of 3 steps, each twice as large as those that took 3 s.
    assert plan["time"] == {"seconds": 36.0, "run": earlier.name, "steps": result.steps}
    code, out, _ = await regreen(scene.home, *words, *task_words(tasks))
    assert f"about 36 s, by {result.steps} steps of {earlier.name}" in " ".join(out.split())


async def test_a_run_of_that_name_is_planned_from_where_it_stands(scene: Scene):
    async with scene.world.stack() as stack:
        tasks = await with_experts(stack)
        config = config_of(tasks, modes=("any_fix", "keep_new"), max_tokens=4096, batch_size=8)
        config = type(config)(name=config.name, tasks=tasks)
        result = await train_sft(stack, config)
        await stack.runs.update_run(result.run_id, state="active")
        await only_checkpoint_config(stack, result.run_id, scene.model)
    words = ("train", "sft", "--name", config.name, *task_words(tasks), "--dry-run", "--json")
    code, out, err = await regreen(scene.home, *words)
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["action"], plan["steps_done"], plan["steps"]) == ("resume", 4, 4)
    assert plan["goes_on_from"]["step"] == 4
    assert plan["tasks"] == list(tasks)
    async with scene.world.stack() as stack:
        await stack.runs.update_run(result.run_id, state="done")
    code, out, err = await regreen(scene.home, *words)
    assert code == 0, err
    assert (json.loads(out)["action"], json.loads(out)["learner"]) == ("serve", None)


async def only_checkpoint_config(stack: Stack, run_id: str, model: Path) -> None:
    """Have the newest checkpoint lie in a model folder, as those of the real learner do."""
    [record, *_] = (await stack.runs.list_checkpoints(run_id)).checkpoints
    record.uri, record.id = str(model), ""
    await stack.runs.record_checkpoint(record)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--start", "nope"), 2, "start: 'nope' is neither 'base' nor the name of a run"),
        (("--task", "nope"), 1, "no task 'nope'; `regreen tasks list --split train` shows"),
        (("--hyper", "learning_rate=7"), 2, "hyperparameters.learning_rate"),
        (("--hyper", "micro_batch_tokens=10000000"), 1, "GiB are available; it would fit with"),
        (("--hyper", "loss=nope"), 2, "hyperparameters.loss"),
        (("--hyper", "sequence_parallel=4"), 2, "is 4, which does not divide the 2 ranks"),
        (("--grader", "nope"), 2, "grader: 'nope' is unknown"),
        (("--name", "base"), 2, "name: 'base' means the untrained model"),
        (("--set", "budgt.turns=8"), 2, "budgt.turns"),
    ],
)
async def test_what_the_command_refuses_is_refused_alike(scene: Scene, words, code, said):
    async with scene.world.stack() as stack:
        tasks = await admitted(stack, 1)
    given = ["train", "grpo", "--concurrency", "0", *words]
    if "--name" not in words:
        given += ["--name", samples.fresh("refused")]
    if "--start" not in words:
        given += ["--start", "base"]
    if "--task" not in words:
        given += task_words(tasks)
    before = await scene.left()
    planned = await regreen(scene.home, *given, "--dry-run")
    assert (planned[0], planned[1]) == (code, ""), planned
    assert said in " ".join(planned[2].split())
    assert await scene.left() == before
    real = await regreen(scene.home, *given)
    assert real[0] == code
    assert last_line(real[2]) == last_line(planned[2])


def last_line(text: str) -> str:
    """The error, but for the memory that happens to be free."""
    return re.sub(r"[\d.]+ GiB are available", "GiB are available", text.splitlines()[-1])


async def test_a_name_that_is_taken_and_a_learner_at_work_are_refused(scene: Scene):
    async with scene.world.stack() as stack:
        tasks = await with_experts(stack, 1)
        config = config_of(tasks)
        result = await train_sft(stack, config)
        words = ("train", "sft", "--name", config.name, *task_words(tasks))
        for more, kind in (((), "sft"), (("--start", "base"), "grpo")):
            given = ("train", kind, *words[2:], *more)
            planned = await regreen(scene.home, *given, "--dry-run")
            real = await regreen(scene.home, *given)
            assert planned[0] == real[0] == 1, (planned, real)
            assert real[2].splitlines()[-1] == planned[2].splitlines()[-1]
            told = "exists with other settings" if kind == "sft" else "is of kind sft"
            assert told in planned[2]
        await stack.runs.update_run(result.run_id, state="active")
    scene.world.learner.runs[result.run_id] = LearnerState()
    (scene.home / "busy").mkdir()
    busy = stack_home(
        scene.home / "busy",
        dataset=scene.world.dataset,
        policy=scene.world.policy_address,
        learner=scene.world.learner_address,
    )
    given = ("train", "sft", "--name", samples.fresh("late"), *task_words(tasks), "--dry-run")
    planned = await regreen(busy, *given)
    assert planned[0] == 1, planned
    assert f"the learner trains run '{config.name}', one at a time" in planned[2]


async def test_nothing_to_learn_from_is_refused_alike(scene: Scene):
    async with scene.world.stack() as stack:
        tasks = await admitted(stack, 1)
        await stack.trajectories.commit_trajectory(expert(tasks[0], reward=0.0))
    given = ("train", "sft", "--name", samples.fresh("none"), *task_words(tasks))
    planned, real = (
        await regreen(scene.home, *given, "--dry-run"),
        await regreen(scene.home, *given),
    )
    assert planned[0] == real[0] == 1, (planned, real)
    assert "no solved expert trajectory among 1 tasks" in planned[2]
    assert real[2].splitlines()[-1] == planned[2].splitlines()[-1]
