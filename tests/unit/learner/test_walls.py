"""A learner's runs as another tenant meets them: none is there, none can be started from."""

from pathlib import Path

import pytest

from learner_svc import checkpoint as ckpt
from learner_svc.record import RunFiles, RunRecord, RunState
from learner_svc.runs import Runs, RunsConfig
from learner_svc.servicer import LearnerServicer
from learner_svc.spec import RunKind, RunSpec, defaults
from regreen.blobs import open_blobs
from regreen.learner import v1 as pb
from regreen.rpc.errors import AlreadyExists, NotFound, RegreenError
from regreen.rpc.tokens import _CALLER, Caller


def spec(run_id: str, base_uri: str = "/none") -> RunSpec:
    return RunSpec(run_id, RunKind.SFT, base_uri, "plain", defaults(RunKind.SFT, ""))


@pytest.fixture
async def runs(tmp_path: Path):
    """Runs of tenants a and b and of nobody, as a learner finds them that starts again."""
    for run_id, tenant in (("of-a", "a"), ("of-b", "b"), ("nobodys", "")):
        record = RunRecord(spec(run_id), RunState.STOPPED, ckpt.now(), tenant=tenant)
        RunFiles(tmp_path / "learner" / "runs" / run_id).write(record)
    found = Runs(tmp_path, open_blobs("memory://"), RunsConfig())
    before = _CALLER.set(Caller("b", "0123456789ab"))
    yield found
    _CALLER.reset(before)
    await found.close()


async def test_another_tenants_run_is_not_there(runs, tmp_path):
    service = LearnerServicer(runs, "plain")
    listed = await service.ListRuns(pb.ListRunsRequest(), None)
    assert [run.id for run in listed.runs] == ["of-b"]
    with pytest.raises(RegreenError, match="page_token"):
        await service.ListRuns(pb.ListRunsRequest(page_token="of-a"), None)

    async def watch(run_id: str) -> None:
        async for _ in service.WatchRun(pb.WatchRunRequest(run_id=run_id), None):
            pass

    attacks = {
        "get": lambda i: service.GetRun(pb.GetRunRequest(run_id=i), None),
        "stop": lambda i: service.StopRun(pb.StopRunRequest(run_id=i), None),
        "step": lambda i: service.Step(pb.StepRequest(run_id=i, step=1, batch=b"x"), None),
        "save": lambda i: service.SaveCheckpoint(pb.SaveCheckpointRequest(run_id=i), None),
        "watch": watch,
    }
    for name, attack in attacks.items():
        for run_id in ("of-a", "nobodys", "none"):
            with pytest.raises(NotFound, match=f"no run '{run_id}' here"):
                await attack(run_id)
        if name != "step" and name != "save":
            await attack("of-b")
    _CALLER.set(Caller("*", "0123456789ab"))
    assert {run.record.spec.run_id for run in runs.all()} == {"of-a", "of-b", "nobodys"}


async def test_a_run_starts_from_nothing_of_another_tenants(runs, tmp_path):
    with pytest.raises(AlreadyExists, match="'of-a' is taken"):
        await runs.start(spec("of-a"), "")
    theirs = tmp_path / "learner" / "runs" / "of-a" / "checkpoints" / "step-1"
    around = tmp_path / "learner" / "runs" / "of-b" / ".." / "of-a"
    for path in (theirs, around):
        for base, resume in ((str(path), ""), ("/none", f"file://{path}")):
            with pytest.raises(NotFound, match="there is nothing at"):
                await runs.start(spec("new", base), resume)
        with pytest.raises(NotFound, match="there is nothing at"):
            await runs.estimate(spec("", str(path)))
