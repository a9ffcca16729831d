"""A short soak; `python -m tests.load.soak` is the long one."""

import pytest

from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends.embedded import EmbeddedRuntime
from tests.load.soak import soak


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
