"""What OpenVINO needs to let a sample be bound by a regular expression or a JSON Schema.

- Its grammar library (xgrammar) reads the vocabulary from a tokenizer of OpenVINO's own. That is
  made once for each `tokenizer.json`, in a process of its own, and kept, whole or not at all.
- A structure is prepared where tokens are sampled, which waits for it: they are small here.
- One that the library cannot read fails a step, and with it all that its pipeline runs. So each new
  one is tried first on a model of one layer and the same vocabulary; where that fails, only that
  model is lost, and made anew in a tenth of a second.

`python -m policy_svc.engines.openvino_structure MODEL FOLDER` makes a tokenizer.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from policy_svc.engines.llama_config import LlamaConfig
from policy_svc.engines.openvino_graph import LlamaGraph
from policy_svc.engines.stepper import StructureError
from policy_svc.engines.weights import Array
from policy_svc.structure import Kind, Structure
from regreen.rpc.errors import InvalidArgument

_MADE = "openvino_detokenizer.xml"
_KNOWN = 256
_SIZES = {Kind.REGEX: (1024, 2000), Kind.JSON_SCHEMA: (8192, 2000)}
"""Characters and places."""
_MAKE_S = 200.0


def tokenizer_of(model: Path, kept: Path) -> Any:
    """OpenVINO's form of a model folder's tokenizer, from `kept` or made there.

    Raises:
        StructureError: it cannot be made; says why.
    """
    digest = hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    folder = kept / f"{digest[:32]}-{openvino_genai.get_version().split('-')[0]}"
    if not (folder / _MADE).is_file():
        _make(model, folder)
    return openvino_genai.Tokenizer(folder)


def _make(model: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    # The libraries that make it take a GB that the engine has no use for afterwards.
    command = [sys.executable, "-m", __name__, str(model), str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MAKE_S, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["its process was ended"]
            raise StructureError(f"no tokenizer of OpenVINO can be made: {last[0][:500]}")
        with contextlib.suppress(OSError):  # another engine may have made it meanwhile
            partial.rename(folder)
    except (OSError, subprocess.SubprocessError) as error:
        raise StructureError(f"no tokenizer of OpenVINO can be made: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(model: str, folder: str) -> None:
    """Write a model folder's tokenizer as OpenVINO reads it."""
    from openvino_tokenizers.convert_tokenizer import convert_tokenizer
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(model, local_files_only=True)
    both = convert_tokenizer(source, with_detokenizer=True)
    for name, made in zip(("tokenizer", "detokenizer"), both, strict=True):
        openvino.save_model(made, f"{folder}/openvino_{name}.xml")  # type: ignore[attr-defined]


class Probe:
    """Tells expressions that can be followed from others; used by one thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_id: int) -> None:
        self._tokenizer, self._end_id = tokenizer, end_id
        self._graph = LlamaGraph(_least(vocabulary))
        self._known: dict[Structure, str] = {}
        self._ids = 0
        self._genai: Any = None

    def check(self, structure: Structure) -> None:
        """Follow one for a token. Raises: StructureError when it cannot be followed."""
        try:
            structure.check(*_SIZES[structure.kind])
        except InvalidArgument as error:
            raise StructureError(f"it {error.problem}; {error.remedy}") from error
        if structure not in self._known:
            if len(self._known) == _KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[structure] = self._tried(structure)
        if problem := self._known[structure]:
            raise StructureError(problem)

    def _tried(self, structure: Structure) -> str:
        genai = self._genai or self._begun()
        self._genai = None
        self._ids += 1
        prompt = openvino.Tensor(np.zeros((1, 1), np.int64))  # type: ignore[attr-defined]
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = 1
        config.eos_token_id, config.stop_token_ids = self._end_id, {self._end_id}
        config.structured_output_config = bound_by(structure)
        try:
            handle = genai.add_request(self._ids, prompt, config)  # one without a handle is dropped
            while genai.has_non_finished_requests():
                genai.step()
            handle.read_all()
        except RuntimeError as error:
            return str(error).strip().splitlines()[-1].partition(".cc:")[2][-300:] or "not read"
        self._genai = genai
        return ""

    def _begun(self) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 16
        with self._graph.with_weights(_Zeros(), 1) as folder:
            return openvino_genai.ContinuousBatchingPipeline(
                folder, self._tokenizer, scheduler, "CPU", INFERENCE_NUM_THREADS=1
            )


def bound_by(structure: Structure) -> Any:
    """What a request says whose samples have to be so."""
    config = openvino_genai.StructuredOutputConfig()
    setattr(config, structure.kind.value, structure.text)
    return config


def _least(vocabulary: int) -> LlamaConfig:
    """The smallest model that has a vocabulary."""
    return LlamaConfig(
        **dict.fromkeys(("layers", "heads", "kv_heads"), 1),
        **dict.fromkeys(("hidden", "head_dim", "inner"), 16),
        vocabulary=vocabulary,
        context=64,
        rope_theta=1e4,
        epsilon=1e-5,
        tied=True,
    )


class _Zeros:
    """Weights that are all zero."""

    def float32(self, name: str, shape: tuple[int, ...]) -> Iterator[Array]:
        """See `Checkpoint`."""
        yield np.zeros(int(np.prod(shape)), np.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
