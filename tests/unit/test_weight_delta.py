"""Deltas of weights: exactly reversible, small where little changed, never other weights."""

import hashlib
import json
import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from regreen import weight_delta
from regreen.weight_delta import (
    Delta,
    DeltaDamaged,
    DeltaError,
    DeltaMismatch,
    FileDigest,
    Made,
    encode,
    form_of,
)

ITEM_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
SPECIAL = {
    "BF16": [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x0001],
    "F32": [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 1],
}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def file_of(tensors: Tensors, notes: dict[str, str] | None = None) -> bytes:
    """A safetensors file, written here so that any bits can be in it."""
    header: dict[str, object] = {"__metadata__": notes} if notes else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def digest(data: bytes) -> FileDigest:
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))


def delta_of(base: bytes, result: bytes) -> tuple[bytes, Made]:
    parts: list[bytes] = []
    made = encode(base, result, (digest(base), digest(result)), parts.append)
    return b"".join(parts), made


def applied(base: bytes, delta: bytes) -> bytes:
    parts: list[bytes] = []
    Delta(delta).apply(base, parts.append)
    return b"".join(parts)


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    found: Tensors = {}
    for name in draw(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        size = math.prod(shape) * ITEM_BYTES[dtype]
        found[name] = (dtype, shape, draw(st.binary(min_size=size, max_size=size)))
    return found


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Weights, and others of the same names, types and shapes: no, some or all elements changed."""
    before = draw(tensors())
    after: Tensors = {}
    for name, (dtype, shape, data) in before.items():
        item = ITEM_BYTES[dtype]
        fresh = draw(st.binary(min_size=len(data), max_size=len(data)))
        how = draw(st.sampled_from(["none", "some", "all"]))
        bits = np.frombuffer(data, f"<u{item}").copy()
        if how == "some" and bits.size:
            at = draw(st.lists(st.integers(0, bits.size - 1), max_size=5))
            bits[at] = np.frombuffer(fresh, bits.dtype)[at]
            if dtype in SPECIAL:
                bits[at] = draw(st.sampled_from(SPECIAL[dtype]))
        after[name] = (dtype, shape, fresh if how == "all" else bits.tobytes())
    order = draw(st.permutations(sorted(after)))
    notes = draw(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    return file_of(before), file_of({name: after[name] for name in order}, notes)


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_a_delta_gives_the_result_back_byte_for_byte(pair: tuple[bytes, bytes]) -> None:
    base, result = pair
    delta, made = delta_of(base, result)
    assert applied(base, delta) == result
    assert made.size_bytes == len(delta)
    assert (Delta(delta).base, Delta(delta).result) == (digest(base), digest(result))


@settings(max_examples=60, deadline=None)
@given(pairs(), st.data())
def test_a_changed_bit_anywhere_is_found(pair: tuple[bytes, bytes], data: st.DataObject) -> None:
    base, result = pair
    delta, _ = delta_of(base, result)
    broken = bytearray(delta)
    broken[data.draw(st.integers(0, len(delta) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DeltaDamaged):
        Delta(bytes(broken))


@settings(max_examples=100, deadline=None)
@given(pairs(), st.data())
def test_what_a_wrong_writer_made_ends_in_an_error_or_in_the_result(
    pair: tuple[bytes, bytes], data: st.DataObject
) -> None:
    """The checksum is right, what it is of is not."""
    base, result = pair
    delta, _ = delta_of(base, result)
    body = bytearray(delta[:-32])
    at = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[at:]
    else:
        body[at] ^= 1 << data.draw(st.integers(0, 7))
    forged = bytes(body) + hashlib.sha256(body).digest()
    try:
        assert applied(base, forged) == result
    except DeltaError:
        return


def bf16(values: list[float] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values).to(torch.bfloat16)


def step(seed: int = 0, share: float = 0.01) -> tuple[bytes, bytes]:
    """Weights before and after a step that moves few elements by a unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    old = bf16(torch.randn(300, 200, generator=generator) * 0.02)
    moved = torch.rand(old.shape, generator=generator) < share
    up = torch.rand(old.shape, generator=generator) < 0.5
    bits = old.view(torch.int16)
    new = torch.where(moved, bits + torch.where(up, 1, -1).short(), bits).view(torch.bfloat16)
    norm = torch.ones(200, dtype=torch.bfloat16)
    return save({"w": old, "norm": norm}), save({"w": new, "norm": norm})


def test_every_truncation_and_every_changed_byte_is_damage() -> None:
    base, result = (
        file_of({"w": ("BF16", (4,), struct.pack("<4H", *words))})
        for words in ((1, 2, 3, 4), (1, 3, 3, 0x7FC1))
    )
    delta, _ = delta_of(base, result)
    assert applied(base, delta) == result
    for length in range(len(delta)):
        with pytest.raises(DeltaDamaged):
            Delta(delta[:length])
    for at in range(len(delta)):
        with pytest.raises(DeltaDamaged):
            Delta(delta[:at] + bytes([delta[at] ^ 0x10]) + delta[at + 1 :])
    with pytest.raises(DeltaDamaged):
        Delta(delta + b"\0")


def test_a_step_of_few_elements_is_a_small_delta() -> None:
    base, result = step(share=0.01)
    delta, made = delta_of(base, result)
    assert applied(base, delta) == result
    assert made.elements == 60_200
    assert made.changed == int(
        (load(base)["w"].view(torch.int16) != load(result)["w"].view(torch.int16)).sum()
    )
    assert made.whole_tensors == 0
    assert len(delta) < 0.02 * len(result)
    nothing, made = delta_of(base, base)
    assert (made.changed, applied(base, nothing)) == (0, base)
    assert len(nothing) < 400


def test_what_changed_all_over_is_carried_whole() -> None:
    base, _ = step()
    generator = torch.Generator().manual_seed(9)
    other = bf16(torch.randn(300, 200, generator=generator))
    result = save({"w": other, "norm": torch.ones(200, dtype=torch.bfloat16)})
    delta, made = delta_of(base, result)
    assert applied(base, delta) == result
    assert made.whole_tensors == 1
    assert len(delta) < len(result)


def test_only_the_sign_of_zero_and_the_payload_of_a_nan_change() -> None:
    bits = np.array([0x80000000, 0x7FC00001, 0xFFC00002], "<u4")
    base = file_of({"w": ("F32", (3,), np.array([0, 0x7FC00000, 0xFFC00000], "<u4").tobytes())})
    result = file_of({"w": ("F32", (3,), bits.tobytes())})
    delta, made = delta_of(base, result)
    assert made.changed == 3
    assert applied(base, delta) == result


def test_tied_tensors_are_as_any() -> None:
    """A file holds them under both names."""
    base, result = step()
    old, new = (load(data)["w"] for data in (base, result))
    base, result = (save({"embed": w, "head": w.clone()}) for w in (old, new))
    delta, made = delta_of(base, result)
    assert applied(base, delta) == result
    assert made.changed % 2 == 0


def test_a_gap_of_more_than_16_bits_is_kept() -> None:
    old = np.zeros(200_000, "<u2")
    new = old.copy()
    new[[0, 70_000, 199_999]] = [1, 0xFFFF, 0x8000]
    base, result = (file_of({"w": ("BF16", (200_000,), x.tobytes())}) for x in (old, new))
    assert applied(base, delta_of(base, result)[0]) == result


@pytest.mark.parametrize(
    "other",
    [
        {"v": ("BF16", (2,), b"\0" * 4)},
        {"w": ("F16", (2,), b"\0" * 4)},
        {"w": ("BF16", (2, 1), b"\0" * 4)},
        {"w": ("BF16", (3,), b"\0" * 6)},
        {"w": ("BF16", (2,), b"\0" * 4), "v": ("BF16", (1,), b"\0" * 2)},
    ],
)
def test_other_tensors_have_no_delta(other: Tensors) -> None:
    base, result = file_of({"w": ("BF16", (2,), b"\0" * 4)}), file_of(other)
    with pytest.raises(DeltaMismatch):
        delta_of(base, result)
    with pytest.raises(DeltaMismatch):
        delta_of(result, base)
    delta, _ = delta_of(base, base)
    with pytest.raises(DeltaMismatch):
        applied(result, delta)


def test_another_base_is_found_by_what_comes_out() -> None:
    base, result = step()
    delta, _ = delta_of(base, result)
    other, _ = step(seed=1)
    with pytest.raises(DeltaMismatch, match="came out as"):
        applied(other, delta)
    flipped = bytearray(base)
    flipped[-1] ^= 1
    with pytest.raises(DeltaMismatch, match="came out as"):
        applied(bytes(flipped), delta)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:7],
        lambda data: struct.pack("<Q", 1 << 40) + data[8:],
        lambda data: data.replace(b"BF16", b"BF61"),
        lambda data: data.replace(b"[0, 4]", b"[2, 4]"),
        lambda data: data.replace(b"[0, 4]", b"[0, 9]"),
        lambda data: data.replace(b"[2]", b"{ }"),
        lambda data: data.replace(b'{"w', b'["w'),
    ],
)
def test_a_damaged_weights_file_has_no_delta(spoil: Callable[[bytes], bytes]) -> None:
    data = file_of({"w": ("BF16", (2,), b"\0" * 4)})
    broken = spoil(data)
    assert broken != data
    with pytest.raises(DeltaDamaged):
        delta_of(data, broken)
    with pytest.raises(DeltaDamaged):
        delta_of(broken, data)


def test_a_chain_is_applied_in_order_and_in_no_other() -> None:
    one, two = step(seed=3)
    moved = load(two)
    moved["w"][7] += 1
    three = save(moved)
    first, second = delta_of(one, two)[0], delta_of(two, three)[0]
    assert applied(applied(one, first), second) == three
    with pytest.raises(DeltaMismatch):
        applied(one, second)


def test_weights_are_rounded_as_torch_rounds_them() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3_000_000, generator=generator)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64)
    odd = bits.to(torch.int32).view(torch.float32)
    odd = odd[~odd.isnan()]
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4028235e38, 1e-45, 1.00390625])
    weights = {"a": values, "b": odd, "c": ends, "d": torch.arange(5), "e": torch.zeros(0)}
    rounded = b"".join(form_of(save(weights, {"note": "kept"}), {"run": "r"}, bf16=True))
    assert weight_delta.layout(rounded).size_bytes == len(rounded)
    assert b'{"note": "kept", "run": "r"}' in rounded[:2000]
    for name, value in load(rounded).items():
        whole = weights[name].dtype is torch.int64
        expected = weights[name] if whole else weights[name].to(torch.bfloat16)
        assert value.dtype == expected.dtype
        if value.numel():
            assert torch.equal(value.view(torch.int16), expected.view(torch.int16))


def test_a_nan_stays_one_with_its_sign() -> None:
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], "<u4")
    rounded = b"".join(form_of(file_of({"w": ("F32", (3,), bits.tobytes())}), {}, bf16=True))
    assert np.frombuffer(rounded[-6:], "<u2").tolist() == [0x7FC0, 0xFFC0, 0x7FC0]


def test_a_form_that_is_not_rounded_has_every_bit_and_one_more_note() -> None:
    weights = {"w": torch.randn(7, 3), "v": torch.randn(5)}
    form = b"".join(form_of(save(weights), {"run": "r"}, bf16=False))
    assert weight_delta.layout(form).size_bytes == len(form)
    assert b'{"run": "r"}' in form
    assert all(torch.equal(value, weights[name]) for name, value in load(form).items())
