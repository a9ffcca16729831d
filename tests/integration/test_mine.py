"""The miner from a list of culprits to admitted tasks: a local index, real sandboxes."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.mine.culprits import Candidate
from regreen.mine.lab import MiningClient
from regreen.mine.report import report
from regreen.mine.store import Journal
from regreen.mine.work import Bounds, Mine, export
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks.jsonl import load_distributions, load_evidence, load_tasks
from regreen.tasks.pin import TOOLS
from tests.fixtures.mining import Place, mining_place, write_sdist
from tests.fixtures.tasks.tiny_task import PYTHON, RUNNER, repack, write_wheel

pytestmark = pytest.mark.asyncio(loop_scope="module")
DAY = date(2023, 1, 1)
OLD, NEW = b"def hello():\n    return 'Hello'\n", b"def salute():\n    return 'Hello'\n"
RELEASES = {"1.0": OLD, "1.1": OLD, "1.2": OLD, "2.0": NEW, "2.1": NEW, "3.0": NEW}
TESTS = (
    "def test_greeting():\n    from greet import greeting\n\n"
    "    assert greeting('A') == 'Hello, A!'\n"
    "\n\ndef test_sum():\n    assert 1 + 1 == 2\n"
    "\n\ndef test_difference():\n    assert 2 - 1 == 1\n"
    "\n\ndef test_product():\n    assert 2 * 2 == 4\n"
)
GREET = "from wordlib import hello\n\n\ndef greeting(name):\n    return f'{hello()}, {name}!'\n"
PAGE = "from markupsafe import soft_unicode\n\n\ndef greeting(x):\n    return soft_unicode(x)\n"


def released(folder: Path, name: str, files: dict[str, str], requires: tuple[str, ...]) -> None:
    info = "".join(f"Requires-Dist: {line}\n" for line in (*RUNNER, *requires))
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: MIT\n"
    write_sdist(folder, name, {**files, "PKG-INFO": head + info})


def fill(folder: Path) -> dict[str, str]:
    """The releases of this test's world; the days of those that are not of 2020."""
    for name in TOOLS:
        write_wheel(folder, re.split(r"\[", name)[0].replace("-", "_"), "1.0", {})
    for name in RUNNER:
        repack(folder, name)
    days = {}
    for version, text in RELEASES.items():
        path = write_wheel(folder, "wordlib", version, {"wordlib.py": text})
        if version != "1.0":
            days[path.name] = "2023-06-01"
    files = {"greet/__init__.py": GREET, "tests/test_greet.py": TESTS}
    released(folder, "greet", files, ("wordlib",))
    released(folder, "bare", {"bare.py": "x = 1\n"}, ("wordlib",))
    plain = TESTS.replace("from greet import greeting", "greeting = 'Hello, {}!'.format")
    released(folder, "plain", {"plain.py": "", "tests/test_plain.py": plain}, ("wordlib",))
    failing = TESTS.replace("== 4", "== 5").replace("== 2", "== 3")
    files = {"f.py": "", "setup.py": "raise SystemExit(1)\n", "tests/test_f.py": failing}
    released(folder, "failing", files, ("wordlib",))
    for version, name in (("2.0.1", "soft_unicode"), ("2.1.0", "soft_str")):
        text = f"def {name}(value):\n    return str(value)\n".encode()
        path = write_wheel(folder, "markupsafe", version, {"markupsafe.py": text})
        if version == "2.1.0":
            days[path.name] = "2023-06-01"
    for version, text in (("1.0", OLD), ("2.0", NEW)):
        path = write_wheel(folder, "elderlib", version, {"elderlib.py": text})
        if version == "2.0":
            days[path.name] = "2022-06-01"
    aged = {"greet/__init__.py": GREET.replace("wordlib", "elderlib"), "tests/test_aged.py": TESTS}
    aged["tests/test_aged.py"] = TESTS.replace("def test_sum", "import greet\n\n\ndef test_sum")
    released(folder, "aged", aged, ("elderlib",))
    files = {f"page/{name}.py": PAGE for name in ("__init__", "unused")}
    tests = TESTS.replace("greet ", "page ").replace("greeting('A')", "greeting('Hello, A!')")
    released(folder, "page", {**files, "tests/test_page.py": tests}, ("markupsafe",))
    return days


@dataclass(frozen=True)
class World(Place):
    async def mine(self, *packages: str, **bounds: object) -> Journal:
        journal = Journal(self.folder / "journal.db")
        hints = (("wordlib", "3.0"), ("markupsafe", "2.1.0"))
        journal.enqueue(Candidate("dependency-upgrade", name, DAY, hints) for name in packages)
        channel = connect(self.address)
        try:
            states, boxes = StateClient(channel), SandboxClient(channel)
            limits = Bounds(**bounds)  # type: ignore[arg-type]
            run = Mine(states, boxes, journal, self.folder, limits, urls=[self.index])
            self.ended.append(await run.run(["dependency-upgrade"]))
            assert not (await states.list_states()).states, "states are left"
        finally:
            await channel.close()
        return journal

    @property
    def ended(self) -> list[str]:
        return _ENDED


_ENDED: list[str] = []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with mining_place(fill) as place:
        yield World(place.address, place.index, place.folder)


def reasons(journal: Journal) -> dict[str, str]:
    rows = journal.rows("candidate")
    return {row["package"]: f"{row['status']} {row['reason']}" for row in rows}


async def test_from_a_hint_to_an_admitted_task(world: World, tmp_path: Path) -> None:
    journal = await world.mine("greet", "bare", "unknown")
    assert reasons(journal) == {
        "greet": "mined 1 of 1 admitted",
        "bare": "rejected no tests in the source archive",
        "unknown": "rejected unknown package",
    }
    assert world.ended[-1] == "nothing is left"
    assert export(journal, tmp_path)[0] == 1
    (task,) = load_tasks(tmp_path / "tasks.jsonl")
    assert task.id == "greet-1.0__wordlib-2.0"  # bisected: the hint names 3.0
    assert task.culprit is not None
    assert (task.culprit.good, task.culprit.bad, task.culprit.direct) == ("1.2", "2.0", True)
    assert (task.status, task.python, task.pythons) == ("admitted", PYTHON, [PYTHON])
    assert task.tests.fail_to_pass == ["tests/test_greet.py::test_greeting"]
    assert task.tests.pass_to_pass_count == 3
    assert (task.blame, task.category, task.stage) == ("source", "import-error", "test-run")
    assert (task.changed, task.licence) == ({"wordlib": "1.2 2.0"}, "MIT")
    releases = load_distributions(tmp_path / "distributions.jsonl")
    assert set(task.pins_pass) | set(task.pins_fail) <= set(releases)
    (evidence,) = load_evidence(tmp_path / "evidence.jsonl")
    assert (evidence.task_id, evidence.judged_sha256) == (task.id, task.judged_sha256)
    assert (evidence.repeats, evidence.pass_to_pass_sha256) == (2, task.tests.pass_to_pass_sha256)
    runs = {check.name: check.runs for check in evidence.checks}
    assert runs["reference-passes any_fix/pins-restored"] == 3  # the last elsewhere
    found = report(journal)
    assert (found.usable, found.records, found.culprits) == (1, {"admitted": 1}, 1)
    assert found.per_hour["admitted records"] > 0
    journal.close()


async def test_what_gives_no_record_says_why(world: World) -> None:
    journal = await world.mine("plain", "failing")
    found = reasons(journal)
    assert found["plain"] == "rejected everything newest passes"
    assert found["failing"] == "rejected too few tests pass"
    journal.close()


async def test_what_was_decided_is_not_done_again(world: World) -> None:
    journal = await world.mine("greet", "bare")
    assert world.ended[-1] == "nothing is left"
    assert len(journal.rows("spent")) == 2  # a run that took nothing cost nothing
    journal.forget(["rejected"], "no tests in the source archive")
    journal.close()
    again = await world.mine("bare", limit=1)
    assert world.ended[-1] == "1 candidates were taken"
    again.close()


async def test_while_the_file_of_pauses_is_there_nothing_is_begun(world: World) -> None:
    pause = world.folder / "quiet"
    channel = connect(world.address)
    journal = Journal(world.folder / "other.db")
    run = Mine(
        StateClient(channel), SandboxClient(channel), journal, world.folder,
        Bounds(pause_file=pause), urls=[world.index],
    )  # fmt: skip
    client = MiningClient(StateClient(channel), SandboxClient(channel), leave=run.paused)
    pause.write_text("")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.prepare(pb.EnvironmentSpec()), 0.2)
    pause.unlink()
    with pytest.raises(InvalidArgument):  # it goes on, and an empty spec is none
        await client.prepare(pb.EnvironmentSpec())
    journal.close()
    await channel.close()


async def test_a_run_that_is_stopped_calls_nothing_a_failure(world: World) -> None:
    channel = connect(world.address)
    states = StateClient(channel)
    journal = Journal(world.folder / "stopped.db")
    hints = (("wordlib", "3.0"),)
    for name in ("greet", "plain"):
        journal.enqueue([Candidate("dependency-upgrade", name, DAY, hints)])
    run = Mine(
        states, SandboxClient(channel), journal, world.folder, Bounds(workers=2), urls=[world.index]
    )
    running = asyncio.create_task(run.run(["dependency-upgrade"]))
    while {row["status"] for row in journal.rows("candidate")} != {"running"}:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await channel.close()
    assert {row["status"] for row in journal.rows("candidate")} == {"running"}
    journal.recover()
    assert {row["status"] for row in journal.rows("candidate")} == {"waiting"}
    journal.close()


async def test_a_budget_that_is_spent_ends_the_run_and_loses_nothing(world: World) -> None:
    (world.folder / "registry" / "bare.json").unlink()
    first = Journal(world.folder / "journal.db")
    first.forget(["rejected"], "no tests in the source archive")
    first.close()
    journal = await world.mine("bare", requests=0)
    assert "budget" in world.ended[-1]
    status = {row["package"]: row["status"] for row in journal.rows("candidate")}
    assert status["bare"] == "waiting"
    journal.close()


async def test_a_rule_of_the_culprit_is_the_fix_that_keeps_it(world: World, tmp_path: Path) -> None:
    journal = await world.mine("page")
    assert reasons(journal)["page"] == "mined 1 of 1 admitted"
    export(journal, tmp_path)
    task = next(t for t in load_tasks(tmp_path / "tasks.jsonl") if t.package == "page")
    assert (task.modes, task.changed) == (["any_fix", "keep_new"], {"markupsafe": "2.0.1 2.1.0"})
    fix = task.fixes[1]
    assert (fix.mode, fix.origin, fix.edits, fix.changes) == ("keep_new", "rules", [], [])
    (rewrite,) = fix.rewrites  # the module that no test needs was left as it is
    assert (rewrite.path, rewrite.rules) == ("page/__init__.py", ["markupsafe-soft-str"])
    assert "soft_str as soft_unicode" not in (tmp_path / "tasks.jsonl").read_text()
    journal.close()


async def test_what_is_broken_on_the_day_is_tried_as_of_its_own(world: World) -> None:
    journal = await world.mine("aged")
    assert reasons(journal)["aged"] == "mined 1 of 1 admitted"
    (kept,) = [kept for kept in journal.kept("admitted") if kept.task.package == "aged"]
    assert kept.task.id == "aged-1.0__elderlib-2.0"  # which came before the candidate's day
    (row,) = [row for row in journal.rows("candidate") if row["package"] == "aged"]
    assert "on 2023-01-01: too few tests pass" in row["detail"]
    journal.close()
