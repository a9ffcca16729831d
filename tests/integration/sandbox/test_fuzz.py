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
    silent = {name for name, codes in report["calls"].items() if "OK" not in codes}
    assert silent <= {"Validate"}  # for which a State with tests would have to be built
    assert report["codes"]["OK"] > 300
