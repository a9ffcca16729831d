"""Sessions and checkpoints: exact resume, engine equality, damage, full disks."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from learner_svc import checkpoint as ckpt
from learner_svc.checkpoint_writer import CheckpointWriter
from learner_svc.session import Session
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.batch import Batch
from regreen.rpc.errors import DataLoss, DiskFull, FailedPrecondition, InvalidArgument, NotFound

Make = Callable[..., Batch]


def spec_of(
    model: Path, engine: str = "plain", kind: RunKind = RunKind.GRPO, **changes: object
) -> RunSpec:
    fields: dict[str, object] = {
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "micro_batch_tokens": 150,
        "loss": "sft" if kind is RunKind.SFT else "dapo",
    }
    hyperparameters = Hyperparameters(**fields | changes)  # type: ignore[arg-type]
    return RunSpec("run_1", kind, str(model), engine, hyperparameters)


def train(session: Session, batches: list[Batch]) -> list[tuple[float, float]]:
    done = []
    for batch in batches:
        metrics = session.step(batch, (), lambda done, total: None)
        done.append((metrics["loss"], metrics["grad_norm"]))
    return done


def saved_after(session: Session, root: Path, batches: list[Batch]) -> ckpt.Saved:
    """Its checkpoint once it has trained on them."""
    train(session, batches)
    saved = session.save(root, 0, 3)
    assert saved is not None
    return saved


def test_progress_counts_the_tokens_of_all_updates_of_a_step(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    session = Session(spec_of(tiny_model, updates_per_step=2), tmp_path / "ext")
    told: list[tuple[int, int]] = []
    session.step(make_batch(), (), lambda done, total: told.append((done, total)))
    session.close()
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {total for _, total in told} == {told[-1][0]}


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_resumed_run_continues_bit_for_bit(
    tiny_model: Path, make_batch: Make, tmp_path: Path, engine: str, layers: int
) -> None:
    spec = spec_of(tiny_model, engine, trainable_layers=layers)
    batches = [make_batch(seed=seed) for seed in range(5)]
    straight = Session(spec, tmp_path / "ext")
    train(straight, batches[:2])
    saved = straight.save(tmp_path / "checkpoints", policy_version=7, keep=3)
    assert saved is not None
    expected = train(straight, batches[2:])
    straight.close()
    resumed = Session(spec, tmp_path / "ext", resume=saved.path)
    assert (resumed.step_done, saved.manifest.policy_version) == (2, 7)
    assert saved.manifest.group_ids == ("grp_0", "grp_1") * 2
    assert train(resumed, batches[2:]) == expected
    resumed.close()


def test_the_engines_agree_and_read_each_others_checkpoints(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed) for seed in range(4)]
    plain = Session(spec_of(tiny_model, "plain"), tmp_path / "ext")
    results = train(plain, batches[:2])
    saved = plain.save(tmp_path / "checkpoints", 0, 3)
    assert saved is not None
    rest = train(plain, batches[2:])
    other = Session(spec_of(tiny_model, "deepspeed"), tmp_path / "ext")
    assert train(other, batches[:2]) == [pytest.approx(pair, rel=1e-5) for pair in results]
    other.close()
    crossed = Session(spec_of(tiny_model, "deepspeed"), tmp_path / "ext", resume=saved.path)
    assert train(crossed, batches[2:]) == [pytest.approx(pair, rel=1e-5) for pair in rest]
    crossed.close()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, raised inside DeepSpeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_alike_and_resume(
    tiny_model: Path, make_batch: Make, tmp_path: Path, stage: int
) -> None:
    batches = [make_batch(seed=seed) for seed in range(3)]
    plain = Session(spec_of(tiny_model, "plain"), tmp_path / "ext")
    expected = train(plain, batches)
    spec = spec_of(tiny_model, "deepspeed", zero_stage=stage)
    session = Session(spec, tmp_path / "ext")
    results = train(session, batches[:2])
    saved = session.save(tmp_path / "checkpoints", 0, 3)
    assert saved is not None
    results += train(session, batches[2:])
    session.close()
    assert results == [pytest.approx(pair, rel=1e-4) for pair in expected]
    resumed = Session(spec, tmp_path / "ext", resume=saved.path)
    assert train(resumed, batches[2:]) == results[2:]
    resumed.close()
    if stage == 3:  # sharded, in a format of its own
        return
    [after] = train(Session(spec_of(tiny_model, "plain"), tmp_path, resume=saved.path), batches[2:])
    assert after == pytest.approx(results[2], rel=1e-4)
    halfway = Session(spec_of(tiny_model, "plain"), tmp_path)
    train(halfway, batches[:2])
    crossed = halfway.save(tmp_path / "crossed", 0, 3)
    assert crossed is not None
    taken_up = Session(spec, tmp_path / "ext", resume=crossed.path)
    assert train(taken_up, batches[2:]) == [pytest.approx(results[2], rel=1e-4)]
    taken_up.close()


def test_state_that_one_rank_wrote_in_deepspeeds_format_resumes(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    spec = spec_of(tiny_model, "deepspeed", zero_stage=2)
    session = Session(spec, tmp_path / "ext")
    train(session, [make_batch()])
    session._engine.state_format = "deepspeed-zero2-world1"  # as releases before did
    saved = session.save(tmp_path / "checkpoints", 0, 3)
    assert saved is not None
    assert any(name.startswith("engine/") for name in saved.manifest.files)
    expected = train(session, [make_batch(seed=1), make_batch(seed=2)])
    session.close()
    resumed = Session(spec, tmp_path / "ext", resume=saved.path)
    assert train(resumed, [make_batch(seed=1), make_batch(seed=2)]) == expected
    resumed.close()


def test_the_loss_does_not_depend_on_micro_batches_or_sharing(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    for kind in RunKind:
        batch = make_batch(groups=3, size=4, kind=kind.value)
        results = []
        for changes in (
            {"micro_batch_tokens": 4096},
            {"micro_batch_tokens": 60},
            {"no_prefix_sharing": True},
        ):
            session = Session(spec_of(tiny_model, kind=kind, **changes), tmp_path)
            results += train(session, [batch])
        assert results[1:] == [pytest.approx(results[0], rel=1e-4)] * 2


def test_sft_lowers_its_loss(tiny_model: Path, make_batch: Make, tmp_path: Path) -> None:
    session = Session(spec_of(tiny_model, kind=RunKind.SFT, warmup_steps=0), tmp_path)
    losses = [loss for loss, _ in train(session, [make_batch(kind="sft")] * 8)]
    assert losses[-1] < losses[0] - 0.1


def test_grpo_raises_the_probability_of_rewarded_samples(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batch = make_batch(groups=1, size=4)
    session = Session(spec_of(tiny_model, warmup_steps=0, importance_cap=-1.0), tmp_path)
    before = session.step(batch, (), lambda done, total: None)
    for _ in range(5):
        after = session.step(batch, (), lambda done, total: None)
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)  # ratio 1: -mean(advantage)
    assert after["mismatch_k1"] != before["mismatch_k1"]


def test_a_reset_trajectory_counts_as_one(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    """Its parts carry its id: settings stay the learner's, and rewards count once."""
    batch = make_batch(groups=1, size=4)
    rewards, cut = (1.0, 1.0, 0.0, 0.5), (False, False, False, True)
    names = ("a", "a", "b", "c")
    samples = tuple(
        replace(sample, reward=reward, truncated=truncated, sample_id=name, weight=weight)
        for sample, reward, truncated, name, weight in zip(
            batch, rewards, cut, names, (0.5, 0.5, 1.0, 1.0), strict=True
        )
    )
    session = Session(spec_of(tiny_model, baseline="group_mean", truncated="fail"), tmp_path)
    given, in_loss, flat = session._trainer._advantages(Batch(samples))
    assert given.tolist() == pytest.approx([0.5, 0.5, -0.5, 0.0])
    assert in_loss.all()
    assert not flat.any()
    session = Session(spec_of(tiny_model, truncated="keep_baseline"), tmp_path)
    given, in_loss, _ = session._trainer._advantages(Batch(samples))
    assert given.tolist() == pytest.approx([0.75, 0.75, -0.75, 0.0])
    assert in_loss.tolist() == [True, True, True, False]
    metrics = session.step(Batch(samples), (), lambda done, total: None)
    assert metrics["reward_mean"] == pytest.approx(0.5)


def test_logprobs_that_no_sampling_gives_are_refused(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batch = make_batch()
    zero = Batch(tuple(replace(sample, logprobs=0 * sample.logprobs) for sample in batch))
    with pytest.raises(InvalidArgument, match=r"batch\.logprobs.*importance_cap"):
        train(Session(spec_of(tiny_model), tmp_path), [zero])
    train(Session(spec_of(tiny_model, importance_cap=-1.0), tmp_path), [zero])


def test_staleness_is_counted_from_the_newest_version_known(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    def sampled_under(*versions: int) -> Batch:
        samples = [
            replace(sample, spans=(replace(sample.spans[0], version=version),))
            for sample, version in zip(make_batch(groups=1, size=2), versions, strict=True)
        ]
        return Batch(tuple(samples))

    session = Session(spec_of(tiny_model), tmp_path)
    first = session.step(sampled_under(10_000, 10_000), (), lambda done, total: None)
    assert (first["staleness"], first["staleness_max"]) == (0.0, 0.0)
    session.save(tmp_path / "checkpoints", 10_002, 3)
    later = session.step(sampled_under(10_001, 10_000), (), lambda done, total: None)
    assert later["staleness_max"] == 2.0


def test_flat_groups_leave_the_weights_alone(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batch = make_batch()
    flat = Batch(tuple(replace(sample, reward=1.0) for sample in batch))
    session = Session(spec_of(tiny_model), tmp_path)
    metrics = session.step(flat, ("grp_x",), lambda done, total: None)
    assert (metrics["skipped"], metrics["updates"], metrics["flat_group_fraction"]) == (
        1.0,
        0.0,
        1.0,
    )
    assert session.step_done == 1


def test_several_updates_per_step_measure_ratios_from_its_start(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    def step(updates: int, rate: float) -> dict[str, float]:
        spec = spec_of(tiny_model, updates_per_step=updates, warmup_steps=0, learning_rate=rate)
        session = Session(spec, tmp_path)
        return session.step(make_batch(groups=4), (), lambda done, total: None)

    one, two, wild = step(1, 1e-3), step(2, 1e-3), step(4, 0.3)
    assert (one["updates"], one["ratio"], one["clip_fraction"]) == (1, 1.0, 0.0)
    assert two["updates"] == 2
    assert abs(two["ratio"] - 1.0) > 1e-4
    assert wild["updates"] == 4
    assert wild["clip_fraction"] > 0


def test_a_kl_term_starts_at_zero_and_grows(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    session = Session(spec_of(tiny_model, kl_coefficient=0.1, warmup_steps=0), tmp_path)
    first = session.step(make_batch(), (), lambda done, total: None)
    second = session.step(make_batch(), (), lambda done, total: None)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl"] > 0


def test_a_batch_of_another_kind_or_vocabulary_is_refused(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    session = Session(spec_of(tiny_model), tmp_path)
    with pytest.raises(InvalidArgument, match=r"batch\.kind"):
        train(session, [make_batch(kind="sft")])
    batch = make_batch()
    ids = batch.samples[0].token_ids.copy()
    ids[-1] = 97
    bad = Batch((replace(batch.samples[0], token_ids=ids), *batch.samples[1:]))
    with pytest.raises(InvalidArgument, match=r"samples\[0\]\.token_ids.*\[0, 97\)"):
        train(session, [bad])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, raised inside DeepSpeed
def test_damage_is_found_before_it_is_believed(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    session = Session(spec_of(tiny_model), tmp_path)
    saved = saved_after(session, tmp_path / "checkpoints", [make_batch()])
    for name in ("model.safetensors", "trainer.state"):
        whole = (saved.path / name).read_bytes()
        (saved.path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataLoss, match=name):
            Session(spec_of(tiny_model), tmp_path, resume=saved.path)
        (saved.path / name).write_bytes(whole)
    with pytest.raises(FailedPrecondition, match="deepspeed-zero3"):
        Session(spec_of(tiny_model, "deepspeed", zero_stage=3), tmp_path, resume=saved.path)
    (saved.path / "manifest.json").write_text("{")
    with pytest.raises(DataLoss, match=r"manifest\.json"):
        Session(spec_of(tiny_model), tmp_path, resume=saved.path)
    with pytest.raises(NotFound):
        Session(spec_of(tiny_model), tmp_path, resume=tmp_path / "nowhere")


def test_a_server_finds_weights_alone_and_older_checkpoints_resume(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    session = Session(spec_of(tiny_model), tmp_path)
    saved = saved_after(session, tmp_path / "checkpoints", [make_batch()])
    weights = [*saved.path.glob("*.safetensors"), *saved.path.glob("*.bin")]
    assert [path.name for path in weights] == ["model.safetensors"]
    expected = train(session, [make_batch(seed=1), make_batch(seed=2)])
    # As releases before wrote it.
    (saved.path / "trainer.state").rename(saved.path / "trainer.safetensors")
    manifest = saved.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("trainer.state", "trainer.safetensors"))
    resumed = Session(spec_of(tiny_model), tmp_path, resume=saved.path)
    assert train(resumed, [make_batch(seed=1), make_batch(seed=2)]) == expected


def test_retention_keeps_the_newest(tiny_model: Path, make_batch: Make, tmp_path: Path) -> None:
    session, root = Session(spec_of(tiny_model), tmp_path), tmp_path / "checkpoints"
    (root / ".partial-00000001-1").mkdir(parents=True)
    for seed in range(3):
        train(session, [make_batch(seed=seed)])
        session.save(root, seed, keep=2)
    session.save(root, 9, keep=2)
    assert [saved.path.name for saved in ckpt.checkpoints(root)] == [
        "step-00000003",
        "step-00000003.2",
    ]
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000003.2"]
    for version in range(10, 14):
        saved = session.save(root, version, keep=2)
        assert saved is not None
        newest = ckpt.checkpoints(root)[-1]
        assert (newest.path, newest.manifest.policy_version) == (saved.path, version)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and the reserve."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8600k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(
    tiny_model: Path, make_batch: Make, tmp_path: Path, small_disk: Path
) -> None:
    session = Session(spec_of(tiny_model), tmp_path)
    train(session, [make_batch()])
    first = session.save(small_disk, 1, keep=3)
    assert first is not None
    train(session, [make_batch()])
    with pytest.raises(DiskFull, match="previous checkpoint is intact"):
        session.save(small_disk, 2, keep=3)
    [left] = ckpt.checkpoints(small_disk)
    ckpt.verify(left.path, left.manifest)
    assert left.manifest.step == 1
    assert not list(small_disk.glob(".partial-*"))


def test_space_that_vanishes_during_the_write_is_found_too(small_disk: Path) -> None:
    with pytest.raises(DiskFull), CheckpointWriter(small_disk, 1) as writer:
        writer.add_directory("engine", lambda path: _fill(path))
    assert not list(small_disk.iterdir())


def _fill(path: Path) -> None:
    path.mkdir()
    (path / "big").write_bytes(bytes(10 << 20))
