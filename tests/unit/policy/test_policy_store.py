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

from policy_svc.engines.stepper import WeightsError
from policy_svc.engines.weights import Checkpoint
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


def test_gguf_written_from_a_header_reads_back(tmp_path: Path) -> None:
    model = default_model()
    table = json.loads((model / model_store.HEADER_TABLE).read_bytes())
    header = gguf_file.header_from_json((model / model_store.HEADER).read_bytes(), table)
    checkpoint = Checkpoint(model)
    path = tmp_path / "m.gguf"
    gguf_file.write_from_header(header, checkpoint.tensor, (9, 3), path)
    parsed = gguf_file.read(path)
    assert len(parsed.tensors) == 272
    for name, heads in (("blk.7.attn_q.weight", 9), ("blk.7.attn_k.weight", 3)):
        array = gguf_file.to_half_split(parsed.read_tensor(name), heads)
        assert np.array_equal(array, checkpoint.tensor(gguf_file.hf_name(name)))
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_values_beyond_f16_are_refused(tmp_path: Path, value: float) -> None:
    tensor = gguf_file.TensorInfo("output_norm.weight", (2, 2), 1, 0)
    header = gguf_file.GgufHeader(b"", (tensor,))
    weights = np.full((2, 2), value, np.float32)
    with pytest.raises(gguf_file.GgufError, match="F16"):
        gguf_file.write_from_header(header, lambda _: weights, (1, 1), tmp_path / "m")


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + b"\xff" * 60, b"nothing of the kind"])
def test_damaged_gguf_is_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(gguf_file.GgufError):
        gguf_file.read(tmp_path / "m.gguf")


def test_rotary_orders_are_inverse() -> None:
    rows = np.arange(4 * 8 * 3, dtype=np.float32).reshape(32, 3)
    there = gguf_file.to_interleaved(rows, 4)
    assert not np.array_equal(there, rows)
    assert np.array_equal(gguf_file.to_half_split(there, 4), rows)


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


@pytest.mark.parametrize("content", [b"", b"\0" * 4, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_damaged_weights_are_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError):
        Checkpoint(tmp_path)
