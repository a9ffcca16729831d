"""A short fuzz; `python -m tests.load.fuzz` is the long one."""

import random
from collections import Counter

import pytest

from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.bench_service import Service
from tests.load import scene
from tests.load.fuzz import Fuzz, fuzz


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


def test_a_service_that_refuses_every_request_is_at_fault(tmp_path) -> None:
    run = Fuzz(Service(tmp_path), random.Random(1))
    names = sorted(method.name for method in scene.methods())
    run.goods = {name: Counter(INVALID_ARGUMENT=20) for name in names}
    run.check_answers(names)
    assert run.faults == [f"{name}: 0 of 20 good requests were answered" for name in names]
    run.faults.clear()
    run.goods = {name: Counter(OK=2, FAILED_PRECONDITION=2, NOT_FOUND=18) for name in names}
    run.check_answers(names)
    assert run.faults == [f"{name}: 2 of 22 good requests were answered" for name in names]
    run.faults.clear()
    run.goods = {name: Counter(OK=4, FAILED_PRECONDITION=4, NOT_FOUND=18) for name in names}
    run.check_answers(names)
    assert run.faults == []
