"""Checkpoints of several ranks: whole, and any number of ranks goes on from them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learner_svc.checkpoint import load_manifest
from learner_svc.checkpoint_writer import Tensors
from learner_svc.launch import Call, environment
from learner_svc.session import Session
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.batch import Batch
from regreen.client.learner import LearnerClient
from regreen.learner import v1 as pb
from regreen.rpc.errors import FailedPrecondition, InfraError
from tests.unit.learner.test_service import learner

pytestmark = pytest.mark.slow
Make = Callable[..., Batch]
Figures = list[tuple[float, float]]


async def opened(client: LearnerClient, run: str, model: Path, stage: int, uri: str = "") -> None:
    hyperparameters = pb.Hyperparameters(
        learning_rate=1e-3, micro_batch_tokens=150, zero_stage=stage
    )
    await client.start_run(
        run,
        pb.RUN_KIND_GRPO,
        str(model),
        engine="deepspeed",
        hyperparameters=hyperparameters,
        resume_uri=uri,
    )


async def stepped(client: LearnerClient, run: str, batches: list[bytes], first: int) -> Figures:
    found = []
    for number, batch in enumerate(batches, first):
        metrics = (await client.step(run, number, batch=batch)).metrics
        found.append((metrics["loss"], metrics["grad_norm"]))
    return found


@pytest.mark.parametrize(("stage", "others"), [(1, (3,)), (2, (1, 3))])
async def test_a_run_goes_on_with_fewer_or_more_ranks_after_one_was_killed(
    tiny_model: Path, make_batch: Make, tmp_path: Path, stage: int, others: tuple[int, ...]
) -> None:
    batches = [make_batch(seed=seed).to_bytes() for seed in range(4)]
    async with learner(tmp_path / "calm", processes=2) as (client, _):
        await opened(client, "run_l", tiny_model, stage)
        expected = await stepped(client, "run_l", batches, 1)
        last = await client.save_checkpoint("run_l", policy_version=4)
    async with learner(tmp_path / "lossy", processes=2, max_restarts=0) as (client, runs):
        await opened(client, "run_l", tiny_model, stage)
        assert await stepped(client, "run_l", batches[:2], 1) == expected[:2]
        published = await client.publish_weights("run_l", policy_version=2)
        saved = await client.save_checkpoint("run_l", policy_version=2)
        assert saved.digest == published.digest
        await stepped(client, "run_l", batches[2:3], 3)
        worker = runs.get("run_l").worker
        assert worker is not None
        os.kill(worker.pids[1], signal.SIGKILL)
        with pytest.raises((InfraError, FailedPrecondition), match="SIGKILL"):
            await stepped(client, "run_l", batches[3:], 4)
    manifest = load_manifest(Path(saved.uri))
    assert manifest.state_format == "adamw"
    moments = Tensors(Path(saved.uri) / "trainer.state")
    assert any(moments[name].any() for name in moments if name.startswith("exp_avg_sq."))
    async with learner(tmp_path / "lossy", processes=2) as (client, _):
        await opened(client, "run_l", tiny_model, stage)
        assert await stepped(client, "run_l", batches[2:], 3) == expected[2:]
        again = await client.save_checkpoint("run_l", policy_version=4)
        assert again.digest == last.digest  # bit for bit
        await client.stop_run("run_l")
    for ranks in others:
        async with learner(tmp_path / "lossy", processes=ranks) as (client, _):
            await opened(client, f"run_{ranks}", tiny_model, stage, saved.uri)
            found = await stepped(client, f"run_{ranks}", batches[2:], 3)
            assert found == [pytest.approx(pair, rel=1e-3, abs=1e-6) for pair in expected[2:]]
            await client.stop_run(f"run_{ranks}")
    hyperparameters = Hyperparameters(learning_rate=1e-3, micro_batch_tokens=150)
    spec = RunSpec("run_p", RunKind.GRPO, str(tiny_model), "plain", hyperparameters)
    plain = Session(spec, tmp_path, resume=Path(saved.uri))
    metrics = plain.step(Batch.from_bytes(batches[2]), (), lambda done, total: None)
    assert metrics["loss"] == pytest.approx(expected[2][0], rel=1e-3, abs=1e-6)


_RANK = """
import sys
from pathlib import Path

import numpy as np
import torch

from learner_svc.algo.batch import pack_samples
from learner_svc.engines.base import OptimizerState
from learner_svc.engines.deepspeed import DeepSpeedEngine, prepare_environment
from learner_svc.model import TrainModel, load_model
from learner_svc.spec import Hyperparameters

model, extensions = Path(sys.argv[1]), Path(sys.argv[2])
prepare_environment(extensions)
[pack] = pack_samples([np.arange(2, 40)], [np.r_[0, np.ones(37)].astype(np.uint8)], max_tokens=99)
for dtype in (torch.float32, torch.bfloat16):
    for stage in (1, 2):
        def opened():
            loaded = TrainModel(load_model(model)).train()
            return DeepSpeedEngine(loaded, Hyperparameters(zero_stage=stage), dtype)

        engine = opened()
        assert engine.world_size == 2 and engine.state_format == "adamw"
        assert engine.optimizer_state().updates == 0 and not engine.optimizer_state().shapes
        for _ in range(2):
            engine.backward(-engine.logprobs(pack).sum(), last=True)
            engine.step(1e-3)
        state = engine.optimizer_state()
        kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
        masters = {name: tensor.clone() for name, tensor in engine.weights()}
        assert {n: tuple(t.shape) for n, t in kept.items()} == dict(state.shapes)
        assert len(kept) == 2 * len(masters)
        if dtype == torch.bfloat16:
            assert any((t.bfloat16().float() != t).any() for t in masters.values())
        gathered = engine._deepspeed.utils.safe_get_full_fp32_param
        for name, parameter in engine._model.model.named_parameters():
            assert torch.equal(gathered(parameter), masters[name]), name
            for kind in ("exp_avg", "exp_avg_sq"):
                part = parameter._hp_mapping
                if part is not None:  # this rank has a part of it
                    at = part.lp_fragment_address
                    whole = kept[f"{kind}.{name}"].flatten()[at.start : at.start + at.numel]
                    assert torch.equal(whole, part.get_hp_fragment(kind)), (kind, name)
        engine.close()
        other = opened()
        other.load_optimizer_state(OptimizerState(state.updates, kept))
        again = other.optimizer_state()
        assert again.updates == 2
        for name, tensor in again.tensors.items():
            assert torch.equal(tensor, kept[name]), name
        other.close()
print("whole")
"""


def test_what_ranks_gather_is_what_they_have(tiny_model: Path, tmp_path: Path) -> None:
    call = Call.make("127.0.0.1", _free_port(), processes=2, nodes=1)
    command = [sys.executable, "-c", _RANK, str(tiny_model), str(tmp_path / "extensions")]
    ranks = [
        subprocess.Popen(
            command,
            env=environment(os.environ, call, rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in call.ranks(0)
    ]
    told = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    assert all(out.endswith("whole\n") for out, _ in told)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
