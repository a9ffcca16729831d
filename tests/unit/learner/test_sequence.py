"""Ranks that divide each sequence do what one rank does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner_svc import checkpoint as ckpt
from learner_svc.algo.batch import pack_samples
from learner_svc.algo.choices import LossKind
from learner_svc.checkpoint_writer import Tensors
from learner_svc.model import check_divisible, load_model
from learner_svc.sequence import Shard, owned
from regreen.batch import Batch
from regreen.rpc.errors import InvalidArgument
from tests.fixtures.ranks import told_by_ranks
from tests.fixtures.sequence_ranks import Case, carried_out

Make = Callable[..., Batch]
LOSSES: dict[str, Case] = {
    kind.value: {"loss": kind.value, "updates_per_step": 2, "zero_stage": 2 * (n % 2)}
    for n, kind in enumerate(LossKind)
}
SETTINGS: dict[str, Case] = {
    "sft": {"kind": "sft", "zero_stage": 2},
    "stage 0": {"zero_stage": 0},
    "stage 1": {"zero_stage": 1},
    "stage 3": {"zero_stage": 3},
    "each on its own": {"no_prefix_sharing": True},
    "one long pack": {"micro_batch_tokens": 10_000},
    "recomputed": {"gradient_checkpointing": True, "zero_stage": 2},
    "adapters": {"lora_rank": 2, "kl_coefficient": 0.1},
    "top layer": {"trainable_layers": 1, "zero_stage": 2},
    "kl in the loss": {"kl_coefficient": 0.1, "kl_correction": True},
    "kl in the reward": {"kl_coefficient": 0.1, "kl_place": "reward"},
    "sequence mask": {"importance_correction": "sequence_mask", "importance_cap": 1000.0},
    "token mask": {"importance_correction": "token_mask", "importance_cap": 1.5},
    "sequence weight": {"importance_correction": "sequence_truncate", "loss": "gspo"},
    "entropies": {"top_entropy_share": 0.3},
    "off policy": {"off_policy_threshold": 0.1},
    "stage 3 in parts": {"zero_stage": 3, "parts": True},
    "stage 3 in parts, undivided": {"zero_stage": 3, "sequence_parallel": 1, "parts": True},
}
OF_TIME = ("seconds", "per_second", "memory")


@given(st.integers(1, 9), st.integers(0, 2**31))
def test_shards_are_the_pack_cut_and_score_each_row_once(ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, 90, int(rng.integers(1, 30)))
    tails = [rng.integers(3, 90, int(rng.integers(1, 20))) for _ in range(3)]
    ids = [np.concatenate([prompt, tail]).astype(np.int32) for tail in tails]
    masks = [(np.arange(i.size) >= prompt.size).astype(np.uint8) for i in ids]
    [pack] = pack_samples(ids, masks, max_tokens=1000)
    shards = [Shard.of(pack, rank, ranks) for rank in range(ranks)]
    [size] = {shard.token_ids.numel() for shard in shards}
    assert (size - 1) * ranks < pack.tokens <= size * ranks
    for name in ("token_ids", "position_ids"):
        joined = torch.cat([getattr(shard, name) for shard in shards])
        assert torch.equal(joined[: pack.tokens], getattr(pack, name))
        assert not joined[pack.tokens :].any()
    places = owned(pack, ranks)
    assert torch.equal(torch.cat(places).sort().values, torch.arange(pack.rows.numel()))
    for rank, (shard, place) in enumerate(zip(shards, places, strict=True)):
        assert torch.equal(shard.rows + rank * size, pack.rows[place])
        assert torch.equal(shard.targets, pack.targets[place])
        assert not shard.rows.numel() or 0 <= shard.rows.min() <= shard.rows.max() < size


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "plain causal"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "depend on the length"),
    ],
)
def test_models_whose_layers_need_all_of_a_pack_are_refused(
    tiny_model: Path, changes: dict[str, Any], said: str
) -> None:
    model = load_model(tiny_model)
    check_divisible(model)
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(InvalidArgument, match=said):
        check_divisible(model)


def plan_of(model: Path, home: Path, make_batch: Make) -> dict[str, Any]:
    """Two batches for each kind of run."""
    files: dict[str, list[str]] = {"grpo": [], "sft": []}
    for kind, paths in files.items():
        for seed in range(2):
            path = home / f"{kind}-{seed}"
            path.write_bytes(make_batch(seed=seed, groups=3, kind=kind).to_bytes())
            paths.append(str(path))
    return {"model": str(model), "home": str(home), "batches": files}


def weights_of(home: Path, engine: str, name: str) -> tuple[Path, Tensors]:
    [saved] = ckpt.checkpoints(home / engine / name)
    ckpt.verify(saved.path, saved.manifest)
    return saved.path, Tensors(saved.path / ckpt.WEIGHTS)


def check(plan: Mapping[str, Any], ranks: int, cases: Mapping[str, Case]) -> None:
    """So many ranks, that divide sequences as each case says, against one rank that has them."""
    home = Path(plan["home"])
    divided = {name: {"sequence_parallel": 2} | case for name, case in cases.items()}
    found = told_by_ranks("tests.fixtures.sequence_ranks", ranks, {**plan, "cases": divided})
    single = {
        name: {**case, "zero_stage": -1, "sequence_parallel": 1} for name, case in cases.items()
    }
    expected = carried_out(plan, "plain", single)
    for name, steps in expected.items():
        for mine, theirs in zip(found[name], steps, strict=True):
            assert mine.keys() == theirs.keys(), name
            for metric in mine.keys() - {m for m in mine if any(w in m for w in OF_TIME)}:
                there = pytest.approx(theirs[metric], rel=2e-4, abs=2e-6)
                assert mine[metric] == there, (name, metric)
            assert mine["grad_norm"] > 0, name
        _, weights = weights_of(home, "deepspeed", name)
        _, wanted = weights_of(home, "plain", name)
        assert set(weights) == set(wanted)
        for tensor in wanted:
            torch.testing.assert_close(
                weights[tensor],
                wanted[tensor],
                rtol=1e-3,
                atol=2e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cases", [LOSSES, SETTINGS], ids=["losses", "settings"])
def test_two_ranks_do_as_one(
    tiny_model: Path, make_batch: Make, tmp_path: Path, cases: Mapping[str, Case]
) -> None:
    check(plan_of(tiny_model, tmp_path, make_batch), 2, cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_are_two_times_two_or_one_times_four(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    """With four to a sequence there are fewer key heads than ranks."""
    two = {f"two times two, stage {n}": {"zero_stage": n, "loss": "gspo"} for n in range(3)}
    four = {"one times four": {"zero_stage": 2, "sequence_parallel": 4, "updates_per_step": 2}}
    check(plan_of(tiny_model, tmp_path, make_batch), 4, two | four)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_numbers_of_ranks_go_on_from_a_checkpoint(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    plan = plan_of(tiny_model, tmp_path, make_batch)
    carried_out(plan, "plain", {"begun": {}})
    begun, _ = weights_of(tmp_path, "plain", "begun")
    cases = {
        "from one": {"resume": str(begun), "zero_stage": 2},
        "from two": {"resume": str(tmp_path / "deepspeed/from one/step-00000004")},
    }
    check(plan, 2, cases)
    divided, _ = weights_of(tmp_path, "deepspeed", "from two")
    assert {path.name for path in divided.iterdir()} == {path.name for path in begun.iterdir()}
