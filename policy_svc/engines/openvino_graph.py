"""The graph that OpenVINO compiles for a llama-architecture model, and weights laid out for it.

- It has few nodes, since most of the time until new weights serve are passes over them: shapes,
  axes and scales that layers share are one constant, and projections of one input are one product.
- It is made once, with parameters in the places of weights. What is made for each set of weights is
  one run of bytes at offsets that are always the same: all small constants, then the weights.
- Weights are float32 whatever the checkpoint has; they are in memory alone, in no file system.
- Attention and its cache are written as OpenVINO's conversion to paged attention looks for them
  (`SDPAToPagedAttention`). It takes the mask away: what a token may see is what came before it.

Source: transformers `modeling_llama.py`; OpenVINO's intermediate representation, version 11.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np
import openvino
from openvino import opset13
from openvino.op import util as op_util

from policy_svc.engines.llama_config import LlamaConfig
from policy_svc.engines.weights import Array

ov: Any = openvino
op: Any = opset13
util: Any = op_util
_ALIGNMENT = 64
_XML, _BIN = "openvino_model.xml", "openvino_model.bin"


class Tensors(Protocol):
    """What weights come from: a `Checkpoint`, as a rule."""

    def float32(self, name: str, shape: tuple[int, ...]) -> Iterator[Array]:
        """A tensor's values in order; an array lasts till the next."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of a checkpoint goes."""

    tensor: str
    shape: tuple[int, ...]
    offset: int


class LlamaGraph:
    """The graph of one configuration, for any number of checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        self._shapes = config.shapes()
        made = _Maker(config, self._shapes)
        with tempfile.TemporaryDirectory(prefix=f"regreen-graph-{os.getpid()}-") as folder:
            xml, data = Path(folder, _XML), Path(folder, _BIN)
            ov.serialize(made.model(), xml, data)
            tree, self._constants = ElementTree.parse(xml), data.read_bytes()
        self._places: list[_Place] = []
        self._size_bytes = len(self._constants)
        for layer in tree.iter("layer"):
            if sources := made.sources.get(layer.get("name", "")):
                self._lay_out(layer, sources)
        self._xml = ElementTree.tostring(tree.getroot())

    def _lay_out(self, layer: ElementTree.Element, sources: Sequence[str]) -> None:
        """Turn a parameter into a constant at the next offset."""
        start = self._size_bytes + -self._size_bytes % _ALIGNMENT
        end = start
        for tensor in sources:
            shape = self._shapes[tensor]
            self._places.append(_Place(tensor, shape, end))
            end += 4 * int(np.prod(shape))
        layer.set("type", "Const")
        data = layer.find("data")
        assert data is not None, "a layer of the format has data"
        data.set("offset", str(start))
        data.set("size", str(end - start))
        self._size_bytes = end

    @contextlib.contextmanager
    def with_weights(self, tensors: Tensors, threads: int) -> Iterator[Path]:
        """A folder as OpenVINO reads models, for as long as it is read; so many threads cast.

        Raises:
            WeightsError: a tensor is missing, has another shape or holds a value that is no number.
        """
        memory = os.memfd_create("regreen-weights", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, self._size_bytes)
            _write(memory, memoryview(self._constants), 0)
            with ThreadPoolExecutor(threads, "weights") as pool:
                list(pool.map(lambda place: _copy(tensors, place, memory), self._places))
            with tempfile.TemporaryDirectory(prefix=f"regreen-policy-{os.getpid()}-") as folder:
                Path(folder, _XML).write_bytes(self._xml)
                Path(folder, "config.json").write_text("{}")
                Path(folder, _BIN).symlink_to(f"/proc/{os.getpid()}/fd/{memory}")
                yield Path(folder)
        finally:
            os.close(memory)


def _copy(tensors: Tensors, place: _Place, memory: int) -> None:
    offset = place.offset
    for part in tensors.float32(place.tensor, place.shape):
        _write(memory, part.data, offset)
        offset += part.nbytes


def _write(memory: int, data: memoryview, offset: int) -> None:
    if os.pwrite(memory, data, offset) != data.nbytes:
        raise OSError(f"no memory for {data.nbytes} bytes of weights")


class _Maker:
    """Makes one model; nodes that layers share are made once."""

    def __init__(self, config: LlamaConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        self._config, self._shapes = config, shapes
        self._constants: dict[tuple[str, type], Any] = {}
        self._weights: dict[tuple[str, ...], Any] = {}
        self._sinks: list[Any] = []
        self.sources: dict[str, tuple[str, ...]] = {}
        """Tensors of each weight, one below the other, by the name of its node."""

    def model(self) -> Any:
        """The whole model: token ids [batch, length] to logits [batch, length, vocabulary]."""
        config = self._config
        ids, mask, positions = (
            op.parameter([-1, -1], np.int64, name=name)
            for name in ("input_ids", "attention_mask", "position_ids")
        )
        self._beams = op.parameter([-1], np.int32, name="beam_idx")
        inputs = [ids, mask, positions, self._beams]
        for one in inputs:
            one.output(0).get_tensor().set_names({one.get_friendly_name()})
        self._batch = op.gather(op.shape_of(ids), self._ints([0]), self._ints(0))
        self._empty = op.broadcast(self._float(0.0), self._shape_of_states(0))
        self._angles(positions)
        self._mask = op.unsqueeze(op.convert(mask, np.float32), self._ints([1, 2]))
        hidden = op.gather(self._weight("model.embed_tokens.weight"), ids, self._ints(0))
        for at in range(config.layers):
            hidden = self._layer(at, hidden)
        head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        logits = op.result(self._product(self._norm(hidden, "model.norm.weight"), head))
        logits.output(0).get_tensor().set_names({"logits"})
        return ov.Model([logits], self._sinks, [*inputs, *self._weights.values()], "llama")

    def _layer(self, at: int, hidden: Any) -> Any:
        config, base = self._config, f"model.layers.{at}."
        rows = self._norm(hidden, f"{base}input_layernorm.weight")
        names = [f"{base}self_attn.{part}_proj.weight" for part in "qkv"]
        packed = op.reshape(
            self._product(rows, *names),
            self._ints([0, 0, config.heads + 2 * config.kv_heads, config.head_dim]),
            special_zero=True,
        )
        by_head = op.transpose(packed, self._ints([0, 2, 1, 3]))
        turned, values = self._split(by_head, 1, config.heads + config.kv_heads, config.kv_heads)
        queries, keys = self._split(self._rotate(turned), 1, config.heads, config.kv_heads)
        mixed = op.scaled_dot_product_attention(
            queries,
            self._for_all_heads(self._remembered(keys, f"past_key_values.{at}.key")),
            self._for_all_heads(self._remembered(values, f"past_key_values.{at}.value")),
            self._mask,
        )
        rows = op.reshape(
            op.transpose(mixed, self._ints([0, 2, 1, 3])), self._ints([0, 0, -1]), special_zero=True
        )
        hidden = op.add(hidden, self._product(rows, f"{base}self_attn.o_proj.weight"))
        rows = self._norm(hidden, f"{base}post_attention_layernorm.weight")
        names = [f"{base}mlp.{part}_proj.weight" for part in ("gate", "up")]
        gate, up = self._split(self._product(rows, *names), 2, config.inner, config.inner)
        rows = op.multiply(op.swish(gate), up)
        return op.add(hidden, self._product(rows, f"{base}mlp.down_proj.weight"))

    def _angles(self, positions: Any) -> None:
        """Cosines and sines, [batch, 1, length, head_dim], for half-split rotary embeddings."""
        steps = np.arange(0, self._config.head_dim, 2, dtype=np.float32) / self._config.head_dim
        frequencies = np.float32(1.0) / np.float32(self._config.rope_theta) ** steps
        places = op.convert(op.unsqueeze(positions, self._ints(2)), np.float32)
        half = op.multiply(places, op.constant(frequencies.reshape(1, 1, -1)))
        angles = op.concat([half, half], -1)
        self._cosines = op.unsqueeze(op.cos(angles), self._ints(1))
        self._sines = op.unsqueeze(op.sin(angles), self._ints(1))

    def _rotate(self, heads: Any) -> Any:
        half = self._config.head_dim // 2
        first, second = self._split(heads, 3, half, half)
        turned = op.concat([op.multiply(second, self._float([[[[-1.0]]]])), first], -1)
        return op.add(op.multiply(heads, self._cosines), op.multiply(turned, self._sines))

    def _remembered(self, new: Any, name: str) -> Any:
        """Keys or values of all tokens so far, [batch, kv_heads, tokens, head_dim]."""
        about = util.VariableInfo()
        about.variable_id, about.data_type = name, ov.Type.f32
        about.data_shape = ov.PartialShape([-1, self._config.kv_heads, -1, self._config.head_dim])
        variable = util.Variable(about)
        past = op.gather(op.read_value(self._empty, variable), self._beams, self._ints(0))
        found = op.concat([past, new], 2)
        self._sinks.append(op.assign(found, variable))
        return found

    def _for_all_heads(self, states: Any) -> Any:
        """Keys or values, once for each head that shares them."""
        config = self._config
        repeat = config.heads // config.kv_heads
        if repeat == 1:
            return states
        wide = op.broadcast(
            op.unsqueeze(states, self._ints(2)),
            self._shape_of_states(0, repeat),
            broadcast_spec="BIDIRECTIONAL",
        )
        shape = self._ints([0, config.heads, -1, config.head_dim])
        return op.reshape(wide, shape, special_zero=True)

    def _shape_of_states(self, length: int, repeat: int = 0) -> Any:
        parts = [self._config.kv_heads, *[repeat][: bool(repeat)], length, self._config.head_dim]
        return op.concat([self._batch, *(self._ints([part]) for part in parts)], 0)

    def _norm(self, rows: Any, weight: str) -> Any:
        squares = op.power(rows, self._float([[[2.0]]]))
        mean = op.reduce_mean(squares, self._ints([-1]), keep_dims=True)
        scale = op.sqrt(op.add(mean, self._float([[[self._config.epsilon]]])))
        return op.multiply(
            op.multiply(op.divide(self._float([[[1.0]]]), scale), rows), self._weight(weight)
        )

    def _product(self, rows: Any, *weights: str) -> Any:
        return op.matmul(rows, self._weight(*weights), False, True)

    def _split(self, rows: Any, axis: int, *sizes: int) -> list[Any]:
        parts = op.variadic_split(rows, self._ints(axis), self._ints(list(sizes)))
        return [parts.output(at) for at in range(len(sizes))]

    def _weight(self, *names: str) -> Any:
        """One weight of so many tensors, one below the other."""
        if names not in self._weights:
            shapes = [self._shapes[name] for name in names]
            rows = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
            shape = [1, 1, *rows] if len(rows) == 1 else rows
            self._weights[names] = op.parameter(shape, np.float32, name=names[0])
            self.sources[names[0]] = names
        return self._weights[names]

    def _ints(self, value: int | Sequence[int]) -> Any:
        return self._constant(value, np.int64)

    def _float(self, value: Any) -> Any:
        return self._constant(value, np.float32)

    def _constant(self, value: Any, form: type) -> Any:
        key = (repr(value), form)
        if key not in self._constants:
            self._constants[key] = op.constant(np.array(value, form))
        return self._constants[key]
