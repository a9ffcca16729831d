"""`regreen runs`: every run, its course and its checkpoints; resumed with what was recorded."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regreen.client.stack import Stack
from regreen.rpc.errors import DataLoss
from regreen.train.config import GrpoConfig, SftConfig
from regreen.train.progress import Progress
from regreen.train.record import recorded_config
from regreen.train.resume import resume_run
from regreen.train.rl import train_grpo
from regreen.train.rows import open_run
from regreen.train.sft import train_sft
from tests.integration import dataset_samples as samples
from tests.integration import test_train_grpo as grpo
from tests.integration.commands import regreen, stack_home, start
from tests.integration.test_train_sft import config_of, undisturbed, weights_of, with_experts
from tests.integration.train_services import World, admitted, scripted_workers, world


@pytest.fixture
async def place(dataset_address: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world(dataset_address, tmp_path) as found:
        yield found


@pytest.fixture
def home(place: World, tmp_path: Path) -> Path:
    return stack_home(
        tmp_path, dataset=place.dataset, policy=place.policy_address, learner=place.learner_address
    )


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


async def test_all_runs_are_listed_over_pages_newest_first(place: World, home: Path):
    async with place.stack() as stack:
        before = len(lines((await regreen(home, "runs", "list", "--kind", "eval", "--json"))[1]))
        names = [samples.fresh("eval") for _ in range(130)]
        for name in names:
            await stack.runs.create_run(name, "eval", config={"settings": {}})
        config = config_of(await with_experts(stack), name=samples.fresh("listed"))
        result = await train_sft(stack, config)
    code, out, err = await regreen(home, "runs", "list", "--json")
    assert code == 0, err
    found = lines(out)
    evals = [row["name"] for row in found if row["kind"] == "eval"]
    assert len(evals) == before + 130
    assert evals[:130] == names[::-1]
    trained = found[0]
    assert (trained["name"], trained["kind"], trained["state"]) == (config.name, "sft", "done")
    assert trained["steps"] == trained["total_steps"] == result.steps
    assert trained["start"] == "base"
    assert trained["metric"]["name"] == "learner/loss"
    assert trained["metric"]["value"] == pytest.approx(1 / result.steps)
    assert trained["checkpoint"]["digest"]["sha256"] == result.sha256
    assert trained["config"]["settings"]["batch_size"] == config.batch_size
    assert (found[1]["metric"], found[1]["checkpoint"], found[1]["steps"]) == (None, None, 0)
    code, out, _ = await regreen(home, "runs", "list", "--kind", "sft")
    assert code == 0
    assert f"{result.steps} of {result.steps}" in out
    assert f"step {result.steps}" in out
    assert names[0] not in out


async def test_one_run_is_shown_with_the_command_that_resumes_it(place: World, home: Path):
    async with place.stack() as stack:
        config = config_of(await with_experts(stack))
        result = await train_sft(stack, config)
        points = await stack.runs.list_metrics(result.run_id)
        records = list((await stack.runs.list_checkpoints(result.run_id)).checkpoints)
    code, out, err = await regreen(home, "runs", "show", config.name, "--steps", "2", "--json")
    assert code == 0, err
    shown = json.loads(out)
    last = [point for point in points if point.step > result.steps - 2]
    assert [int(point["step"]) for point in shown["metrics"]] == [point.step for point in last]
    assert {point["name"] for point in shown["metrics"]} >= {"learner/loss", "trained_tokens"}
    assert len(records) > 1
    assert [record["digest"]["sha256"] for record in shown["checkpoints"]] == [
        record.digest.sha256 for record in records
    ]
    assert [int(record["step"]) for record in shown["checkpoints"]] == [r.step for r in records]
    words = shown["resume"].split()
    assert words == ["regreen", "runs", "resume", config.name, "--home", str(home)]
    again = await regreen(home, *words[1:4], "--json")
    assert again[0] == 0, again[2]
    assert json.loads(again[1])["sha256"] == result.sha256
    assert f"nothing is left of run '{config.name}'" in again[2]
    code, out, err = await regreen(home, "runs", "show", result.run_id)
    assert code == 0, err
    assert f"resume: regreen runs resume {config.name}" in out
    assert "batch_size" in out
    assert f"{1 / result.steps:.4g}" in out


async def test_runs_are_compared_by_what_differs(place: World, home: Path):
    async with place.stack() as stack:
        tasks = await with_experts(stack)
        one, two = config_of(tasks, epochs=1), config_of(tasks, seed=3)
        results = [await train_sft(stack, one), await train_sft(stack, two)]
        other = (await stack.runs.create_run(samples.fresh("eval"), "eval")).run
        await stack.runs.record_metrics(results[0].run_id, 1, {"odd": 0.0, "solve_rate": 0.5})
        await stack.runs.record_metrics(results[0].run_id, 2, {"odd": 7.0, "solve_rate": 0.25})
    names = (one.name, two.name, other.name)
    code, out, err = await regreen(home, "runs", "compare", *names, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [run["name"] for run in found["runs"]] == list(names)
    assert found["fields"]["epochs"] == {one.name: 1, two.name: 2, other.name: None}
    assert found["fields"]["seed"] == {one.name: 0, two.name: 3, other.name: None}
    assert found["fields"]["kind"][other.name] == "eval"
    loss = found["metrics"]["learner/loss"]
    steps = results[0].steps
    assert loss[one.name] == {
        "first": {"step": 1, "value": 1.0},
        "last": {"step": steps, "value": 1 / steps},
        "best": {"step": steps, "value": 1 / steps},
    }
    assert loss[two.name]["last"]["step"] == results[1].steps == 2 * steps
    assert loss[other.name] is None
    solved = found["metrics"]["solve_rate"]
    assert solved[one.name]["best"] == {"step": 1, "value": 0.5}
    assert (solved[two.name], found["metrics"]["odd"][two.name]) == (None, None)
    odd = found["metrics"]["odd"][one.name]
    assert (odd["first"]["value"], odd["last"]["value"], odd["best"]) == (0.0, 7.0, None)
    pair = await regreen(home, "runs", "compare", one.name, two.name, "--metric", "odd", "--json")
    assert set(json.loads(pair[1])["fields"]) == {"epochs", "seed"}
    assert list(json.loads(pair[1])["metrics"]) == ["odd"]
    table = await regreen(home, "runs", "compare", one.name, two.name, "--metric", "odd")
    assert "0 @ 1, 7 @ 2" in table[1]
    assert "absent" in table[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("show nope", 1, "no run 'nope'; the newest are "),
        ("resume nope", 1, "no run 'nope'; the newest are "),
        ("compare here nope", 1, "no run 'nope'; the newest are "),
        ("compare here", 2, "name two runs or more"),
        ("compare here here", 2, "has a run twice"),
        ("compare here there --metric nope", 1, "none of these runs has 'nope'; there are odd"),
        ("list --kind nope", 2, "kind: 'nope' is unknown; use one of sft, grpo, eval"),
        ("resume here", 1, "is of kind eval; those that can be resumed are sft and grpo"),
        ("resume there --steps 9", 2, "No such option: --steps"),
        ("resume bare", 1, "the record of run 'bare' holds no settings"),
        ("show here --step 3", 2, "No such option: --step"),
    ],
)
async def test_refusals_say_what_there_is(place: World, home: Path, words, code, said):
    async with place.stack() as stack:
        run = (await stack.runs.create_run("here", "eval")).run
        await stack.runs.record_metrics(run.id, 1, {"odd": 1.0})
        await stack.runs.create_run("there", "grpo")
        await stack.runs.create_run("bare", "sft", config={"mine": 1})
    done = await regreen(home, "runs", *words.split())
    assert done[0] == code, done
    assert said in " ".join(done[2].replace("│", " ").split())
    assert not done[1]
    assert "Traceback" not in done[2]


async def killed(place: World, home: Path, at: int, *words: str) -> None:
    """Run a command that is killed while the learner takes step `at`."""
    place.learner.hold_at = at
    process = await start(home, *words)
    await asyncio.wait_for(place.learner.held.wait(), 60)
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    assert process.returncode == -signal.SIGKILL
    place.learner.hold_at = 0


def task_words(tasks: tuple[str, ...]) -> list[str]:
    return [word for task in tasks for word in ("--task", task)]


@pytest.mark.parametrize("at", [1, 4, 7])
async def test_a_killed_supervised_run_is_resumed_to_the_same_weights(
    place: World, home: Path, at: int
):
    async with place.stack() as stack:
        tasks = await with_experts(stack)
    name = samples.fresh("killed")
    words = ["--batch-size", "2", "--seed", "5", "--hyper", "learning_rate=1e-3"]
    await killed(place, home, at, "train", "sft", "--name", name, *task_words(tasks), *words)
    code, out, err = await regreen(home, "runs", "resume", name, "--json")
    assert code == 0, err
    result = json.loads(out)
    async with place.stack() as stack:
        config = recorded_config(await stack.runs.get_run(name)).config
        assert isinstance(config, SftConfig)
        assert (config.batch_size, config.seed) == (2, 5)
        assert config.hyperparameters == {"learning_rate": 1e-3}
        weights, steps = await undisturbed(stack, config)
    assert (result["state"], result["steps"]) == ("done", steps)
    assert json.loads(Path(result["uri"]).read_text())["weights"] == weights


async def test_a_killed_grpo_run_is_resumed_with_its_settings(place: World, home: Path):
    async with place.stack() as stack:
        tasks = await admitted(stack)
    name = samples.fresh("killed")
    words = ["--start", "base", "--steps", "3", "--groups", "2", "--group-size", "2"]
    words += ["--concurrency", "0", "--set", "budget.turns=8"]
    async with scripted_workers(place, "", 2):
        await killed(place, home, 2, "train", "grpo", "--name", name, *task_words(tasks), *words)
        async with place.stack() as stack:  # a task that is none any more does not matter
            await stack.tasks.record_gate(
                samples.report(tasks[0], samples.pb.TASK_STATUS_QUARANTINED)
            )
        code, out, err = await regreen(home, "runs", "resume", name, "--json")
    assert code == 0, err
    assert json.loads(out)["state"] == "done"
    async with place.stack() as stack:
        config = recorded_config(await stack.runs.get_run(name)).config
    assert isinstance(config, GrpoConfig)
    assert (config.steps, config.concurrency, config.tasks) == (3, 0, tasks)
    assert config.labels == {"budget.turns": "8"}
    assert await grpo.check_exactly_once(place, config)


async def recorded(stack: Stack, config: SftConfig | GrpoConfig, kind: str, **changes) -> str:
    """A run of that config as it would be recorded, but for `changes` of its settings."""
    settings = {n: v for n, v in (config.settings() | changes).items() if v is not ...}
    await open_run(stack, config.name, kind, settings, {"train_ids": [["trj"]]})
    return config.name


async def test_a_record_gives_back_the_exact_config(place: World):
    async with place.stack() as stack:
        tasks = await with_experts(stack)
        large = 2**60 + 1
        sft = config_of(
            tasks, seed=large, publish=False, concurrency=7, hyperparameters={"seed": large}
        )
        await train_sft(stack, sft)
        rl = grpo.config_of(tasks, steps=1, seed=large, hard_share=0.0, idle_deadline_s=33.5)
        await train_grpo(stack, rl, workers=grpo.external(place))
        for config in (sft, rl):
            found = recorded_config(await stack.runs.get_run(config.name))
            assert (found.config, found.assumed) == (config, ())


async def test_a_run_of_before_resumes_by_its_settings_and_says_what_they_lack(place: World):
    seen: list[Progress] = []
    async with place.stack() as stack:
        tasks = await with_experts(stack)
        done = config_of(tasks)
        await train_sft(stack, done)
        run = await stack.runs.get_run(done.name)
        resolved = (await open_run(stack, done.name, "sft", done.settings(), {})).resolved
        old = config_of(tasks, hyperparameters={"micro_batch_tokens": 512})
        await open_run(stack, old.name, "sft", old.settings(), dict(resolved))
        result = await resume_run(stack, old.name, seen.append)
        weights, steps = await undisturbed(stack, old)
    assert "exact" in run.config.fields
    assert (weights_of(result), result.steps) == (weights, steps)
    assert seen[0].stage == "resume"
    assert "has no concurrency, publish, recovery_deadline_s" in seen[0].detail


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": ...}, "lacks epochs"),
        ({"dropout": 0.5}, "has dropout, which this version does not know"),
        ({"epochs": "two"}, "epochs is 'two'"),
        ({"epochs": 2.5}, "epochs is 2.5, which is no whole number"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": 2**60}, "which older versions recorded rounded"),
        ({"modes": "any_fix"}, "modes is no list of words"),
        ({"hyperparameters": []}, "hyperparameters is no mapping"),
    ],
)
async def test_a_record_that_cannot_be_read_is_a_typed_error(place: World, changes, said):
    async with place.stack() as stack:
        name = await recorded(stack, config_of(("t",)), "sft", **changes)
        with pytest.raises(DataLoss, match=said) as caught:
            await resume_run(stack, name)
        assert f"regreen train sft --name {name}" in str(caught.value)
        assert not (await stack.learner.list_runs()).runs
