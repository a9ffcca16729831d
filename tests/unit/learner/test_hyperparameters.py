"""The learning maths as hyperparameters: what is refused, what is in force, what a step does."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner_svc.algo.choices import LossKind, LossSpec
from learner_svc.servicer import hyperparameters_message, hyperparameters_of
from learner_svc.session import Session
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.batch import Batch
from regreen.learner import v1 as pb
from regreen.rpc.errors import InvalidArgument

Make = Callable[..., Batch]


def step(model: Path, batches: list[Batch], home: Path, **changes: object) -> dict[str, float]:
    """Metrics of the last of several steps."""
    fields: dict[str, object] = {"learning_rate": 1e-2, "micro_batch_tokens": 150}
    hyperparameters = Hyperparameters(**fields | changes)  # type: ignore[arg-type]
    session = Session(RunSpec("run_1", RunKind.GRPO, str(model), "plain", hyperparameters), home)
    metrics: dict[str, float] = {}
    for batch in batches:
        metrics = session.step(batch, (), lambda done, total: None)
    session.close()
    return metrics


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("loss", {"loss": "ppo"}),
        ("baseline", {"baseline": "median"}),
        ("advantage_scale", {"advantage_scale": "iqr"}),
        ("importance_correction", {"importance_correction": "mask"}),
        ("importance_correction", {"importance_correction": "token_mask", "importance_cap": -1.0}),
        ("importance_floor", {"importance_floor": 3.0}),
        ("kl_estimator", {"kl_estimator": "k4"}),
        ("kl_estimator", {"kl_estimator": "k1", "kl_coefficient": 0.1}),
        ("kl_place", {"kl_place": "nowhere"}),
        ("kl_correction", {"kl_correction": True, "kl_place": "reward"}),
        ("ratio_delta", {"ratio_delta": 9.0, "loss": "cispo"}),
        ("ratio_delta", {"ratio_delta": 9.0, "loss": "sapo"}),
        ("top_entropy_share", {"top_entropy_share": 1.5}),
        ("lora_rank", {"lora_rank": -1}),
        ("lora_alpha", {"lora_alpha": 8.0}),
        ("pass_at_k", {"pass_at_k": 0}),
        ("turn_score_coefficient", {"turn_score_coefficient": -1.0}),
        ("turn_score_coefficient", {"turn_score_coefficient": 0.5, "loss": "gspo"}),
        ("turn_score_coefficient", {"turn_score_coefficient": 0.5, "loss": "rloo"}),
        ("sapo_temperature_bad", {"sapo_temperature_bad": 0.0}),
    ],
)
def test_what_would_not_do_what_it_says_is_refused(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match=rf"hyperparameters\.{name}"):
        replace(Hyperparameters(), **changes).check(RunKind.GRPO)  # type: ignore[arg-type]


def test_a_run_that_chooses_nothing_has_the_defaults_of_the_loss() -> None:
    assert Hyperparameters().loss_spec() == LossSpec()


def test_the_defaults_of_a_loss_are_told_and_give_way() -> None:
    def in_force(**given: object) -> pb.Hyperparameters:
        message = pb.Hyperparameters(**given)  # type: ignore[arg-type]
        return hyperparameters_message(hyperparameters_of(message, RunKind.GRPO))

    assert (in_force(loss="gspo").clip_low, in_force(loss="gspo").clip_high) == (3e-4, 4e-4)
    assert in_force(loss="cispo").clip_high == 4.0
    assert in_force(loss="cispo", clip_high=1.0).clip_high == 1.0
    assert in_force(loss="reinforce++").baseline == "batch_mean"
    default = in_force()
    assert (default.loss, default.clip_low, default.clip_high) == ("dapo", 0.2, 0.28)
    assert (default.baseline, default.advantage_scale) == ("leave_one_out", "none")
    assert (default.importance_correction, default.importance_cap) == ("token_truncate", 2.0)


@pytest.mark.parametrize("loss", [kind for kind in LossKind if kind is not LossKind.BNPO])
def test_every_loss_is_the_same_however_it_is_packed(
    tiny_model: Path, make_batch: Make, tmp_path: Path, loss: str
) -> None:
    """Ratios of sequences too: a sequence's tokens are in one pack."""
    batch = [make_batch(groups=3)]
    changes = {"loss": loss, "updates_per_step": 2}
    packed = step(tiny_model, batch, tmp_path, **changes)
    alone = step(
        tiny_model, batch, tmp_path, **changes, no_prefix_sharing=True, micro_batch_tokens=100
    )
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-3, abs=1e-5)
    assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def test_rejected_tokens_are_counted_and_leave_the_step(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batch = [make_batch()]
    some = step(tiny_model, batch, tmp_path, importance_correction="token_mask")
    assert 0 < some["importance_rejected_fraction"] < 1
    assert some["ratio"] == 1.0
    none = step(
        tiny_model,
        batch,
        tmp_path,
        importance_correction="sequence_mask",
        importance_cap=1000.0,
        importance_floor=999.0,
    )
    assert none["importance_rejected_fraction"] == 1.0
    assert none["grad_norm"] == 0.0


def test_a_kl_in_the_reward_moves_advantages_and_not_the_loss(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(), make_batch()]
    plain = step(tiny_model, batches[:1], tmp_path)
    first = step(tiny_model, batches[:1], tmp_path, kl_coefficient=0.5, kl_place="reward")
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    second = step(tiny_model, batches, tmp_path, kl_coefficient=0.5, kl_place="reward")
    assert second["kl"] > 0
    assert second["advantage_abs_mean"] != pytest.approx(plain["advantage_abs_mean"], rel=1e-3)


def test_a_kl_in_the_reward_needs_rewards(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    given = Batch(tuple(replace(sample, advantage=1.0) for sample in make_batch()))
    with pytest.raises(InvalidArgument, match=r"batch\.advantage"):
        step(tiny_model, [given], tmp_path, kl_coefficient=0.5, kl_place="reward")


def test_tokens_of_high_entropy_are_selected(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    metrics = step(tiny_model, [make_batch()], tmp_path, top_entropy_share=0.2)
    assert metrics["selected_fraction"] == pytest.approx(0.2, abs=0.02)
    assert 0 < metrics["token_entropy"] < 4.6


def scored(batch: Batch, *scores: float, **changes: object) -> Batch:
    """The batch with one own score for all tokens of each sample in turn."""
    return Batch(
        tuple(
            replace(  # type: ignore[arg-type]
                sample,
                turn_scores=(score * sample.loss_mask).astype(np.float32),
                **changes,
            )
            for sample, score in zip(batch, itertools.cycle(scores))
        )
    )


@pytest.mark.parametrize("loss", ["dapo", "grpo", "gspo_token", "cispo", "sapo"])
def test_scores_of_turns_are_added_to_advantages_token_by_token(
    tiny_model: Path, make_batch: Make, tmp_path: Path, loss: str
) -> None:
    equal = scored(make_batch(), 1.0, -0.5, 0.25, reward=1.0)
    given = Batch(
        tuple(
            replace(sample, advantage=0.4 * score)
            for sample, score in zip(make_batch(), itertools.cycle((1.0, -0.5, 0.25)))
        )
    )
    by_turn = step(tiny_model, [equal], tmp_path, loss=loss, turn_score_coefficient=0.4)
    by_hand = step(tiny_model, [given], tmp_path, loss=loss)
    for name in ("loss", "grad_norm", "tokens_computed"):
        assert by_turn[name] == pytest.approx(by_hand[name], rel=1e-4), name
    assert by_turn["turn_scored_fraction"] == 1.0
    assert by_turn["flat_group_fraction"] == 0.0


def test_scores_of_turns_count_where_the_run_asks_for_them(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    flat = scored(make_batch(), 1.0, 0.0, 0.0, reward=1.0)
    assert step(tiny_model, [flat], tmp_path)["skipped"] == 1.0
    one = step(tiny_model, [flat], tmp_path, turn_score_coefficient=1.0)
    assert one["skipped"] == 0.0
    assert one["dropped_samples"] == 4.0, "of equal rewards, only those with a score are learned"
    late = scored(make_batch(), 1.0, reward=1.0, truncated=True)
    silent = step(tiny_model, [late], tmp_path, turn_score_coefficient=1.0)
    assert silent["skipped"] == 1.0, "a rollout that is out of the loss stays out"
