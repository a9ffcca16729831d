"""Published weights: served before their checkpoint is whole, one set of weights a version."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from learner_svc import checkpoint as ckpt
from learner_svc import published
from learner_svc.checkpoint import FileEntry, entry_of
from learner_svc.published import Position, Published
from learner_svc.session import Session
from policy_svc.engines.weights import Checkpoint
from regreen.batch import Batch
from regreen.learner import v1 as pb
from regreen.rpc.errors import DiskFull, InvalidArgument, NotFound
from tests.unit.learner.test_restarts import pids, start
from tests.unit.learner.test_service import learner
from tests.unit.learner.test_session import saved_after, small_disk, spec_of, train

Make = Callable[..., Batch]
__all__ = ["small_disk"]
POSITION = Position("run_1", 1, 10, 3)


def published_after(session: Session, root: Path, batches: list[Batch], version: int) -> Published:
    """What it publishes once it has trained on them."""
    train(session, batches)
    made = session.publish(root, version, version)
    assert made is not None
    return made


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_a_checkpoint_shares_the_file_of_what_was_published(
    tiny_model: Path, make_batch: Make, tmp_path: Path, engine: str
) -> None:
    root = tmp_path / "checkpoints"
    session = Session(spec_of(tiny_model, engine), tmp_path / "ext")
    made = published_after(session, root, [make_batch()], 7)
    assert ckpt.checkpoints(root) == []
    assert entry_of(made.file) == made.entry
    assert made.position == Position("run_1", 1, 7, 7)
    loaded = Checkpoint(made.path)  # as a policy reads it
    assert loaded.tensor("model.norm.weight").shape == (32,)
    assert {path.name for path in made.path.iterdir()} >= {"config.json", "tokenizer.json"}
    saved = session.save(root, 7, 3, driver_step=7)
    assert saved is not None
    assert (saved.path / "model.safetensors").samefile(made.file)
    assert saved.manifest.weights == made.entry
    assert (saved.manifest.policy_version, saved.manifest.driver_step) == (7, 7)
    ckpt.verify(saved.path, saved.manifest)
    expected = train(session, [make_batch(seed=1)])
    session.close()
    resumed = Session(spec_of(tiny_model, engine), tmp_path / "ext", resume=saved.path)
    assert train(resumed, [make_batch(seed=1)]) == expected
    resumed.close()


def test_a_step_after_it_is_not_in_what_was_published(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    session = Session(spec_of(tiny_model), tmp_path / "ext")
    made = published_after(session, root, [make_batch()], 1)
    saved = saved_after(session, root, [make_batch(seed=1)])
    assert not (saved.path / "model.safetensors").samefile(made.file)
    assert saved.manifest.weights.sha256 != made.entry.sha256
    assert entry_of(made.file) == made.entry


def test_a_checkpoint_is_whole_where_what_was_published_is_gone(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    session = Session(spec_of(tiny_model), tmp_path / "ext")
    made = published_after(session, root, [make_batch()], 1)
    made.file.unlink()
    saved = session.save(root, 1, 3)
    assert saved is not None
    ckpt.verify(saved.path, saved.manifest)
    assert saved.manifest.weights == made.entry


def test_the_same_step_again_has_its_version_and_another_has_the_next(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    first = Session(spec_of(tiny_model), tmp_path / "ext")
    made = published_after(first, root, [make_batch()], 10)
    again = Session(spec_of(tiny_model), tmp_path / "ext")
    same = published_after(again, root, [make_batch()], 10)
    assert (same.path, same.entry, same.position) == (made.path, made.entry, made.position)
    other = Session(spec_of(tiny_model), tmp_path / "ext")
    changed = published_after(other, root, [make_batch(seed=1)], 10)
    assert (changed.position.policy_version, changed.position.driver_step) == (11, 10)
    assert changed.entry != made.entry
    # Ranks that were lost after they published, and made the step another one.
    third = Session(spec_of(tiny_model), tmp_path / "ext")
    saved = saved_after(third, root, [make_batch(seed=2)])
    assert saved.manifest.policy_version == 0  # under which nothing was published
    moved = third.save(root, 10, 3)
    assert moved is not None
    assert moved.manifest.policy_version == 12
    whole = first.save(root, 10, 3)
    assert whole is not None
    assert whole.manifest.policy_version == 10


def test_the_newest_stay_and_their_numbers_are_remembered(tmp_path: Path) -> None:
    source, root = tmp_path / "model", published.beside(tmp_path / "checkpoints")
    source.mkdir()
    (source / "config.json").write_text("{}")

    def make(version: int, text: str) -> Published:
        def write(path: Path) -> FileEntry:
            path.write_text(text)
            return entry_of(path)

        return published.publish(root, replace(POSITION, policy_version=version), source, write)

    made = [make(version, f"weights {version}") for version in (10, 11, 12)]
    assert [one.path.exists() for one in made] == [False, True, True]
    assert published.newest(tmp_path / "checkpoints") == made[2]
    assert make(10, "others").position.policy_version == 13
    back = make(10, "weights 10")  # a run that goes on from an older checkpoint
    assert back.position.policy_version == 10
    assert published.newest(tmp_path / "checkpoints") == back
    with (root / "given.jsonl").open("a") as lines:
        lines.write('{"version": 14, "sha')
    assert make(14, "weights 14").position.policy_version == 14
    assert make(14, "others again").position.policy_version == 15
    back = make(10, "weights 10")
    back.file.write_text("cut")
    assert published.newest(tmp_path / "checkpoints") != back
    with pytest.raises(NotFound):
        published.at(back.path)
    healed = make(10, "weights 10")
    assert (healed.path, healed.file.read_text()) == (back.path, "weights 10")


_WRITERS = """
import json, os, signal, sys
from pathlib import Path

from learner_svc import checkpoint, published

home, again = Path(sys.argv[1]), sys.argv[2] == "again"
source = home / "model"
source.mkdir()
(source / "config.json").write_text("{}")
CALLS = ("open", "os.rename", "os.mkdir", "shutil.copyfile", "os.remove", "shutil.rmtree")


def write(path):
    path.write_text("new weights")
    return checkpoint.entry_of(path)


def publish(root, at):
    \"\"\"Whether a process of its own came to its end; it is killed at call number `at`.\"\"\"
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    calls = 0

    def count(event, args):
        nonlocal calls
        calls += event in CALLS
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.sweep(root)
    sys.addaudithook(count)
    published.publish(root, published.Position("run_1", 1, 10, 3), source, write)
    os._exit(0)


at, ended = 0, False
while not ended:
    at += 1
    checkpoints = home / f"run-{at}" / "checkpoints"
    root = published.beside(checkpoints)
    if again:
        assert publish(root, 0)
    ended = publish(root, at)
    found = published.newest(checkpoints)
    assert found is not None or not (again or ended), at
    assert found is None or checkpoint.entry_of(found.file) == found.entry, at
    assert checkpoint.checkpoints(checkpoints) == []
    assert publish(root, 0), at
    after = published.newest(checkpoints)
    assert after.position.policy_version == 10, at
    lines = (root / "given.jsonl").read_text().split("\\n")
    assert {json.loads(line)["version"] for line in lines if line} == {10}, at
print(at)
"""


@pytest.mark.parametrize("again", ["anew", "again"])
def test_a_kill_at_any_call_leaves_it_whole_or_not_at_all(tmp_path: Path, again: str) -> None:
    command = [sys.executable, "-c", _WRITERS, str(tmp_path), again]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8


def test_a_full_disk_leaves_what_was_published(
    tiny_model: Path, make_batch: Make, tmp_path: Path, small_disk: Path
) -> None:
    session = Session(spec_of(tiny_model), tmp_path / "ext")
    root = small_disk / "checkpoints"
    made = published_after(session, root, [make_batch()], 1)
    (small_disk / "big").write_bytes(bytes(400 << 10))
    train(session, [make_batch(seed=1)])
    with pytest.raises(DiskFull):
        session.publish(root, 2, 2)
    assert published.newest(root) == made
    assert not list(published.beside(root).glob(".partial-*"))


async def test_weights_over_the_wire_and_a_rank_lost_before_their_checkpoint(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed).to_bytes() for seed in range(2)]
    async with learner(tmp_path) as (client, runs):
        await start(client, tiny_model)
        await client.step("run_l", 1, batch=batches[0])
        first = await client.save_checkpoint("run_l", policy_version=11, driver_step=1)
        assert first.driver_step == 1
        await client.step("run_l", 2, batch=batches[1])
        made = await client.publish_weights("run_l", policy_version=12, driver_step=2)
        assert (made.step, made.policy_version, made.driver_step) == (2, 12, 2)
        assert entry_of(Path(made.uri) / "model.safetensors").sha256 == made.digest.sha256
        for field in ("policy_version", "driver_step"):
            with pytest.raises(InvalidArgument, match=f"{field}: is negative"):
                await client.publish_weights("run_l", **{field: -1})
        os.kill(pids(runs)[0], signal.SIGKILL)
        saved = await client.save_checkpoint("run_l", policy_version=12, driver_step=2)
        assert (saved.digest, saved.policy_version) == (made.digest, 12)
        assert (await client.get_run("run_l")).published == made
        await client.step("run_l", 3, batch=make_batch(seed=3).to_bytes())
        ahead = await client.publish_weights("run_l", policy_version=13, driver_step=3)
    async with learner(tmp_path) as (client, _):
        run = await client.get_run("run_l")
        assert (run.state, run.step, run.checkpoint.policy_version) == (
            pb.RUN_STATE_STOPPED,
            2,
            12,
        )
        assert run.published == ahead  # known, and nothing goes on from it
