"""The load run: real services, a simulated engine, a tiny task."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from regreen.client.stack import Stack
from regreen.rollout.bench import measure
from regreen.rollout.bench_report import QUICK
from regreen.rollout.capacity_fit import capacity, markdown
from sandbox_svc.wheelhouse import DistStore
from tests.e2e.test_killed_services import admit
from tests.fixtures.policy.model import default_model
from tests.fixtures.tasks.tiny_task import tiny_spec
from tests.integration.rollout.world import task_of

pytestmark = pytest.mark.slow


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path that an ordinary user's Postgres may enter."""
    folder = Path(tempfile.mkdtemp(prefix="regreen-bench-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(300)
async def test_a_small_shape_runs_and_its_figures_agree_with_its_rows(
    home: Path, tmp_path: Path
) -> None:
    task = task_of(tiny_spec(DistStore(home / "sandbox" / "dists"), tmp_path))

    async def prepare(stack: Stack) -> str:
        await admit(stack, task, "w")
        return task.id

    report = await measure(QUICK, home, default_model().resolve(), prepare)
    processes = {"driver", "dataset", "postgres", "sandbox", "policy", "judge", "builds"}
    assert list(report["levels"]) == [str(level) for level in QUICK.levels]
    for level, row in report["levels"].items():
        assert row["episodes"] == max(int(level), QUICK.least)
        assert row["turns"] == row["episodes"] * QUICK.turns
        assert row["tokens"] >= QUICK.tokens * row["turns"] / 2
        assert set(row["cpu_s"]) == processes | {"all"}
        every = sum(row["cpu_s"][name] for name in processes)
        assert row["cpu_s"]["all"] == pytest.approx(every, abs=0.01)
        per_turn = 1e3 * row["cpu_s"]["all"] / row["turns"]
        assert row["cpu_ms_per_turn"]["all"] == pytest.approx(per_turn, abs=0.3)
        assert row["overhead_ms"]["p50"] > 0, "a turn cannot be quicker than its engine"
        assert row["engine_ms"] == pytest.approx(
            1e3 * row["tokens"] / row["turns"] / QUICK.tokens_per_s, abs=0.1
        )
        assert row["calls_ms"]["PolicyService/Generate"]["count"] >= row["turns"]
        assert row["episode_s"]["p50"] * 1e3 > QUICK.turns * row["engine_ms"]
        assert min(row["memory_mb"][name] for name in ("driver", "sandbox", "dataset")) > 10
        assert row["where_s"]["engine"] > 0
    for level, row in report["builds"].items():
        assert row["episodes"] == 2 * int(level)
        if report["counts_builds"]:
            looked_up = report["levels"][level if level == "1" else "4"]
            least_s = 3 * looked_up["cpu_s"]["builds"] / looked_up["episodes"]
            assert row["cpu_s"]["builds"] / row["episodes"] > least_s, "nothing was built"
    assert list(report["lengths"]) == [str(turns) for turns in QUICK.lengths]
    assert report["turn_floor_cpu_ms"] > 0
    assert set(report["lines"]) == processes | {"all"}
    assert report["knee"]["flat_ms"] == min(
        row["overhead_ms"]["p50"] for row in report["levels"].values()
    )
    for kind, sweep in (("none", "levels"), ("real", "builds")):
        found = capacity(report, [50], kind)
        assert [row["at_once"] for row in found["fit"]] == [int(n) for n in report[sweep]]
        assert found["projection"][0]["at_once"] == 50
        assert "Full first" in markdown(found)
