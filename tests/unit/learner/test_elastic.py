"""Checkpoints of several ranks: whole, and any number of ranks goes on from them."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from learner_svc import checkpoint as ckpt
from learner_svc.checkpoint_writer import Tensors
from learner_svc.session import Session
from regreen.batch import Batch
from regreen.client.learner import LearnerClient
from regreen.learner import v1 as pb
from regreen.rpc.errors import FailedPrecondition, InfraError
from tests.fixtures.learner_ranks import STAGES, spec_of, stepped
from tests.fixtures.ranks import told_by_ranks
from tests.unit.learner.test_service import learner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Make = Callable[..., Batch]
Figures = dict[str, dict[str, list[list[float]]]]


def run_ranks(count: int, model: Path, home: Path, batches: Sequence[Path], begin: bool) -> Figures:
    """What rank 0 of so many printed."""
    plan = {
        "model": str(model),
        "home": str(home),
        "batches": [str(path) for path in batches],
        "begin": begin,
    }
    found: Figures = told_by_ranks("tests.fixtures.learner_ranks", count, plan)
    return found


def saved_at(home: Path, stage: int, name: str) -> ckpt.Saved:
    path = home / f"zero{stage}" / "checkpoints" / name
    manifest = ckpt.load_manifest(path)
    ckpt.verify(path, manifest)
    return ckpt.Saved(path, manifest)


def test_fewer_and_more_ranks_go_on_from_what_two_wrote(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed) for seed in range(4)]
    files = [tmp_path / f"batch-{number}" for number in range(len(batches))]
    for path, batch in zip(files, batches, strict=True):
        path.write_bytes(batch.to_bytes())
    two = run_ranks(2, tiny_model, tmp_path, files, begin=True)
    three = run_ranks(3, tiny_model, tmp_path, files, begin=False)
    for stage in STAGES:
        begun = two[str(stage)]["begun"]
        assert two[str(stage)]["resumed"] == begun[2:], "as many ranks: bit for bit"
        first, last = (saved_at(tmp_path, stage, f"step-0000000{step}") for step in (2, 4))
        again = saved_at(tmp_path, stage, "step-00000004.2")
        assert again.manifest.files["model.safetensors"] == last.manifest.weights
        assert again.manifest.files["trainer.state"] == last.manifest.files["trainer.state"]
        assert first.manifest.state_format == "adamw"
        assert not [name for name in first.manifest.files if name.startswith("engine/")]
        moments = Tensors(first.path / "trainer.state")
        assert sum(moments[name].numel() for name in moments if name.startswith("exp_")) > 0
        expected = [pytest.approx(pair, rel=1e-3, abs=1e-6) for pair in begun[2:]]
        assert three[str(stage)]["resumed"] == expected
        for engine in ("plain", "deepspeed"):
            spec = spec_of(str(tiny_model), engine, stage if engine == "deepspeed" else -1)
            alone = Session(spec, tmp_path / "extensions", resume=first.path)
            assert [list(pair) for pair in stepped(alone, batches[2:])] == expected
            alone.close()
    assert three["1"]["resumed"] != [[0.0, 0.0]] * 2


async def test_a_run_goes_on_with_a_rank_less_after_one_was_killed(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed) for seed in range(2)]
    session = Session(spec_of(str(tiny_model), "plain"), tmp_path / "extensions")
    expected = stepped(session, batches)

    async def opened(client: LearnerClient) -> pb.LearnerRun:
        return await client.start_run(
            "run_1",
            pb.RUN_KIND_GRPO,
            str(tiny_model),
            engine="deepspeed",
            hyperparameters=pb.Hyperparameters(
                learning_rate=1e-3, micro_batch_tokens=150, weight_decay=0.01, zero_stage=2
            ),
        )

    async with learner(tmp_path, processes=2, max_restarts=0) as (client, runs):
        await opened(client)
        await client.step("run_1", 1, batch=batches[0].to_bytes())
        saved = await client.save_checkpoint("run_1", policy_version=1)
        worker = runs.get("run_1").worker
        assert worker is not None
        os.kill(worker.pids[1], signal.SIGKILL)
        with pytest.raises((InfraError, FailedPrecondition), match="SIGKILL"):
            await client.step("run_1", 2, batch=batches[1].to_bytes())
    async with learner(tmp_path) as (client, _):
        run = await opened(client)
        assert (run.step, run.checkpoint.uri) == (1, saved.uri)
        done = await client.step("run_1", 2, batch=batches[1].to_bytes())
        assert done.metrics["loss"] == pytest.approx(expected[1][0], rel=1e-3, abs=1e-6)
