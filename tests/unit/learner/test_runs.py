"""Runs when something goes wrong: disks, cancelled callers, hung workers, damaged checkpoints."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from learner_svc.record import RunFiles, RunState, StepRecord
from learner_svc.run import RunsConfig
from learner_svc.runs import Runs
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from learner_svc.worker import Commands
from regreen.batch import Batch
from regreen.blobs import open_blobs
from regreen.rpc.errors import DataLoss, DiskFull, FailedPrecondition, InfraError

Make = Callable[..., Batch]
ACTIVE = "regreen_learner_active_runs"


def spec_of(model: Path, engine: str = "plain") -> RunSpec:
    return RunSpec("run_r", RunKind.GRPO, str(model), engine, Hyperparameters(learning_rate=1e-3))


@asynccontextmanager
async def runs_in(home: Path, **config: float) -> AsyncIterator[Runs]:
    runs = Runs(home, open_blobs(home / "blobs"), RunsConfig(**config))  # type: ignore[arg-type]
    try:
        yield runs
    finally:
        await runs.close()


def workers() -> list[int]:
    """Training processes of this one."""
    found = []
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"learner_svc.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found


def left_by_a_dead_writer(checkpoints: Path) -> None:
    for name in (".partial-00000001", ".partial-00000001-7", ".shards-00000001"):
        (checkpoints / name).mkdir(parents=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_a_step_that_cannot_be_recorded_is_never_trained_twice(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed).to_bytes() for seed in range(2)]
    async with runs_in(tmp_path) as runs:
        run = await runs.start(spec_of(tiny_model), "")
        assert REGISTRY.get_sample_value(ACTIVE) == 1
        first, _ = await runs.step("run_r", 1, batches[0], ())
        left_by_a_dead_writer(run.files.checkpoints)
        await runs.save("run_r", 1)
        assert [path.name for path in run.files.checkpoints.iterdir()] == ["step-00000001"]
        expected, _ = await runs.step("run_r", 2, batches[1], ())
        await runs.stop("run_r")
        run = await runs.start(spec_of(tiny_model), "")
        steps = run.files.directory / "steps.jsonl"
        steps.rename(steps.with_suffix(".away"))
        steps.mkdir()
        with pytest.raises(InfraError, match="step 2 was not recorded"):
            await runs.step("run_r", 2, batches[1], ())
        assert (run.record.state, run.step) == (RunState.FAILED, 1)
        assert not workers()
        assert REGISTRY.get_sample_value(ACTIVE) == 0
        with pytest.raises(FailedPrecondition, match="was not recorded"):
            await runs.step("run_r", 2, batches[1], ())
        steps.rmdir()
        await runs.start(spec_of(tiny_model), "")
        again, repeated = await runs.step("run_r", 2, batches[1], ())
        assert not repeated
        assert again.metrics["loss"] == expected.metrics["loss"]
        known, repeated = await runs.step("run_r", 1, batches[0], ())
        assert repeated
        assert known == first


def test_a_worker_refuses_a_step_that_its_weights_hold(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    path = tmp_path / "batch"
    path.write_bytes(make_batch().to_bytes())
    commands = Commands(lambda done, total: None)
    start = {"spec": spec_of(tiny_model).to_json(), "resume": "", "checkpoints": str(tmp_path)}
    commands.run({"op": "start", "extensions": str(tmp_path), **start})
    step = {"op": "step", "step": 1, "batch": str(path), "group_ids": []}
    step["lend_memory"] = False
    commands.run(step)
    with pytest.raises(FailedPrecondition, match="step 1 is not the next one"):
        commands.run(step)


def test_records_on_a_full_disk(disk: Path) -> None:
    files = RunFiles(disk)
    records = [StepRecord(step, "0" * 64, ("g",), {"loss": 0.5}, 1.0) for step in range(1, 4)]
    files.append(records[0])
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(32 << 20))
    wide = StepRecord(2, "0" * 64, ("g" * 10_000,), {}, 1.0)
    with pytest.raises(DiskFull):
        files.append(wide)
    assert files.steps == records[:1]
    filler.unlink()
    files.cut(1)
    files.append(records[1])
    assert RunFiles(disk)._read_steps() == records[:2]


def test_a_half_written_line_hides_no_other(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    records = [StepRecord(step, "0" * 64, ("g",), {}, 1.0) for step in range(1, 4)]
    for record in records:
        files.append(record)
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    (tmp_path / "steps.jsonl").write_text("\n".join([lines[0], lines[1][:9], lines[2]]))
    assert files._read_steps() == [records[0], records[2]]


async def test_a_cancelled_start_leaves_one_worker_and_a_closed_service_none(
    tiny_model: Path, tmp_path: Path
) -> None:
    async with runs_in(tmp_path) as runs:
        for _ in range(2):
            caller = asyncio.create_task(runs.start(spec_of(tiny_model), ""))
            while not workers():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
        run = await runs.start(spec_of(tiny_model), "")
        assert run.worker is not None
        assert workers() == run.worker.pids
        await runs.stop("run_r")
        caller = asyncio.create_task(runs.start(spec_of(tiny_model), ""))
        while not workers():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        caller.cancel()
    assert not workers()


async def test_stopping_does_not_wait_for_a_hung_step(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    async with runs_in(tmp_path, stop_grace_s=0.2) as runs:
        await runs.start(spec_of(tiny_model), "")
        [worker] = workers()
        os.kill(worker, signal.SIGSTOP)
        step = asyncio.create_task(runs.step("run_r", 1, make_batch().to_bytes(), ()))
        ranks = runs.get("run_r").worker
        assert ranks is not None
        while not ranks._lock.locked():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        async with asyncio.timeout(30):
            run = await runs.stop("run_r")
        with pytest.raises(InfraError, match="it was ended"):
            await step
        assert (run.record.state, run.record.error) == (RunState.STOPPED, "")


async def test_a_damaged_checkpoint_is_passed_over(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    async with runs_in(tmp_path) as runs:
        await runs.start(spec_of(tiny_model), "")
        saved = []
        for step in (1, 2):
            await runs.step("run_r", step, make_batch(seed=step).to_bytes(), ())
            saved.append(await runs.save("run_r", step))
        await runs.stop("run_r")
        weights = saved[1].path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        (saved[1].path / "config.json").write_text("{")
        run = await runs.start(spec_of(tiny_model), "")
        assert (run.step, run.record.state) == (1, RunState.ACTIVE)
        assert run.checkpoint == saved[0]
        assert "step-00000002" in run.record.error
        assert f"went on from {saved[0].path}" in run.record.error
        await runs.stop("run_r")
        with pytest.raises(DataLoss, match="step-00000002"):
            await runs.start(spec_of(tiny_model), str(saved[1].path))
        (saved[0].path / "model.safetensors").unlink()
        with pytest.raises(DataLoss, match=r"step-00000002.*; .*step-00000001"):
            await runs.start(spec_of(tiny_model), "")
        assert not workers()


@pytest.mark.slow
async def test_ranks_agree_that_the_disk_is_full(
    tiny_model: Path, make_batch: Make, disk: Path
) -> None:
    async with runs_in(disk, processes=2, save_timeout_s=60) as runs:
        run = await runs.start(spec_of(tiny_model, "deepspeed"), "")
        await runs.step("run_r", 1, make_batch().to_bytes(), ())
        filler = disk / "filler"
        filler.write_bytes(bytes(17 << 20))
        with pytest.raises(DiskFull, match="the previous checkpoint is intact"):
            await runs.save("run_r", 1)
        filler.unlink()
        await runs.step("run_r", 2, make_batch(seed=1).to_bytes(), ())
        saved = await runs.save("run_r", 2)
        assert saved.manifest.state_format == "adamw"
        assert [path.name for path in run.files.checkpoints.iterdir()] == ["step-00000002"]
