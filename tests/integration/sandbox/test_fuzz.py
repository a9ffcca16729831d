"""A short fuzz; `python -m tests.load.fuzz` is the long one."""

import pytest

from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends.embedded import EmbeddedRuntime
from tests.load.fuzz import fuzz


@pytest.mark.slow
async def test_every_request_ends_in_a_status_that_is_not_our_fault(tmp_path) -> None:
    runtime = EmbeddedRuntime(tmp_path, run_probes=False)
    try:
        await runtime.start()
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    await runtime.close()
    report = await fuzz(3000, seed=3)
    assert report["faults"] == []
    assert report["infra"] == {}
    assert report["codes"]["OK"] > 100
