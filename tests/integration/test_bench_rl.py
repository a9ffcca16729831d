"""The benchmark's own side: real policy and learner services with the real small model."""

from dataclasses import replace
from pathlib import Path

import pytest

from regreen.batch import Batch
from regreen.train.bench_sides import Services, Shape, batch_of, observation
from tests.fixtures.policy.model import default_model

pytestmark = pytest.mark.slow


async def test_a_step_runs_through_both_services_and_its_weights_serve(tmp_path: Path) -> None:
    shape = Shape(prompts=1, samples=2, prompt_tokens=40, new_tokens=6)
    prompts = [observation(0, 0, shape.prompt_tokens)]
    async with Services(tmp_path, default_model().resolve(), "fp32", 2).running() as services:
        assert services.run.engine == "deepspeed"
        seconds = await services.step(prompts, shape)
        names = ("rollout_s", "update_s", "publish_s", "load_s", "save_s")
        parts = [seconds[name] for name in names]
        assert seconds["step_s"] == pytest.approx(sum(parts), abs=0.5)
        assert seconds["live_s"] == pytest.approx(seconds["publish_s"] + seconds["load_s"])
        served = (await services.policy.get_policy()).policy
        assert (served.version, served.run_id, bool(served.digest.sha256)) == (
            1,
            "bench-fp32",
            True,
        )
        groups = await services.rollout(prompts, replace(shape, turns=2))
        batch: Batch = batch_of(groups)
        assert [sample.token_ids.size for sample in batch] == [40 + 6 + 6 + 6] * 2
        assert [sample.trained_tokens for sample in batch] == [12, 12]
        assert {span.version for sample in batch for span in sample.spans} == {1}
        assert services.peak_bytes() > 1 << 30
