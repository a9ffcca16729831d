"""Weights that serve and get another name: those that were published, by their checkpoint's."""

import asyncio
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY
from safetensors.numpy import save_file

from policy_svc.engines.process import ProcessEngine
from regreen.blobs import digest_of_file
from regreen.common.v1 import Digest
from regreen.policy import v1 as pb
from regreen.rpc.errors import DataLoss, RegreenError
from tests.fixtures.policy.model import write_other_weights
from tests.integration.policy.test_policy_service import HELLO, client, sampling, service


def loads() -> float:
    return REGISTRY.get_sample_value("regreen_policy_loads_total", {"outcome": "loaded"}) or 0.0


def version_at(folder: Path, version: int = 1) -> pb.PolicyVersion:
    found = digest_of_file(folder / "model.safetensors")
    digest = Digest(sha256=found.sha256, size_bytes=found.size_bytes)
    return pb.PolicyVersion(version=version, uri=str(folder), digest=digest, run_id="run")


def linked(folder: Path, to: Path) -> Path:
    to.mkdir()
    os.link(folder / "model.safetensors", to / "model.safetensors")
    return to


def small_weights(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"w": np.full(8, value, np.float32)}, folder / "model.safetensors")
    return folder


async def test_another_name_of_what_serves_is_not_loaded(tmp_path: Path) -> None:
    published = small_weights(tmp_path / "published", 1.0)
    checkpoint = linked(published, tmp_path / "checkpoint")
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    async with service(tmp_path) as found, client(found) as policy:
        await policy.load_version(version_at(published))
        before, since = loads(), (await policy.get_policy()).load_time
        for place in (checkpoint, copy, checkpoint):
            asked = version_at(place)
            assert (await policy.load_version(asked)).policy == asked
            assert (await policy.get_policy()).policy == asked
        assert (loads(), (await policy.get_policy()).load_time) == (before, since)
        cut = version_at(checkpoint)
        cut.uri = str(small_weights(tmp_path / "other", 2.0))
        with pytest.raises(DataLoss):
            await policy.load_version(cut)
        assert (await policy.get_policy()).policy == version_at(checkpoint)
        # Another version of the same bytes is loaded: its tokens have another number.
        await policy.load_version(version_at(checkpoint, 2))
        assert loads() == before + 1
    shutil.rmtree(published)
    async with service(tmp_path) as found, client(found) as policy:
        assert (await policy.get_policy()).policy == version_at(checkpoint, 2)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))  # as a loss of power leaves it
    async with service(tmp_path) as found, client(found) as policy:
        assert (await policy.get_policy()).policy.version == 0


async def test_an_engine_that_is_killed_finds_its_weights_by_their_new_name(tmp_path: Path) -> None:
    published = write_other_weights(tmp_path / "published")
    async with (
        service(tmp_path, engine="torch", threads=1) as found,
        client(found) as policy,
    ):
        prompt = (await policy.render_chat(HELLO)).token_ids
        await policy.load_version(version_at(published))
        greedy = sampling(max_new_tokens=2)
        greedy.temperature = 0.0
        expected = (await policy.generate(prompt, sampling=greedy)).completions[0]
        await policy.load_version(version_at(linked(published, tmp_path / "checkpoint")))
        shutil.rmtree(published)
        engine = found.policy.engine
        assert isinstance(engine, ProcessEngine)
        process = engine._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        async with asyncio.timeout(240):
            while True:
                try:
                    made = (await policy.generate(prompt, sampling=greedy)).completions[0]
                except RegreenError:
                    await asyncio.sleep(0.2)
                else:
                    break
        assert made.token_ids == expected.token_ids
        assert made.logprobs == pytest.approx(expected.logprobs)
        assert made.versions[0].version == 1
