"""The Batch wire format: round trip, determinism, an error that names the field of each damage."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from regreen.batch import Batch, BatchError, Sample, VersionSpan, digest_of


def sample(**changes: object) -> Sample:
    fields: dict[str, object] = {
        "token_ids": [5, 6, 7, 8, 9],
        "loss_mask": [0, 0, 1, 0, 1],
        "logprobs": [0.0, 0.0, -0.5, 0.0, -1.5],
        "group_id": "grp_a",
        "reward": 1.0,
        "spans": (VersionSpan(2, 3, 4), VersionSpan(4, 5, 5)),
        "sample_id": "trj_1",
    }
    fields.update(changes)
    return Sample.make(**fields)  # type: ignore[arg-type]


def batch(**changes: object) -> Batch:
    fields: dict[str, object] = {
        "samples": (
            sample(),
            sample(token_ids=[5, 6, 1, 2, 3], reward=0.0, sample_id="trj_2"),
        ),
        "metrics": {"hack_rate": 0.25},
    }
    fields.update(changes)
    return Batch(**fields)  # type: ignore[arg-type]


def test_round_trip_keeps_every_field() -> None:
    first = batch()
    second = Batch.from_bytes(first.to_bytes(), vocab_size=100)
    assert second.digest == first.digest == digest_of(first.to_bytes())
    assert second.group_ids == ("grp_a",)
    assert second.metrics == {"hack_rate": 0.25}
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left.token_ids, right.token_ids)
        np.testing.assert_array_equal(left.loss_mask, right.loss_mask)
        np.testing.assert_array_equal(left.logprobs, right.logprobs)
        assert left.spans == right.spans
        assert (left.reward, left.advantage, left.prompt_len, left.sample_id) == (
            right.reward,
            right.advantage,
            right.prompt_len,
            right.sample_id,
        )


def test_prompt_len_defaults_to_the_untrained_prefix() -> None:
    assert sample().prompt_len == 2


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_valid_batch_round_trips(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = []
    for index, length in enumerate(lengths):
        mask = rng.integers(0, 2, length)
        mask[0] = 0
        samples.append(
            Sample.make(
                rng.integers(0, 1000, length),
                mask,
                logprobs=-rng.random(length) * mask,
                group_id=f"g{index}",
                advantage=float(rng.normal()),
            )
        )
    blob = Batch(tuple(samples)).to_bytes()
    assert Batch.from_bytes(blob, vocab_size=1000).to_bytes() == blob


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("loss_mask", sample(loss_mask=[0, 0, 1, 0])),
        ("loss_mask", sample(loss_mask=[0, 0, 2, 0, 1])),
        ("loss_mask", sample(loss_mask=[1, 0, 1, 0, 1], logprobs=None)),
        ("logprobs", sample(logprobs=[0, 0, float("nan"), 0, 0])),
        ("logprobs", sample(logprobs=[0, 0, 0.5, 0, 0])),
        ("logprobs", sample(logprobs=[0, -1, -0.5, 0, 0])),
        ("token_ids", sample(token_ids=[5, 6, -1, 8, 9])),
        ("token_ids", sample(token_ids=[3], loss_mask=[0], logprobs=[0.0], spans=())),
        ("prompt_len", sample(prompt_len=4)),
        ("prompt_len", sample(prompt_len=0)),
        ("prompt_len", sample(prompt_len=9)),
        ("reward", sample(reward=float("inf"))),
        ("weight", sample(weight=-1.0)),
        ("advantage", sample(advantage=float("nan"))),
        ("spans", sample(spans=(VersionSpan(3, 2, 0),))),
        ("spans", sample(spans=(VersionSpan(2, 4, 0), VersionSpan(3, 5, 0)))),
        ("spans", sample(spans=(VersionSpan(2, 9, 0),))),
        ("turn_scores", sample(turn_scores=[0, 0, 1.0])),
        ("turn_scores", sample(turn_scores=[0, 0, float("inf"), 0, 0])),
        ("turn_scores", sample(turn_scores=[0, 1.0, 1.0, 0, 0])),
    ],
)
def test_a_bad_sample_is_refused_by_field(field: str, bad: Sample) -> None:
    with pytest.raises(BatchError) as caught:
        Batch((bad,)).to_bytes()
    assert caught.value.field == f"samples[0].{field}"


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(BatchError, match=r"samples\[0\].token_ids.*\[0, 9\)"):
        Batch.from_bytes(batch().to_bytes(), vocab_size=9)


def test_groups_must_share_their_prompt() -> None:
    with pytest.raises(BatchError, match=r"samples\[1\].prompt_len"):
        batch(samples=(sample(), sample(token_ids=[5, 7, 1, 2, 3]))).check()


def test_advantages_are_all_or_none() -> None:
    with pytest.raises(BatchError, match="advantages"):
        batch(samples=(sample(advantage=1.0), sample())).check()


@pytest.mark.parametrize("blob", [b"", b"\x00" * 4, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"{}"])
def test_garbage_is_refused(blob: bytes) -> None:
    with pytest.raises(BatchError):
        Batch.from_bytes(blob)


def test_scores_of_turns_come_back_and_an_earlier_release_refuses_them() -> None:
    scored = sample(turn_scores=[0, 0, 0.5, 0, -1.0])
    blob = batch(samples=(scored, sample(sample_id="trj_2"))).to_bytes()
    first, second = Batch.from_bytes(blob)
    assert first.turn_scores is not None
    assert first.turn_scores.tolist() == [0, 0, 0.5, 0, -1.0]
    assert second.turn_scores is not None
    assert not second.turn_scores.any()
    assert b'\\"format_version\\": 2' in blob
    assert b'\\"format_version\\": 1' in batch().to_bytes()
    assert all(one.turn_scores is None for one in Batch.from_bytes(batch().to_bytes()))


def test_another_format_version_is_refused() -> None:
    blob = save(load(batch().to_bytes()), {"regreen.batch": json.dumps({"format_version": 9})})
    with pytest.raises(BatchError, match="format_version"):
        Batch.from_bytes(blob)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("token_ids", None),
        ("token_ids", np.zeros(10, np.int64)),
        ("rewards", np.zeros(3, np.float32)),
        ("offsets", np.array([0, 11, 10], np.int64)),
        ("offsets", np.array([0, 5, 9], np.int64)),
        ("groups", np.array([0, 7], np.int32)),
        ("truncated", np.array([0, 3], np.uint8)),
        ("span_bounds", np.zeros((4, 3), np.int32)),
    ],
)
def test_a_damaged_array_is_refused(name: str, array: np.ndarray | None) -> None:
    blob = batch().to_bytes()
    size = int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8 : 8 + size])["__metadata__"]
    tensors = load(blob)
    if array is None:
        del tensors[name]
    else:
        tensors[name] = array
    with pytest.raises(BatchError):
        Batch.from_bytes(save(tensors, metadata))


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_flipped_byte_never_escapes_as_another_error(position: int, value: int) -> None:
    blob = bytearray(batch().to_bytes())
    blob[position % len(blob)] = value
    try:
        Batch.from_bytes(bytes(blob), vocab_size=2**31)
    except BatchError:
        return


def test_replace_keeps_a_sample_checkable() -> None:
    replace(sample(), weight=0.0).check()


def test_parts_of_a_trajectory_share_its_reward() -> None:
    def part(name: str, reward: float, **changes: object) -> Sample:
        return Sample.make(
            [1, 2, 3],
            [0, 1, 1],
            logprobs=[0, -1, -1],
            group_id="g",
            reward=reward,
            sample_id=name,
            **changes,  # type: ignore[arg-type]
        )

    batch = Batch((part("a", 1.0), part("b", 0.0), part("a", 1.0), part("", 3.0), part("", 4.0)))
    batch.check()
    assert batch.trajectories == (0, 1, 0, 2, 3)
    assert [sample.reward for sample in batch.one_per_trajectory] == [1.0, 0.0, 3.0, 4.0]
    with pytest.raises(BatchError, match=r"samples\[1\]\.reward.*samples\[0\].*'a'"):
        Batch((part("a", 1.0), part("a", 0.5))).check()
    with pytest.raises(BatchError, match=r"samples\[1\]\.truncated"):
        Batch((part("a", 1.0), part("a", 1.0, truncated=True))).check()
