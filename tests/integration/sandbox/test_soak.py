"""A short soak; `python -m tests.load.soak` is the long one."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from regreen.rpc.errors import InfraError, MissingDependency, NotFound, RegreenError
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.bench_service import Service
from tests.load import processes
from tests.load.operations import OPERATIONS, Record
from tests.load.soak import Soak, soak


@pytest.mark.slow
async def test_nothing_is_left_or_lost_under_random_kills(tmp_path) -> None:
    runtime = EmbeddedRuntime(tmp_path, run_probes=False)
    try:
        await runtime.start()
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    await runtime.close()
    report = await soak(150, seed=7, kill_s=0.7)
    assert report["faults"] == []
    assert report["left"] == {}
    assert sum(report["killed"].values()) > 0
    done = report["done"]
    assert all(done[name] > 0 for name in ("snapshot", "restore", "attach again", "execute"))
    assert done["create brief"] > 0
    assert report["states_checked"] > 0


async def test_what_lives_is_found(tmp_path) -> None:
    home = tmp_path / "h"
    runtime = EmbeddedRuntime(home / "sandbox", run_probes=False)
    home.mkdir(mode=0o711)
    try:
        await runtime.start()
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    grouped = runtime.cgroups.name != "rlimit"
    await runtime.close()
    run, blind = (Soak(home, 0, random.Random(1)) for _ in range(2))
    async with Service(home) as service:
        box = await service.create(await service.root_state())
        await service.run(box, "sh", "-c", "nohup sleep 1000 >/dev/null 2>&1 &")
        run.seen = family = processes.family(service.pid)
        assert {"service", "spawner", "first process"} <= set(family.values())
        found = (await run._left())["process"]
        told = {line.rpartition(", ")[0] for line in found}
        assert {f"{pid}: {role}" for (pid, _), role in family.items()} <= told
        by_traces = {int(line.split(":")[0]) for line in (await blind._left())["process"]}
        firsts = {pid for (pid, _), role in family.items() if role == "first process"}
        if grouped:
            assert firsts <= by_traces
            sleeper = {child for first in firsts for child in processes.children(first)}
            assert sleeper
            assert sleeper <= by_traces
        seats = {pid for pid in firsts if b"/stage" in Path(f"/proc/{pid}/mountinfo").read_bytes()}
        assert bool((await run._left())["mount"]) == bool(seats)
        assert (
            processes.still({(pid, start + 1): role for (pid, start), role in family.items()}) == {}
        )
    left = await run._left(10.0)
    assert left["process"] == []
    assert left["mount"] == []


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


_NEVER = """
import asyncio, json, sys
from regreen.client.actions import ActionClient
from regreen.client.exec import ExecClient
from regreen.client.sandbox import SandboxClient
from regreen.rpc.errors import InfraError
from tests.load import soak


async def never(self, *given, **named):
    raise InfraError("never works")


for name in sys.argv[1:]:
    for client in (ActionClient, ExecClient, SandboxClient):
        if hasattr(client, name):
            setattr(client, name, never)
report = asyncio.run(soak.soak(40, 1, 1e9))
print(json.dumps({"faults": report["faults"], "left": report["left"]}))
"""


@pytest.mark.slow
def test_operations_that_never_work_are_faults() -> None:
    broken = ("snapshot_sandbox", "fork_sandbox", "restore_sandbox", "run", "execute", "start_exec")
    done = subprocess.run(
        [sys.executable, "-c", _NEVER, *broken], capture_output=True, check=True, timeout=300
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["left"] == {}
    for name in ("snapshot", "fork", "restore", "write", "daemon", "execute", "exec", "attach"):
        assert f"{name}: it has never worked" in report["faults"]
    assert "no state was there to be checked" in report["faults"]


async def test_what_is_refused_while_nothing_is_killed_is_a_fault() -> None:
    async def fails(error: RegreenError) -> None:
        raise error

    record = Record(brief={"old"})
    for calm in (False, True):
        record.calm = calm
        await record.attempt("fork", lambda: fails(InfraError("lost")), "box")
        await record.attempt("create", lambda: fails(NotFound("deleted by another lane")))
        await record.attempt("write", lambda: fails(NotFound("its time is over")), "old")
    assert record.faults == ["fork while nothing is killed: InfraError: lost"]
    await record.attempt("write", lambda: fails(NotFound("gone")), "box")
    assert record.faults[1:] == ["write while nothing is killed: NotFound: gone"]


def test_an_operation_that_is_refused_as_often_as_it_works_is_a_fault() -> None:
    record = Record(done=Counter(dict.fromkeys(OPERATIONS, 50)))
    record.calm_done, record.calm_refused = Counter(restore=9), Counter(restore=11)
    record.check_work()
    assert record.faults == ["restore: 11 of 20 were refused while nothing was killed"]
