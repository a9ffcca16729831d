"""Builds of one's own, imports and exports over real dataset and sandbox services and git."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from dataset_svc.__main__ import serving as dataset_serving
from dataset_svc.settings import DatasetSettings
from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.tasks.add import Added, add
from regreen.tasks.admit import Admission, import_records
from regreen.tasks.checkout import Wish, check_out
from regreen.tasks.exchange import Imported, export_chats, export_tasks, import_found, items_of
from regreen.tasks.formats.extension import undecided
from regreen.tasks.formats.items import Written
from regreen.tasks.formats.registry import read
from regreen.tasks.model import DistributionRecord, TaskRecord
from regreen.tasks.pin import TOOLS
from regreen.tasks.records import RecordStore
from sandbox_svc.__main__ import serving as sandbox_serving
from sandbox_svc.settings import SandboxSettings
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.index import wheel_index
from tests.fixtures.policy.http import serving
from tests.fixtures.tasks.tiny_record import tiny_record
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, PYTHON, RUNNER, TINY, write_wheel
from tests.integration import dataset_samples as samples

pytestmark = pytest.mark.asyncio(loop_scope="module")
SAMPLES = Path(__file__).resolve().parents[1] / "fixtures" / "formats"
LOOPBACK = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "drain_s": 0.5}
PINNED, GOOD = "wordlib==2.0\n", "wordlib==1.0\n"
GREET = "greet/__init__.py"


@dataclass(frozen=True)
class World:
    stack: Stack
    home: Path
    record: TaskRecord
    releases: dict[str, DistributionRecord]
    kept: RecordStore
    index: str

    async def add(self, source: str | Path, **asked: object) -> Added:
        """`regreen tasks add`."""
        wish = Wish(**{"python": PYTHON, **asked})  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            checkout = await asyncio.to_thread(check_out, str(source), wish, work)
            return await add(
                self.stack, checkout, self.home, work, quiet, repeats=2, keep=self.kept
            )

    async def take(self, path: Path, format: str, **more: object) -> Imported:
        """`regreen tasks import --format`."""
        found = read(path, format)
        return await import_found(
            self.stack,
            found,
            self.home,
            self.kept,
            quiet,
            **more,  # type: ignore[arg-type]
        )

    async def export(self, tasks: list[pb.Task], format: str, out: Path) -> Written:
        return await export_tasks(self.stack, tasks, format, out, self.home, self.kept, quiet)


def quiet(stage: str, done: float, total: float, text: str) -> None:
    """Nobody looks."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(database_url: str) -> AsyncIterator[World]:
    home = Path(tempfile.mkdtemp(prefix="regreen-exchange-"))
    home.chmod(0o711)
    made = home / "made"
    made.mkdir()
    store = DistStore(home / "sandbox" / "dists")
    record, releases = tiny_record(store, made)
    for tool in TOOLS:
        name = re.split(r"\[", tool)[0].replace("-", "_")
        store.adopt(write_wheel(made, name, "1.0", {}))
    before = os.environ.get("REGREEN_INDEX_URL")
    try:
        async with serving(wheel_index(made)) as index:
            os.environ["REGREEN_INDEX_URL"] = f"{index}/simple/"
            async with (
                sandbox_serving(SandboxSettings(home=home, warm_seats=1, **LOOPBACK)) as one,
                dataset_serving(
                    DatasetSettings(home=home, fsync=False, **LOOPBACK), database_url
                ) as two,
                Stack(Endpoints(sandbox=one.address, dataset=two.address)) as stack,
            ):
                kept = RecordStore(home / "tasks")
                yield World(stack, home, record, releases, kept, f"{index}/simple/")
    except MissingDependency as error:
        pytest.skip(f"no sandboxes here: {error}")
    finally:
        os.environ.pop("REGREEN_INDEX_URL", None)
        if before is not None:
            os.environ["REGREEN_INDEX_URL"] = before
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny project as a team has it: one pin, what its tests need beside it."""
    root = tmp_path / "greet"
    shutil.copytree(TINY, root, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "requirements.txt").write_text(PINNED)
    (root / "requirements-dev.txt").write_text("".join(f"{name}\n" for name in RUNNER))
    return root


def git(root: Path, *words: str) -> str:
    argv = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *words]
    return subprocess.run(argv, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def committed(root: Path, text: str) -> str:
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", text)
    return git(root, "rev-parse", "HEAD")


def mend(root: Path) -> None:
    text = (root / GREET).read_text()
    (root / GREET).write_text(text.replace("hello", "salute"))


async def test_a_directory_with_a_patch_is_detected_pinned_and_admitted(
    world: World, tiny: Path
) -> None:
    committed(tiny, "broken")
    mend(tiny)
    patch = git(tiny, "diff") + "\n"
    git(tiny, "checkout", "--quiet", ".")
    (tiny / "fix.patch").write_text(patch)
    (tiny / "task.toml").write_text(
        '[task]\nid = "greet-own"\ntimeout_s = 60\nlicence = "MIT"\n\n'
        '[fix]\npatch = "fix.patch"\nmode = "keep_new"\n'
    )
    done = await world.add(tiny)
    task = done.task
    assert task.status == pb.TASK_STATUS_ADMITTED, done.report.reason
    assert (task.id, task.split, task.kind) == ("greet-own", "train", "local")
    assert task.labels["licence"] == "MIT"
    assert sorted(task.fail_to_pass) == sorted(FAIL_TO_PASS)
    assert {f"{pin.name}=={pin.version}" for pin in task.environment.pins} >= {"wordlib==2.0"}
    assert all(pin.files for pin in task.environment.pins)
    assert [(fix.origin, [c.path for c in fix.changes]) for fix in task.fixes] == [
        ("patch", [GREET])
    ]
    (again,) = await Admission(
        world.stack, world.kept.of_tasks([task], []), {}, repeats=2, again=True
    ).run([task.id])
    assert again.status == pb.TASK_STATUS_ADMITTED
    assert (tiny / GREET).read_text() == (TINY / GREET).read_text()


async def test_a_repository_with_a_fix_that_moves_a_pin_and_brings_tests(
    world: World, tiny: Path
) -> None:
    (tiny / "tests/test_greet.py").unlink()
    broken = committed(tiny, "broken, untested")
    shutil.copy(TINY / "tests/test_greet.py", tiny / "tests/test_greet.py")
    (tiny / "requirements.txt").write_text(GOOD)
    (tiny / "tox.ini").write_text("[tox]\n")
    fixed = committed(tiny, "mended, with tests")
    (tiny / "README").write_text("later\n")
    committed(tiny, "later")
    done = await world.add(f"file://{tiny}", fix_commit=fixed, id="greet-moved")
    task = done.task
    assert task.status == pb.TASK_STATUS_ADMITTED, done.report.reason
    assert dict(task.moved) == {"wordlib": "1.0 2.0"}
    assert [c.path for fix in task.fixes for c in fix.changes] == ["requirements.lock"]
    assert sorted(task.fail_to_pass) == sorted(FAIL_TO_PASS)
    said = " / ".join(done.notes)
    assert "1 test files of the fix are laid over the project" in said
    assert "requirements.txt: counts as moved packages (wordlib)" in said
    assert "no part of a fix: tox.ini" in said
    assert broken != fixed


async def test_without_a_fix_a_task_is_unverified_and_shown_as_such(
    world: World, tiny: Path
) -> None:
    done = await world.add(tiny, id="greet-unfixed")
    assert done.task.status == pb.TASK_STATUS_UNVERIFIED, done.report.reason
    assert done.report.reason == "2 tests fail in each of 2 runs; no fix is known"
    assert sorted(done.report.fail_to_pass) == sorted(FAIL_TO_PASS)
    assert [check.ok for check in done.report.checks] == [True, True]
    admitted = pb.TaskFilter(statuses=[pb.TASK_STATUS_ADMITTED])
    assert "greet-unfixed" not in {t.id for t in await world.stack.tasks.all_tasks(admitted)}
    unverified = pb.TaskFilter(statuses=[pb.TASK_STATUS_UNVERIFIED])
    assert [t.id for t in await world.stack.tasks.all_tasks(unverified)] == ["greet-unfixed"]
    assert done.task.state_id
    again = await world.add(tiny, id="greet-unfixed")
    assert not again.report.drift


@pytest.mark.parametrize(
    ("change", "asked", "said"),
    [
        ({"requirements.txt": GOOD}, {}, "path: all 3 tests pass"),
        ({"tests/test_greet.py": ""}, {}, "tests: no test was found"),
        ({"fix.patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"}, {"patch": 1}, "fix.patch: fix"),
        ({"fix.patch": None}, {"patch": 1}, r"fix.patch: .*fix.patch is no file"),
        ({"task.toml": "[task]\nname = 'a'\n"}, {}, r"task.toml field task.name: is not known"),
        ({"task.toml": "[fix]\npatch = 1\n"}, {}, r"task.toml field fix.patch: is 1; give a text"),
        ({"task.toml": "[fix\n"}, {}, r"task.toml: cannot be read: .*line 1"),
        ({"task.toml": "[task]\npath = '..'\n"}, {}, r"task.path: '..' is no directory inside"),
        ({"task.toml": "[task]\nid = 'A b'\n"}, {}, r"task.id: 'A b' is no task id"),
        ({}, {"split": "some"}, r"task.split: 'some' is not known"),
        ({}, {"mode": "some"}, r"fix.mode: 'some' is not known"),
        ({}, {"fix_commit": "no-such"}, r"path: .* cannot be cloned|fix.commit: 'no-such' cannot"),
        ({}, {"source": "file:///no/such"}, r"path: file:///no/such cannot be cloned"),
        ({}, {"source": "/no/such"}, r"path: /no/such is no directory"),
    ],
)
async def test_what_cannot_be_added_is_said_with_its_field(
    world: World, tiny: Path, change: dict, asked: dict, said: str
) -> None:
    for name, text in change.items():
        if text is not None:
            (tiny / name).write_text(text)
    words = dict(asked)
    if words.pop("patch", None):
        words["fix_patch"] = tiny / "fix.patch"
    with pytest.raises(InvalidArgument, match=said):
        await world.add(words.pop("source", tiny), **words)


async def test_a_fix_that_repairs_nothing_is_refused(world: World, tiny: Path) -> None:
    committed(tiny, "broken")
    (tiny / "README").write_text("more\n")
    other = committed(tiny, "other")
    with pytest.raises(InvalidArgument, match=r"fix: turns no test green"):
        await world.add(f"file://{tiny}", fix_commit=other)
    (tiny / "tox.ini").write_text("[tox]\n")
    settings = committed(tiny, "settings")
    with pytest.raises(InvalidArgument, match=r"fix: changes neither source nor installed"):
        await world.add(f"file://{tiny}", fix_commit=settings)
    with pytest.raises(InvalidArgument, match=r"fix: changes nothing"):
        await world.add(f"file://{tiny}", fix_commit=settings, commit=settings)


async def test_a_repository_runs_nothing_when_it_is_read(world: World, tiny: Path) -> None:
    told = tiny.parent / "told"
    hook = tiny.parent / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {told}\n")
    hook.chmod(0o755)
    (tiny / ".gitattributes").write_text("*.py filter=spy\n")
    committed(tiny, "broken")
    for name in ("post-checkout", "reference-transaction"):
        shutil.copy(hook, tiny / ".git/hooks" / name)
    git(tiny, "config", "filter.spy.smudge", str(hook))
    git(tiny, "config", "core.fsmonitor", str(hook))
    told.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = check_out(f"file://{tiny}", Wish(), Path(folder))
        assert found.broken.name == "greet"
        assert (found.broken / GREET).read_text() == (TINY / GREET).read_text()
        (Path(folder) / "no").mkdir()
        with pytest.raises(InvalidArgument, match="cannot be cloned"):
            check_out("git+ssh://-oProxyCommand=x/y", Wish(), Path(folder) / "no")
    assert not told.exists()


async def test_tasks_of_other_systems_are_stored_as_waiting(world: World) -> None:
    done = await world.take(SAMPLES / "swe-bench/instances.jsonl", "swe-bench")
    assert (done.imported, done.unchanged, len(done.waiting)) == (2, 0, 2)
    task = await world.stack.tasks.get_task("acme__lantern-101")
    assert task.status == pb.TASK_STATUS_WAITING
    report = await world.stack.tasks.get_gate_report(task.id)
    assert report.reason.startswith("needs image swebench/sweb.eval.x86_64.acme_1776_lantern-101")
    assert not report.checks
    again = await world.take(SAMPLES / "swe-bench/instances.jsonl", "swe-bench")
    assert (again.imported, again.unchanged, len(again.waiting)) == (0, 2, 2)
    for path, format in (("swe-smith/instances.json", "swe-smith"), ("bump", "bump")):
        await world.take(SAMPLES / path, format, split="train")
    waiting = pb.TaskFilter(statuses=[pb.TASK_STATUS_WAITING], split="train")
    found = await world.stack.tasks.all_tasks(waiting)
    assert {t.foreign.format for t in found} == {"swe-smith", "bump"}
    with pytest.raises(InvalidArgument, match="foreign"):
        await world.stack.state.get_state((await _prepare(world, found[0])).id)


async def _prepare(world: World, task: pb.Task) -> object:
    async for event in world.stack.state.prepare_state(task.environment):
        if event.HasField("state"):
            return event.state
    raise AssertionError


async def test_an_image_at_hand_becomes_a_state_and_verifies_nothing(
    world: World, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "app").mkdir(parents=True)
    (root / "app/rays.txt").write_text("one\n")
    images = tmp_path / "images"
    images.mkdir()
    with tarfile.open(images / "acme__with-image.tar", "w") as archive:
        archive.add(root / "app", "app")
    done = await world.take(SAMPLES / "harbor", "harbor", images=images)
    assert list(done.states) == ["acme__with-image"]
    task = await world.stack.tasks.get_task("acme__with-image")
    assert (task.status, task.state_id) == (pb.TASK_STATUS_WAITING, done.states[task.id])
    assert (await world.stack.state.get_state(task.state_id)).base.startswith("image:")
    reason = (await world.stack.tasks.get_gate_report(task.id)).reason
    assert "not verified; needs a runner of its tests" in reason


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def admitted(world: World) -> pb.Task:
    """The tiny task, admitted."""
    await import_records(world.stack, [world.record], world.releases, keep=world.kept)
    (task,) = await Admission(world.stack, [world.record], {}, repeats=2).run([world.record.id])
    assert task.status == pb.TASK_STATUS_ADMITTED
    return task


@pytest.mark.parametrize("format", ["swe-bench", "swe-smith", "harbor", "parquet"])
async def test_an_admitted_task_goes_out_and_comes_back_to_be_gated(
    world: World, admitted: pb.Task, format: str, tmp_path: Path
) -> None:
    done = await world.export([admitted], format, tmp_path / "out")
    assert (done.count, done.left_out) == (1, {})
    ((item,), _) = await items_of(world.stack, [admitted], world.home, world.kept, quiet)
    assert item.pass_to_pass
    found = read(done.paths[0], format)
    (native,) = found.native
    assert native.task == undecided(admitted)
    back = await world.take(done.paths[0], format)
    assert (back.unchanged, back.native) == (1, [admitted.id])
    stored = await world.stack.tasks.get_task(admitted.id)
    assert stored.status == pb.TASK_STATUS_ADMITTED
    with pytest.raises(InvalidArgument, match=r"out: .* is not empty"):
        await world.export([admitted], format, tmp_path / "out")


async def test_a_task_from_a_file_is_new_until_it_is_gated_here(
    world: World, admitted: pb.Task, tmp_path: Path
) -> None:
    other = world.record.model_copy(update={"id": "greet-travelled"})
    await import_records(world.stack, [other], world.releases, keep=world.kept)
    await Admission(world.stack, [other], {}, repeats=2).run([other.id])
    task = await world.stack.tasks.get_task(other.id)
    done = await world.export([task], "harbor", tmp_path / "out")
    (native,) = read(done.paths[0], "harbor").native
    fresh = world.kept.of_tasks([native.task], [])
    native.task.id = "greet-arrived"
    await world.stack.tasks.import_tasks([native.task])
    arrived = await world.stack.tasks.get_task("greet-arrived")
    assert (arrived.status, arrived.state_id) == (pb.TASK_STATUS_NEW, "")
    assert [record.id for record in fresh] == [other.id]


async def test_a_task_with_a_tree_takes_it_along_in_harbor(
    world: World, tiny: Path, tmp_path: Path
) -> None:
    task = (await world.add(tiny, id="greet-tree")).task
    done = await world.export([task], "harbor", tmp_path / "out")
    assert (done.count, done.left_out) == (1, {})
    (native,) = read(done.paths[0], "harbor").native
    assert native.tree
    assert native.task == undecided(task)
    (done.paths[0] / "environment/repo.tar").write_bytes(b"other")
    with pytest.raises(InvalidArgument, match=r"greet-tree/environment/repo.tar: is not the tree"):
        read(done.paths[0], "harbor")


def rewarded(folder: Path, work: Path) -> str:
    """What the exported verifier says of the environment."""
    env = {**os.environ, "REGREEN_WORK": str(work), "REGREEN_LOGS": str(work / "logs")}
    script = folder / "tests/test.sh"
    done = subprocess.run([str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return (work / "logs/reward.txt").read_text().strip()


@pytest.mark.parametrize("origin", ["source-edit", "pins-restored"])
async def test_the_exported_directory_builds_fails_and_is_solved(
    world: World, admitted: pb.Task, origin: str, tmp_path: Path
) -> None:
    task = pb.Task()
    task.CopyFrom(admitted)
    kept = [fix for fix in admitted.fixes if fix.origin == origin]
    del task.fixes[:]
    task.fixes.extend(kept)
    done = await world.export([task], "harbor", tmp_path / "out")
    folder, work = done.paths[0], tmp_path / "work"
    env = {**os.environ, "REGREEN_WORK": str(work), "PIP_INDEX_URL": world.index}
    env.pop("PYTHONPATH", None)
    build = [sys.executable, str(folder / "environment/prepare.py")]
    solve = [str(folder / "solution/solve.sh")]
    made = await asyncio.to_thread(
        subprocess.run, build, env=env, capture_output=True, text=True, timeout=180
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert await asyncio.to_thread(rewarded, folder, work) == "0"
    solved = await asyncio.to_thread(
        subprocess.run, solve, env=env, capture_output=True, text=True, timeout=60
    )
    assert solved.returncode == 0, solved.stdout + solved.stderr
    assert await asyncio.to_thread(rewarded, folder, work) == "1"


async def test_a_changed_archive_is_not_built_from(
    world: World, admitted: pb.Task, tmp_path: Path
) -> None:
    folder = (await world.export([admitted], "harbor", tmp_path / "out")).paths[0]
    spec = json.loads((folder / "environment/spec.json").read_text())
    spec["source"]["sha256"] = "0" * 64
    (folder / "environment/spec.json").write_text(json.dumps(spec))
    env = {**os.environ, "REGREEN_WORK": str(tmp_path / "work"), "PIP_INDEX_URL": world.index}
    build = [sys.executable, str(folder / "environment/prepare.py")]
    made = await asyncio.to_thread(subprocess.run, build, env=env, capture_output=True, text=True)
    assert made.returncode != 0
    assert "has another sha256 than the task names" in made.stderr


async def test_a_task_whose_state_is_gone_is_left_out_with_the_remedy(
    world: World, admitted: pb.Task, tmp_path: Path
) -> None:
    task = pb.Task()
    task.CopyFrom(admitted)
    task.state_id = "st_" + "0" * 32
    done = await world.export([task], "swe-bench", tmp_path / "out")
    assert done.count == 0
    assert "regreen tasks prepare" in done.left_out[task.id]


async def test_chats_are_of_solved_rollouts_without_a_hack(
    world: World, admitted: pb.Task, tmp_path: Path
) -> None:
    good, hacked, failed, other = (samples.trajectory(admitted.id) for _ in range(4))
    for trajectory in (good, hacked, failed, other):
        trajectory.ClearField("id")
        trajectory.reward.solved = True
        del trajectory.reward.hacks[:]
    hacked.reward.hacks.append("deleted-test")
    failed.reward.solved = False
    other.task_id = "acme__lantern-101"
    for trajectory in (good, hacked, failed, other):
        await world.stack.trajectories.commit_trajectory(trajectory)
    chats = world.stack.trajectories.export_trajectories
    done = await export_chats(chats(), {admitted.id}, tmp_path / "a", quiet, tokens=True)
    assert done.count == 1
    assert done.left_out == {
        "flagged as a hack": "1",
        "not solved": "1",
        "of other tasks or splits": "1",
    }
    (line,) = done.paths[0].read_text().splitlines()
    row = json.loads(line)
    assert row["task_id"] == admitted.id
    assert row["token_ids"] == list(good.token_ids)
    assert row["loss_mask"] == list(good.loss_mask)
    roles = [message["role"] for message in row["messages"]]
    assert roles[0] == "user"
    assert "assistant" in roles
    text = await export_chats(chats(), {admitted.id}, tmp_path / "b", quiet, style="text")
    plain = json.loads(text.paths[0].read_text())
    assert "token_ids" not in plain
    assert {message["role"] for message in plain["messages"]} <= {"user", "assistant"}
