"""The learner over gRPC: real server, real workers, the tiny model."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from learner_svc.checkpoint import load_manifest
from learner_svc.memory import Layout, check_fits, estimate_bytes, model_shape
from learner_svc.run import RunsConfig
from learner_svc.runs import Runs
from learner_svc.servicer import LearnerServicer
from learner_svc.session import Session
from learner_svc.settings import LearnerSettings
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.batch import Batch
from regreen.blobs import open_blobs
from regreen.client.learner import LearnerClient
from regreen.common.v1 import Digest
from regreen.learner import v1 as pb
from regreen.rpc.errors import FailedPrecondition, InfraError, InvalidArgument, NotFound
from regreen.rpc.server import Server

Make = Callable[..., Batch]
RATE = pb.Hyperparameters(learning_rate=1e-3)


@asynccontextmanager
async def learner(home: Path, **config: Any) -> AsyncIterator[tuple[LearnerClient, Runs]]:
    settings = LearnerSettings(listen="127.0.0.1:0", metrics="127.0.0.1:0", home=home, drain_s=0)
    runs = Runs(home, open_blobs(home / "blobs"), RunsConfig(**config))
    server = Server(settings, ("regreen.learner.v1.LearnerService",))
    servicer = LearnerServicer(runs, "plain")
    pb.add_LearnerServiceServicer_to_server(servicer, server.grpc)
    try:
        async with server, grpc.aio.insecure_channel(server.address) as channel:
            yield LearnerClient(channel, patience_s=0.5), runs
    finally:
        await servicer.close()
        await runs.close()


async def test_a_run_from_start_to_resume(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    async with learner(tmp_path, max_restarts=0) as (client, runs):
        run = await client.start_run(
            "run_a", pb.RUN_KIND_GRPO, str(tiny_model), hyperparameters=RATE
        )
        assert (run.state, run.step, run.engine) == (pb.RUN_STATE_ACTIVE, 0, "plain")
        assert run.hyperparameters.clip_high == pytest.approx(0.28)
        assert 0 < run.trainable_parameters == run.parameters
        first = await client.step("run_a", 1, batch=make_batch().to_bytes())
        assert not first.repeated_step
        assert {"loss", "grad_norm", "clip_fraction", "tokens", "batch/hack_rate"} <= set(
            first.metrics
        )
        again = await client.step("run_a", 1, batch=make_batch().to_bytes())
        assert again.repeated_step
        assert again.metrics == first.metrics
        with pytest.raises(InvalidArgument, match="another batch"):
            await client.step("run_a", 1, batch=make_batch(seed=5).to_bytes())
        with pytest.raises(InvalidArgument, match="next step of this run is 2"):
            await client.step("run_a", 3, batch=make_batch().to_bytes())
        saved = await client.save_checkpoint("run_a", policy_version=1)
        assert (saved.step, saved.policy_version) == (1, 1)
        assert list(saved.group_ids) == ["grp_0", "grp_1"]
        assert (Path(saved.uri) / "model.safetensors").stat().st_size == saved.digest.size_bytes
        batches = [make_batch(seed=seed).to_bytes() for seed in (1, 2)]
        lost = [
            dict((await client.step("run_a", 2 + i, batch=b)).metrics)
            for i, b in enumerate(batches)
        ]

        worker = runs.get("run_a").worker
        assert worker is not None
        os.kill(worker.pids[0], signal.SIGKILL)
        with pytest.raises((InfraError, FailedPrecondition), match="SIGKILL"):
            await client.step("run_a", 4, batch=batches[0])
        failed = await client.get_run("run_a")
        assert (failed.state, failed.step) == (pb.RUN_STATE_FAILED, 3)

        resumed = await client.start_run(
            "run_a", pb.RUN_KIND_GRPO, str(tiny_model), hyperparameters=RATE
        )
        assert (resumed.state, resumed.step) == (pb.RUN_STATE_ACTIVE, 1)
        for index, blob in enumerate(batches):
            metrics = (await client.step("run_a", 2 + index, batch=blob)).metrics
            assert (metrics["loss"], metrics["grad_norm"]) == (
                lost[index]["loss"],
                lost[index]["grad_norm"],
            )
        stopped = await client.stop_run("run_a")
        assert stopped.state == pb.RUN_STATE_STOPPED
        assert not worker.alive
    async with learner(tmp_path) as (client, _):
        [run] = (await client.list_runs()).runs
        assert (run.id, run.state, run.step, run.checkpoint.uri) == (
            "run_a",
            pb.RUN_STATE_STOPPED,
            1,
            saved.uri,
        )


async def test_watching_blobs_and_typed_refusals(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    digest = await open_blobs(tmp_path / "blobs").put(make_batch(kind="sft").to_bytes())
    reference = Digest(sha256=digest.sha256, size_bytes=digest.size_bytes)
    async with learner(tmp_path) as (client, _):
        await refusals_before_a_run(client, tiny_model, tmp_path)
        await client.start_run("run_b", pb.RUN_KIND_SFT, str(tiny_model), hyperparameters=RATE)
        seen: list[str] = []

        async def watch() -> None:
            async for event in client.watch_run("run_b"):
                seen.append(str(event.WhichOneof("event")))

        watcher = asyncio.create_task(watch())
        assert (await client.step("run_b", 1, batch_digest=reference)).metrics["samples"] == 6
        with pytest.raises(NotFound):
            await client.step("run_b", 2, batch_digest=Digest(sha256="0" * 64, size_bytes=1))
        with pytest.raises(InvalidArgument, match=r"batch\.blob"):
            await client.step("run_b", 2, batch=b"not a batch")
        with pytest.raises(InvalidArgument, match=r"batch\.kind"):
            await client.step("run_b", 2, batch=make_batch().to_bytes())
        assert (await client.step("run_b", 2, batch=make_batch(kind="sft").to_bytes())).step == 2
        await client.save_checkpoint("run_b")
        same = await client.start_run(
            "run_b", pb.RUN_KIND_SFT, str(tiny_model), hyperparameters=RATE
        )
        assert same.step == 2
        with pytest.raises(FailedPrecondition, match="run_b is active"):
            await client.start_run("run_e", pb.RUN_KIND_GRPO, str(tiny_model))
        with pytest.raises(FailedPrecondition, match="another learner"):
            Runs(tmp_path, open_blobs("memory://"), RunsConfig())
        await client.stop_run("run_b")
        await asyncio.wait_for(watcher, 30)
        assert [item for item in seen if item != "progress"] == ["step", "step", "checkpoint"]


async def refusals_before_a_run(client: LearnerClient, model: Path, tmp_path: Path) -> None:
    """Bad requests that start no worker and leave no run behind."""

    async def start(base: str, **values: float | str) -> None:
        hyperparameters = pb.Hyperparameters(**values)
        await client.start_run("run_d", pb.RUN_KIND_GRPO, base, hyperparameters=hyperparameters)

    with pytest.raises(InvalidArgument, match=r"hyperparameters\.clip_low"):
        await start(str(model), clip_low=2)
    with pytest.raises(InvalidArgument, match=r"hyperparameters\.loss.*dapo, grpo"):
        await start(str(model), loss="ppo")
    with pytest.raises(InvalidArgument, match="base_uri"):
        await start("s3://bucket/model")
    with pytest.raises(NotFound, match=r"config\.json"):
        await start(str(tmp_path / "nowhere"))
    with pytest.raises(NotFound):
        await client.get_run("run_d")


@pytest.mark.slow
async def test_two_ranks_of_deepspeed_match_one_process(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed) for seed in range(3)]
    hyperparameters = Hyperparameters(learning_rate=1e-3, micro_batch_tokens=150)
    spec = RunSpec("run_f", RunKind.GRPO, str(tiny_model), "plain", hyperparameters)
    session = Session(spec, tmp_path / "extensions")
    expected = [session.step(batch, (), lambda done, total: None)["loss"] for batch in batches[:2]]
    alone = session.save(tmp_path / "alone", 0, 1)
    assert alone is not None
    last = session.step(batches[2], (), lambda done, total: None)
    expected.append(last["loss"])
    norm = last["grad_norm"]
    message = pb.Hyperparameters(learning_rate=1e-3, micro_batch_tokens=150)
    async with learner(tmp_path, processes=2) as (client, _):
        await client.start_run(
            "run_f",
            pb.RUN_KIND_GRPO,
            str(tiny_model),
            engine="deepspeed",
            hyperparameters=message,
        )
        losses = []
        for index, batch in enumerate(batches):
            done = await client.step("run_f", index + 1, batch=batch.to_bytes())
            losses.append(done.metrics["loss"])
        assert losses == pytest.approx(expected, rel=1e-3, abs=1e-6)
        saved = await client.save_checkpoint("run_f")
        manifest = load_manifest(Path(saved.uri))
        assert manifest.state_format == "adamw"
        assert not any(name.startswith("engine/") for name in manifest.files)
        await client.stop_run("run_f")
        grown = await client.start_run(
            "run_g",
            pb.RUN_KIND_GRPO,
            str(tiny_model),
            engine="deepspeed",
            hyperparameters=message,
            resume_uri=str(alone.path),
        )
        assert grown.step == 2
        third = await client.step("run_g", 3, batch=batches[2].to_bytes())
        assert third.metrics["loss"] == pytest.approx(expected[2], rel=1e-3, abs=1e-6)
        assert third.metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


async def test_an_estimate_starts_nothing_and_refuses_what_a_start_would(
    tiny_model: Path, tmp_path: Path
) -> None:
    async with learner(tmp_path, processes=2) as (client, runs):
        before = sorted(tmp_path.rglob("*"))
        small = pb.Hyperparameters(trainable_layers=1, micro_batch_tokens=256)
        found = await client.estimate_run(
            pb.RUN_KIND_GRPO, str(tiny_model), hyperparameters=small, engine="deepspeed"
        )
        shape = model_shape(tiny_model)
        settings = Hyperparameters(trainable_layers=1, micro_batch_tokens=256)
        layout = Layout(masters=True, ranks=2)
        assert found.estimated_memory_bytes == estimate_bytes(shape, settings, layout)
        assert found.available_memory_bytes > found.estimated_memory_bytes
        assert found.parameters == shape.parameters
        assert found.trainable_parameters == shape.layer_parameters
        assert (found.engine, found.processes) == ("deepspeed", 2)
        assert found.hyperparameters.micro_batch_tokens == 256
        assert found.hyperparameters.clip_high == pytest.approx(0.28)
        refused: list[tuple[type[Exception], str, dict[str, object]]] = [
            (InvalidArgument, "kind: is not given", {"kind": pb.RUN_KIND_UNSPECIFIED}),
            (InvalidArgument, "engine", {"engine": "magic"}),
            (InvalidArgument, "is no absolute path", {"base_uri": "hub://model"}),
            (NotFound, "no decoder model", {"base_uri": str(tmp_path)}),
            (NotFound, "smollm2-135m", {"base_uri": ""}),
            (
                InvalidArgument,
                "has 2 layers",
                {"hyperparameters": pb.Hyperparameters(trainable_layers=3)},
            ),
            (
                InvalidArgument,
                "the engine is plain",
                {"hyperparameters": pb.Hyperparameters(sequence_parallel=2), "engine": "plain"},
            ),
            (InvalidArgument, "engine: is plain, .* this learner starts 2", {"engine": "plain"}),
            (
                InvalidArgument,
                "does not divide the 2 ranks",
                {"hyperparameters": pb.Hyperparameters(sequence_parallel=4)},
            ),
        ]
        for error, said, changes in refused:
            usual = {"kind": pb.RUN_KIND_SFT, "base_uri": str(tiny_model), "engine": "deepspeed"}
            asked = usual | changes
            with pytest.raises(error, match=said):
                await client.estimate_run(**asked)  # type: ignore[arg-type]
        assert runs.all() == []
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_will_not_fit_is_refused_with_advice(tiny_model: Path) -> None:
    shape = model_shape(tiny_model)
    big = Hyperparameters(micro_batch_tokens=10**6)
    needed = estimate_bytes(shape, big, Layout())
    with pytest.raises(FailedPrecondition, match="it would fit with micro_batch_tokens=500000"):
        check_fits(shape, big, Layout(), int(needed * 0.8))
    with pytest.raises(FailedPrecondition, match="smaller model"):
        check_fits(shape, big, Layout(), 1 << 20)
    assert check_fits(shape, big, Layout(), needed) == needed


def test_the_service_itself_loads_no_tensor_library():
    code = "import learner_svc.__main__, sys; print({'torch', 'transformers'} & set(sys.modules))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout == "set()\n"
