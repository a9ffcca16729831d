"""A short soak; `python -m tests.load.soak` is the long one."""

import random

import pytest

from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends.embedded import EmbeddedRuntime
from tests.load.soak import Soak, soak


@pytest.mark.slow
async def test_nothing_is_left_or_lost_under_random_kills(tmp_path) -> None:
    runtime = EmbeddedRuntime(tmp_path, run_probes=False)
    try:
        await runtime.start()
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    await runtime.close()
    report = await soak(150, seed=7, kill_s=2.0)
    assert report["faults"] == []
    assert report["left"] == {}
    assert sum(report["killed"].values()) > 0
    assert report["done"]["snapshot"] > 0
    assert report["states_checked"] > 0


@pytest.mark.parametrize(("each_bytes", "flat"), [(4800, False), (100, True)])
def test_what_a_service_keeps_of_each_sandbox_shows(tmp_path, each_bytes, flat) -> None:
    run = Soak(tmp_path, 0, random.Random(1))
    warming = [(made, 60_000_000 + made * 20_000) for made in range(0, 1000, 10)]
    noise = random.Random(2)
    after = range(1000, 3000, 10)
    warm = [(m, 80_000_000 + m * each_bytes + noise.randrange(200_000)) for m in after]
    run.calm = warming + warm
    found = run._flatness()
    assert found["checked"]
    assert found["flat"] is flat
    assert abs(found["bytes_per_sandbox"] - each_bytes) < 100
