"""What OpenVINO needs to let a sample be bound by a regular expression or a JSON Schema.

- Its grammar library (xgrammar) reads the vocabulary from a tokenizer of OpenVINO's own. That is
  made once for each tokenizer, in a process of its own, and kept, whole or not at all.
- A structure that the library cannot read fails a step, and with it all that its pipeline runs; one
  that it can may take minutes to prepare, or seconds for each token. So a new one is followed first
  for some tokens in another process, on a model of one layer and the same vocabulary, within a
  budget of processor time; where that fails, only that process is lost.

`python -m policy_svc.engines.openvino_structure MODEL FOLDER` makes a tokenizer; with `--try FOLDER
VOCABULARY END` it answers structures, a line each.
"""

import contextlib
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
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

_KNOWN = 256
_SIZES = {Kind.REGEX: (1024, 2000), Kind.JSON_SCHEMA: (8192, 2000)}
"""Characters and places."""
_MAKE_S = 200.0
_BUDGET_S, _WAIT_S = 1.0, 30.0
_TOKENS = 24


def tokenizer_of(model: Path, kept: Path) -> tuple[Any, Path]:
    """OpenVINO's form of a model folder's tokenizer, from `kept` or made there; and its folder.

    Raises:
        StructureError: it cannot be made; says why.
    """
    content = hashlib.sha256(openvino_genai.get_version().encode())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with contextlib.suppress(FileNotFoundError):
            content.update((model / name).read_bytes())
    folder = kept / content.hexdigest()[:32]
    if folder.is_dir():
        with contextlib.suppress(RuntimeError):
            return openvino_genai.Tokenizer(folder), folder
        shutil.rmtree(folder, ignore_errors=True)  # it was damaged
    _make(model, folder)
    try:
        return openvino_genai.Tokenizer(folder), folder
    except RuntimeError as error:
        raise StructureError(f"the tokenizer of OpenVINO cannot be read: {error}") from error


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
    """Tells structures that can be followed from others; used by one thread."""

    def __init__(self, tokenizer: Path, vocabulary: int, end_id: int) -> None:
        self._words = [str(tokenizer), str(vocabulary), str(end_id)]
        self._known: dict[Structure, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, structure: Structure) -> None:
        """Follow one for some tokens. Raises: StructureError when it cannot be followed."""
        try:
            structure.check(*_SIZES[structure.kind])
        except InvalidArgument as error:
            raise StructureError(f"it {error.problem}; {error.remedy}") from error
        if structure not in self._known:
            problem = self._tried(structure)
            if len(self._known) == _KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[structure] = problem
        if problem := self._known[structure]:
            raise StructureError(problem)

    def _tried(self, structure: Structure) -> str:
        """What is wrong with it, if anything.

        Raises:
            StructureError: this could not be found out, for no fault of its own.
        """
        process = self._process or self._begun()
        assert process.stdin is not None
        began_s = _processor_s(process.pid)
        asked = json.dumps({"kind": structure.kind, "text": structure.text}).encode() + b"\n"
        with contextlib.suppress(OSError):
            process.stdin.write(asked)
            process.stdin.flush()
        give_up_s = time.monotonic() + _WAIT_S
        while not _has_line(process, 0.02):
            if _processor_s(process.pid) - began_s > _BUDGET_S:
                self._end(process)
                return f"it takes more than {_BUDGET_S:g} s of processor time"
            if time.monotonic() > give_up_s:
                self._end(process)
                raise StructureError("it could not be tried in time; send it again")
        line = _line(process)
        if line.get("problem") or not line:  # its pipeline is lost with it
            self._end(process)
        if not line:
            raise StructureError("what tried it has ended; send it again")
        return str(line["problem"])

    def _begun(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", __name__, "--try", *self._words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if not _has_line(process, _MAKE_S) or not _line(process):
            self._end(process)
            raise StructureError("what would try it does not start; try again")
        self._process = process
        return process

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = None
        process.kill()
        process.communicate()


def _has_line(process: "subprocess.Popen[bytes]", within_s: float) -> bool:
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], within_s)[0])


def _line(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What it said; nothing where it has ended."""
    assert process.stdout is not None
    said = process.stdout.readline()
    return dict(json.loads(said)) if said.endswith(b"\n") else {}


def _processor_s(pid: int) -> float:
    """Processor time of a process; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def try_all(folder: str, vocabulary: str, end_id: str) -> None:
    """Follow each structure of standard input; a problem ends it, since its pipeline is lost."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = 16
    with LlamaGraph(_least(int(vocabulary))).with_weights(_Zeros(), 1) as model:
        genai = openvino_genai.ContinuousBatchingPipeline(
            model, openvino_genai.Tokenizer(folder), scheduler, "CPU", INFERENCE_NUM_THREADS=1
        )
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answers.write('{"ready": true}\n')
    answers.flush()
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        problem = _problem(
            genai, number, Structure(Kind(asked["kind"]), asked["text"]), int(end_id)
        )
        answers.write(json.dumps({"problem": problem}) + "\n")
        answers.flush()
        if problem:
            return


def _problem(genai: Any, number: int, structure: Structure, end_id: int) -> str:
    prompt = openvino.Tensor(np.zeros((1, 1), np.int64))  # type: ignore[attr-defined]
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = _TOKENS
    config.do_sample, config.rng_seed = True, 1
    config.eos_token_id, config.stop_token_ids = end_id, {end_id}
    config.structured_output_config = bound_by(structure)
    try:
        handle = genai.add_request(number, prompt, config)  # one without a handle is dropped
        while genai.has_non_finished_requests():
            genai.step()
        handle.read_all()
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        return last.partition(".cc:")[2].partition(": ")[2][-300:] or "it cannot be read"
    return ""


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
    if sys.argv[1] == "--try":
        try_all(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
