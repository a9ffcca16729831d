"""The model folder and the file formats behind it."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from policy_svc.engines.llama_config import LlamaConfig
from policy_svc.engines.stepper import WeightsError
from policy_svc.engines.weights import INDEX, SINGLE, Checkpoint, identity_of
from regreen import gguf_file, model_store
from regreen.rpc.errors import DataLoss
from tests.fixtures.policy.model import default_model


@pytest.mark.slow
def test_two_processes_convert_once(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "regreen.model_store", "--home", str(tmp_path)]
    both = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    first, second = (json.loads(out) for out, _ in outputs)
    assert first == second
    assert sum("converting" in err for _, err in outputs) == 1
    folder = Path(first["path"])
    assert not [p for p in folder.parent.iterdir() if "build" in p.name]
    assert model_store.verify(folder).digest == first["digest"]
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataLoss, match=r"tokenizer\.json"):
        model_store.verify(folder)
    healed = model_store.ensure_default_model(tmp_path)
    assert model_store.verify(healed.path).digest == first["digest"]


def test_half_a_folder_is_rebuilt_not_served(tmp_path: Path) -> None:
    whole = default_model()
    target = tmp_path / "models" / model_store.DEFAULT_MODEL
    shutil.copytree(whole, target, copy_function=os.link)
    (target / "model.safetensors").unlink()
    (target / "model.safetensors").write_bytes(b"cut")
    found = model_store.ensure_default_model(tmp_path)
    size = (found.path / "model.safetensors").stat().st_size
    assert size == (whole / "model.safetensors").stat().st_size


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + b"\xff" * 60, b"nothing of the kind"])
def test_damaged_gguf_is_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(gguf_file.GgufError):
        gguf_file.read(tmp_path / "m.gguf")


def test_rotary_rows_are_put_in_halves() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    assert gguf_file.to_half_split(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_bf16_and_shards_are_read(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 0.15625], np.float32)
    raw = (values.view("<u4") >> 16).astype("<u2").tobytes()
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "one.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw)
    save_file({"b": values}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    assert np.array_equal(checkpoint.tensor("a"), values)
    assert np.array_equal(checkpoint.tensor("b"), values)
    with pytest.raises(WeightsError, match="no tensor c"):
        checkpoint.tensor("c")


@pytest.mark.parametrize("form", ["F16", "F32", "F64", "BF16"])
def test_values_of_any_form_come_as_float32(tmp_path: Path, form: str) -> None:
    values = np.linspace(-2, 2, (3 << 20) + 5, dtype=np.float32).astype(np.float16)
    held: object = values.astype({"F16": np.float16, "F64": np.float64}.get(form, np.float32))
    expected = np.asarray(held, np.float32)
    if form == "BF16":
        held = expected.view("<u4") >> 16
        expected = (held << 16).view("<f4")
        held = held.astype("<u2")
    raw = np.asarray(held).tobytes()
    head = {"a": {"dtype": form, "shape": [values.size], "data_offsets": [0, len(raw)]}}
    header = json.dumps(head).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + raw)
    parts = [part.copy() for part in Checkpoint(tmp_path).float32("a", values.shape)]
    assert len(parts) > 1
    assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("value", [1e300, float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    save_file({"a": np.array([1.0, value, 2.0])}, tmp_path / SINGLE)
    with pytest.raises(WeightsError, match="a holds a value"):
        list(Checkpoint(tmp_path).float32("a", (3,)))


def test_a_sum_that_overflows_is_not_taken_for_infinity(tmp_path: Path) -> None:
    save_file({"a": np.full(4, 3e38, np.float32)}, tmp_path / SINGLE)
    assert next(Checkpoint(tmp_path).float32("a", (4,))).tolist() == [np.float32(3e38)] * 4
    with pytest.raises(WeightsError, match=r"shape \(4,\), not \(2, 2\)"):
        list(Checkpoint(tmp_path).float32("a", (2, 2)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"rope_scaling": {"factor": 2.0}}, "scaled rotary"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 18}, "9 heads of 64 cannot share 18"),
        ({"num_key_value_heads": 0}, "has 0 kv_heads"),
        ({"num_key_value_heads": None}, "has None kv_heads"),
        ({"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError"),
        ({"head_dim": 63}, "9 heads of 63"),
        ({"vocab_size": 1 << 40}, "vocabulary"),
        ({"num_hidden_layers": "many"}, "has 'many' layers"),
        ({"rms_norm_eps": []}, "describes no model"),
    ],
)
def test_what_local_engines_would_get_wrong_is_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    raw = json.loads((default_model() / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(WeightsError, match=said):
        LlamaConfig.read(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        '""',
        '[["a", 1]]',
        '{"a": 5}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1e308, 1e308], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}',
        '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_of_other_things_is_a_typed_error(tmp_path: Path, entry: str) -> None:
    header = entry.encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(WeightsError):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", ['{"weight_map": []}', "[]", '{"weight_map": {"a": 5}}'])
def test_an_index_of_other_things_is_a_typed_error(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(WeightsError):
        Checkpoint(tmp_path)


def test_files_are_told_apart_after_any_change(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(b"one")
    seen = [identity_of(tmp_path)]
    assert identity_of(file) == seen[0]
    file.with_suffix(".new").write_bytes(b"one")
    file.with_suffix(".new").replace(file)
    seen.append(identity_of(tmp_path))
    os.utime(file, ns=(0, 1))
    seen.append(identity_of(tmp_path))
    assert len(set(seen)) == 3


@pytest.mark.parametrize("content", [b"", b"\0" * 4, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_damaged_weights_are_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError):
        Checkpoint(tmp_path)
