"""OpenVINO GenAI's continuous batching on the CPU, driven step by step.

- One request is one group: `n` samples share the prompt, later turns hit the prefix cache.
- New weights become a new pipeline beside the old one; requests in flight finish on theirs, so a
  completion has exactly one version here.
- The number type is f32 unless the CPU has `amx_bf16`; key/value cache entries have the same type.
- `step` holds the interpreter lock for as long as it computes, which is why this runs in a
  worker process (`engines/worker.py`).
- Logprobs of the pipeline are those of the raw model, whatever temperature, top-p or a structure
  did.
- Samples that a structure binds are requests of their own: those of one request would share the
  state of its grammar, and each other's tokens with it. The prefix cache still computes them once.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from policy_svc.engines.base import Request
from policy_svc.engines.llama_config import LlamaConfig
from policy_svc.engines.openvino_graph import LlamaGraph
from policy_svc.engines.openvino_structure import Probe, bound_by, tokenizer_of
from policy_svc.engines.stepper import REFUSED, Chunk, StructureError, WeightsError
from policy_svc.engines.weights import Checkpoint, identity_of
from regreen.cpu import has_fast_bf16


@dataclass(frozen=True, slots=True)
class OpenVinoOptions:
    """How pipelines are built."""

    threads: int
    kv_cache_gib: int = 1
    dtype: str = "auto"
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    end_id: int = 2
    """Token that ends a turn."""
    tokenizers: Path | None = None
    """Where tokenizers of OpenVINO's form are kept; without, no structure is followed."""


@dataclass(slots=True)
class _Running:
    request: Request
    handles: list[Any]
    """One of all samples, or one of each."""
    pipeline: "_Pipeline"
    reported: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Pipeline:
    version: int
    path: Path
    files: tuple[int, ...]
    genai: Any
    follows: bool
    """Whether it has a tokenizer, and so can bind samples by a structure."""
    running: dict[str, _Running] = field(default_factory=dict)


class OpenVinoStepper:
    """A `Stepper` over one pipeline, or two while requests finish on the older one."""

    def __init__(self, model: Path, weights: Path, version: int, options: OpenVinoOptions) -> None:
        llama = LlamaConfig.read(model)
        self._end_ids = _end_ids(model, options.end_id)
        self._end_id = options.end_id
        self._graph = LlamaGraph(llama)
        self._tokenizer: Any = None
        self._probe: Probe | None = None
        self._model, self._vocabulary = model, llama.vocabulary
        self.structures = options.tokenizers is not None
        self._options = options
        wanted = options.dtype
        self.dtype = ("bf16" if has_fast_bf16() else "f32") if wanted == "auto" else wanted
        self._ids = 0
        self._old: list[_Pipeline] = []
        self.version = version
        self._current = self._prepared(version, weights)
        self._spare = self._current

    def check(self, request: Request) -> None:
        """Follow what samples have to be elsewhere first. Raises: StructureError.

        With the first one the pipeline is built anew: one that has a tokenizer can follow it.
        """
        structure, kept = request.sampling.structure, self._options.tokenizers
        if structure is None:
            return
        if kept is None:
            raise StructureError("this engine follows none")
        if self._probe is None:
            self._tokenizer, folder = tokenizer_of(self._model, kept)
            self._probe = Probe(folder, self._vocabulary, self._end_id)
        self._probe.check(structure)
        serving = self._current
        if serving.follows or (self._spare.follows and self._spare.files == serving.files):
            return
        try:
            spare = self._prepared(serving.version, serving.path)
        except (OSError, WeightsError) as error:
            raise StructureError(f"the weights cannot be read again: {error}") from error
        if spare.files != serving.files:
            raise StructureError(f"{serving.path} is not what it was when it was read")
        self._spare = spare

    def add(self, request: Request) -> int:
        """Take a request; cached prompt tokens are not told by the pipeline.

        Raises:
            StructureError: versions were switched while it was checked.
        """
        sampling = request.sampling
        if sampling.structure and not self._current.follows:
            if self._spare.files != self._current.files or not self._spare.follows:
                raise StructureError("new weights came while it was tried; send it again")
            self.switch(self.version, self._spare)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = sampling.max_new_tokens
        config.num_return_sequences = request.n
        config.logprobs = 1
        config.eos_token_id = self._end_id
        config.stop_token_ids = {*self._end_ids, *sampling.stop_token_ids}
        config.do_sample = sampling.temperature > 0
        config.rng_seed = sampling.seed & 0x7FFFFFFFFFFFFFFF
        if config.do_sample:
            config.temperature = sampling.temperature
            config.top_p = sampling.top_p
            if sampling.top_k:
                config.top_k = sampling.top_k
        else:
            config.num_return_sequences = 1
        ids = np.array([request.prompt_token_ids], np.int64)
        prompt = openvino.Tensor(ids)  # type: ignore[attr-defined]
        running = _Running(request, [], self._current)
        requests = 1
        if structure := sampling.structure:
            config.structured_output_config = bound_by(structure)
            requests, config.num_return_sequences = config.num_return_sequences, 1
        for sample in range(requests):
            if sample:
                config.rng_seed = _seed_of(sampling.seed, sample)
            self._ids += 1
            running.handles.append(self._current.genai.add_request(self._ids, prompt, config))
        self._current.running[request.request_id] = running
        return 0

    def busy(self) -> bool:
        """Whether any pipeline has a request."""
        return bool(self._current.running or self._old)

    def step(self) -> list[Chunk]:
        """Step every pipeline that has requests, the older first."""
        chunks: list[Chunk] = []
        for pipeline in [*self._old, self._current]:
            if not pipeline.running:
                continue
            if pipeline.genai.has_non_finished_requests():
                pipeline.genai.step()
            for running in list(pipeline.running.values()):
                found = self._collect(running)
                running.ended |= {chunk.sample for chunk in found if chunk.finish}
                chunks += found
        self._old = [pipeline for pipeline in self._old if pipeline.running]
        return chunks

    def end_sample(self, request_id: str, sample: int) -> None:
        """Stop a sample's computation; of those of one handle once all of them have ended."""
        running = self._find(request_id)
        if running is None:
            return
        if len(running.handles) > 1:
            running.handles[sample].stop()
        running.ended.add(sample)
        if len(running.ended) == running.request.n:
            self.cancel(request_id)

    def cancel(self, request_id: str) -> list[Chunk]:
        """Drop a request and give the tokens it had."""
        running = self._find(request_id)
        if running is None:
            return []
        for handle in running.handles:
            handle.stop()
        if running.pipeline.genai.has_non_finished_requests():
            running.pipeline.genai.step()
        chunks = self._read(running, final=True)
        running.pipeline.running.pop(request_id, None)
        self._old = [pipeline for pipeline in self._old if pipeline.running]
        return chunks

    def prepare(self, version: int, path: Path) -> object:
        """Build a pipeline from a checkpoint."""
        return self._prepared(version, path)

    def _prepared(self, version: int, path: Path) -> "_Pipeline":
        tokenizer, files = self._tokenizer, identity_of(path)
        genai = self._genai(path, tokenizer)
        return _Pipeline(version, path, files, genai, tokenizer is not None)

    def _genai(self, path: Path, tokenizer: Any) -> Any:
        checkpoint = Checkpoint(path)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = self._options.kv_cache_gib
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_batched_tokens = self._options.max_batch_tokens
        scheduler.max_num_seqs = self._options.max_sequences
        properties = {
            "INFERENCE_NUM_THREADS": self._options.threads,
            "INFERENCE_PRECISION_HINT": self.dtype,
            "KV_CACHE_PRECISION": self.dtype,
        }
        with self._graph.with_weights(checkpoint, self._options.threads) as folder:
            if tokenizer is None:
                make = openvino_genai.ContinuousBatchingPipeline
                return make(folder, scheduler, "CPU", properties)
            return openvino_genai.ContinuousBatchingPipeline(
                folder, tokenizer, scheduler, "CPU", **properties
            )

    def switch(self, version: int, prepared: object) -> None:
        """Send new requests to the prepared pipeline."""
        assert isinstance(prepared, _Pipeline), "`prepare` has made it"
        if self._current.running:
            self._old.append(self._current)
        self._current = self._spare = prepared
        self.version = version

    def _find(self, request_id: str) -> _Running | None:
        for pipeline in [self._current, *self._old]:
            if request_id in pipeline.running:
                return pipeline.running[request_id]
        return None

    def _collect(self, running: _Running) -> list[Chunk]:
        chunks = self._read(running)
        if all(_over(handle) for handle in running.handles):
            request = running.request
            running.pipeline.running.pop(request.request_id, None)
            finished = {chunk.sample for chunk in chunks if chunk.finish}
            for sample in set(range(request.n)) - finished:
                chunks.append(Chunk(request.request_id, sample, (), (), self.version, REFUSED))
        return chunks

    def _read(self, running: _Running, *, final: bool = False) -> list[Chunk]:
        chunks = []
        for at, handle in enumerate(running.handles):
            if handle.can_read():
                whole = final or _over(handle)
                outputs = handle.read_all() if whole else list(handle.read().values())
                chunks += [self._chunk(running, at + n, one) for n, one in enumerate(outputs)]
        return chunks

    def _chunk(self, running: _Running, sample: int, output: Any) -> Chunk:
        reasons = openvino_genai.GenerationFinishReason
        finish = {reasons.STOP: "stop", reasons.LENGTH: "length"}.get(output.finish_reason)
        return Chunk(
            running.request.request_id,
            sample,
            list(output.generated_ids),
            list(output.generated_log_probs),
            running.pipeline.version,
            finish,
        )


def _end_ids(model: Path, end_id: int) -> set[int]:
    """The end of a turn, and what `config.json` ends with: a token or a list of them."""
    named = json.loads((model / "config.json").read_bytes()).get("eos_token_id")
    found = named if isinstance(named, list) else [named]
    return {end_id, *(token for token in found if type(token) is int)}


def _over(handle: Any) -> bool:
    return bool(handle.get_status() != openvino_genai.GenerationStatus.RUNNING)


def _seed_of(seed: int, sample: int) -> int:
    """A seed of its own for each sample after the first."""
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0] >> 1)
