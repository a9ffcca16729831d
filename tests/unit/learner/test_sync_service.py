"""Weights from a learner to policies that do not see its folders: real services, every engine."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from safetensors.torch import load_file, save_file

from learner_svc import published
from learner_svc.checkpoint import FileEntry, entry_of
from learner_svc.sync import SyncConfig, WeightSync
from policy_svc.__main__ import Running
from policy_svc.chat import ChatMl
from policy_svc.engines.process import local_engines
from regreen.batch import Batch
from regreen.blobs import open_blobs
from regreen.client.policy import PolicyClient
from regreen.learner import v1 as learner_pb
from regreen.policy import v1 as pb
from regreen.rpc.errors import NotFound
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model
from tests.fixtures.policy.sglang_standin import SglangStandIn
from tests.integration.policy.test_policy_service import HELLO, client, sampling, service
from tests.unit.learner.test_service import learner

Make = Callable[..., Batch]
RATE = learner_pb.Hyperparameters(learning_rate=1e-5)
WEIGHTS = "model.safetensors"
DELTA = SyncConfig("delta", snapshot_every=3)


def far(made: learner_pb.PublishedWeights | learner_pb.Checkpoint) -> pb.PolicyVersion:
    """What a driver tells a policy whose machine has no such folder."""
    return pb.PolicyVersion(
        version=made.policy_version,
        uri=f"/not-mounted{made.uri}",
        digest=made.digest,
        run_id=made.run_id,
        step=made.step,
    )


def fetches(kind: str) -> float:
    name = "regreen_policy_weight_fetches_total"
    return REGISTRY.get_sample_value(name, {"kind": kind}) or 0.0


@asynccontextmanager
async def policy_of(home: Path, **values: Any) -> AsyncIterator[tuple[Running, PolicyClient]]:
    home.mkdir(exist_ok=True)
    async with service(home, **values) as found, client(found) as policy:
        yield found, policy


async def test_servers_far_from_the_learner_get_deltas_and_a_restart_finds_them(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    model = default_model()  # of which the stand-in has the tokenizer alone
    stand_in = SglangStandIn(model, ChatMl.from_folder(model).tokenizer)
    blobs = f"{tmp_path}/learner/blobs"
    async with (
        serving(stand_in.app()) as url,
        learner(tmp_path / "learner", sync=DELTA) as (run, _),
    ):
        values = {"engine": "sglang", "sglang_urls": url, "blobs": blobs}
        await run.start_run(
            "run_f", learner_pb.RUN_KIND_GRPO, str(tiny_model), hyperparameters=RATE
        )
        before = fetches("delta"), fetches("snapshot")
        async with policy_of(tmp_path / "policy", **values) as (found, policy):
            for step in range(1, 5):
                await run.step("run_f", step, batch=make_batch(seed=step).to_bytes())
                made = await run.publish_weights("run_f", policy_version=step, driver_step=step)
                await policy.load_version(far(made))
                folder = found.policy.versions.serving.path
                assert folder.is_relative_to(tmp_path / "policy")
                got = load_file(folder / WEIGHTS)
                masters = load_file(Path(made.uri) / WEIGHTS)
                assert all(torch.equal(got[n], masters[n].bfloat16()) for n in masters)
                assert {path.name for path in folder.glob("*.safetensors")} == {WEIGHTS}
                assert (folder / "config.json").is_file()
                pushed = [body for at, body in stand_in.calls if at == "/update_weights_from_disk"]
                assert (pushed[-1]["model_path"], stand_in.version) == (str(folder), str(step))
                # The checkpoint has the same file: nothing is loaded or fetched again.
                saved = await run.save_checkpoint("run_f", policy_version=step, driver_step=step)
                assert saved.digest == made.digest
                assert (await policy.load_version(far(saved))).policy == far(saved)
                assert found.policy.versions.serving.path == folder
            assert (fetches("delta"), fetches("snapshot")) == (before[0] + 2, before[1] + 2)
        async with policy_of(tmp_path / "policy", **values) as (found, policy):
            assert (await policy.get_policy()).policy == far(saved)
            missing = far(saved)
            missing.digest.sha256, missing.version = "0" * 64, 9
            with pytest.raises(NotFound, match="offers no weights"):
                await policy.load_version(missing)
            assert (await policy.get_policy()).policy == far(saved)


@pytest.mark.parametrize("engine", local_engines())
async def test_an_engine_samples_from_what_came_as_a_delta(engine: str, tmp_path: Path) -> None:
    """The same as from the weights themselves, where bf16 holds those: then nothing is rounded."""
    model = load_file(default_model() / WEIGHTS)
    weights = {name: value.bfloat16().float() for name, value in model.items()}
    blobs = open_blobs(tmp_path / "blobs", fsync=False)
    sync = WeightSync(blobs, DELTA)

    async def offer(version: int) -> pb.PolicyVersion:
        def write(path: Path) -> FileEntry:
            save_file(weights, path)
            return entry_of(path)

        position = published.Position("run_e", version, version)
        root = published.beside(tmp_path / "run" / "checkpoints")
        made = published.publish(root, position, default_model(), write)
        assert await sync.offer(tmp_path / "run", made) is not None
        found = pb.PolicyVersion(version=version, uri=str(made.path), run_id="run_e")
        found.digest.sha256, found.digest.size_bytes = made.entry.sha256, made.entry.size_bytes
        return found

    greedy = sampling(max_new_tokens=4, temperature=0.0)
    values = {"engine": engine, "threads": 1, "blobs": str(tmp_path / "blobs")}
    async with policy_of(tmp_path / "policy", **values) as (_, policy):
        prompt = (await policy.render_chat(HELLO)).token_ids
        first = await offer(1)
        first.uri = "/not-mounted"
        await policy.load_version(first)
        began = (await policy.generate(prompt, sampling=greedy)).completions[0]
        weights["model.norm.weight"] *= 0.5
        near = await offer(2)
        there = pb.PolicyVersion()
        there.CopyFrom(near)
        there.uri = "/not-mounted"
        before = fetches("delta")
        await policy.load_version(there)
        assert fetches("delta") == before + 1
        made = (await policy.generate(prompt, sampling=greedy)).completions[0]
        assert made.versions[0].version == 2
        assert made.logprobs != pytest.approx(began.logprobs, abs=1e-2)
        near.version = 3
        await policy.load_version(near)
        expected = (await policy.generate(prompt, sampling=greedy)).completions[0]
        assert made.token_ids == expected.token_ids
        assert made.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
