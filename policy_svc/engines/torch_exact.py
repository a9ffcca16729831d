"""Exact float32 sampling in plain torch: the oracle for other engines, and the fallback.

- All running samples decode in one batch; samples of one request share their prompt's keys/values.
- Weights are swapped in place between two steps. Running samples go on under the new weights with
  the keys and values they have, and their later tokens carry the new version (SGLang `in_place`).
- Prefixes are cached by token ids until weights change, bounded by tokens in all.
- A sample's draws depend on its seed, its index and its position only, never on its neighbours.
"""

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from policy_svc.engines.base import Request, Sampling
from policy_svc.engines.llama_config import LlamaConfig
from policy_svc.engines.stepper import Chunk, StructureError
from policy_svc.engines.torch_llama import Branches, Llama, Prefix


@dataclass(slots=True)
class _Sample:
    index: int
    random: random.Random
    ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Group:
    request: Request
    stops: frozenset[int]
    samples: list[_Sample]
    first_logits: Tensor | None
    branches: Branches
    cacheable: bool = True


class PrefixCache:
    """Least recently used prefixes, at most `max_tokens` in all."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._tokens = 0

    def longest(self, ids: tuple[int, ...]) -> Prefix | None:
        """Return the longest cached beginning of `ids` that leaves at least one token over."""
        best, best_key = 0, None
        for key in self._entries:
            common = _common(key, ids)
            if common > best:
                best, best_key = common, key
        best = min(best, len(ids) - 1)
        if best_key is None or best < 1:
            return None
        self._entries.move_to_end(best_key)
        found = self._entries[best_key]
        return Prefix(ids[:best], found.keys[:, :, :best], found.values[:, :, :best])

    def put(self, prefix: Prefix) -> None:
        """Remember a prefix; older ones, and those it extends, make room."""
        for key in [k for k in self._entries if prefix.token_ids[: len(k)] == k]:
            self._tokens -= len(self._entries.pop(key).token_ids)
        self._entries[prefix.token_ids] = prefix
        self._tokens += len(prefix.token_ids)
        while self._tokens > self._max_tokens:
            _, dropped = self._entries.popitem(last=False)
            self._tokens -= len(dropped.token_ids)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._tokens = 0


class TorchStepper:
    """A `Stepper` over `Llama`."""

    dtype = "f32"

    def __init__(
        self,
        model: Path,
        weights: Path,
        version: int,
        *,
        threads: int,
        end_id: int,
        cache_tokens: int = 16384,
    ) -> None:
        torch.set_num_threads(threads)
        self._end_id = end_id
        self._llama = Llama(LlamaConfig.read(model))
        self._llama.load(self._llama.read(weights))
        self._groups: dict[str, _Group] = {}
        self._cache = PrefixCache(cache_tokens)
        self.version = version
        self.structures = False

    def check(self, request: Request) -> None:
        """Refuse what samples would have to be."""
        if request.sampling.structure:
            raise StructureError("this engine follows none")

    @torch.inference_mode()
    def add(self, request: Request) -> int:
        """Compute the prompt; the number of its tokens that the cache held."""
        ids = request.prompt_token_ids
        cached = self._cache.longest(ids)
        prefix, logits = self._llama.prefill(ids, cached)
        self._cache.put(prefix)
        sampling = request.sampling
        samples = [
            _Sample(index, random.Random(f"{sampling.seed}/{index}")) for index in range(request.n)
        ]
        self._groups[request.request_id] = _Group(
            request,
            frozenset({self._end_id, *sampling.stop_token_ids}),
            samples,
            logits,
            self._llama.branch(prefix, request.n),
        )
        return len(cached.token_ids) if cached else 0

    def busy(self) -> bool:
        """Whether anything runs."""
        return bool(self._groups)

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Sample one token for every running sample."""
        groups = list(self._groups.values())
        running = [group for group in groups if group.first_logits is None]
        tokens = [sample.ids[-1] for group in running for sample in group.samples]
        logits = self._llama.decode(tokens, [g.branches for g in running]) if running else None
        chunks: list[Chunk] = []
        row = 0
        for group in groups:
            if group.first_logits is not None:
                rows = group.first_logits.expand(len(group.samples), -1)
                group.first_logits = None
            else:
                assert logits is not None
                rows = logits[row : row + len(group.samples)]
                row += len(group.samples)
            chunks += self._sample(group, rows)
        return chunks

    def end_sample(self, request_id: str, sample: int) -> None:
        """Drop one sample of a request."""
        group = self._groups.get(request_id)
        if group:
            self._keep(group, [at for at, s in enumerate(group.samples) if s.index != sample])

    def cancel(self, request_id: str) -> list[Chunk]:
        """Drop a request; everything it sampled was reported before."""
        self._groups.pop(request_id, None)
        return []

    def prepare(self, version: int, path: Path) -> object:
        """Read a checkpoint into memory."""
        return self._llama.read(path)

    @torch.inference_mode()
    def switch(self, version: int, prepared: object) -> None:
        """Copy the weights into the model; cached prefixes are forgotten."""
        assert isinstance(prepared, dict)
        self._llama.load(prepared)
        self._cache.clear()
        for group in self._groups.values():
            group.cacheable = False
        self.version = version

    def _sample(self, group: _Group, logits: Tensor) -> list[Chunk]:
        sampling = group.request.sampling
        logprobs = torch.log_softmax(logits, -1)
        uniforms = [sample.random.random() for sample in group.samples]
        ids = draw(logits, sampling, uniforms)
        chosen = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
        chunks, alive = [], []
        for at, (sample, token, logprob) in enumerate(
            zip(group.samples, ids.tolist(), chosen, strict=True)
        ):
            sample.ids.append(token)
            finish = None
            if token in group.stops:
                finish = "stop"
            elif len(sample.ids) >= sampling.max_new_tokens:
                finish = "length"
            else:
                alive.append(at)
            chunks.append(
                Chunk(
                    group.request.request_id,
                    sample.index,
                    (token,),
                    (logprob,),
                    self.version,
                    finish,
                )
            )
        if len(alive) < len(group.samples):
            self._keep(group, alive)
        return chunks

    def _keep(self, group: _Group, slots: list[int]) -> None:
        kept = set(slots)
        for at, sample in enumerate(group.samples):
            if at not in kept:
                self._remember(group, at, sample)
        group.samples = [group.samples[at] for at in slots]
        if not slots:
            self._groups.pop(group.request.request_id, None)
        elif group.first_logits is None:
            group.branches.keep(slots)

    def _remember(self, group: _Group, slot: int, sample: _Sample) -> None:
        """Cache prompt plus sample, so that the next turn of a single-sample request continues."""
        if group.request.n > 1 or not group.cacheable:
            return
        branches, length = group.branches, group.branches.lengths[slot]
        prefix = branches.prefix
        keys = torch.cat((prefix.keys, branches.keys[:, slot, :, :length]), 2)
        values = torch.cat((prefix.values, branches.values[:, slot, :, :length]), 2)
        ids = (*prefix.token_ids, *sample.ids[:length])
        self._cache.put(Prefix(ids, keys, values))


def draw(logits: Tensor, sampling: Sampling, uniforms: list[float]) -> Tensor:
    """Draw one id per row by inverting the cumulative distribution at `uniforms` in [0, 1).

    logits [batch, vocabulary] → ids [batch]. Temperature 0 takes the most likely id.
    """
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)
    if sampling.top_k or 0 < sampling.top_p < 1:
        probabilities = _truncate(probabilities, sampling)
    cumulative = probabilities.cumsum(-1)
    targets = torch.tensor(uniforms, dtype=torch.float64) * cumulative[:, -1]
    ids = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
    return ids.clamp_(max=logits.shape[-1] - 1)


def _truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    ordered, order = probabilities.sort(-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if 0 < sampling.top_p < 1:
        before = ordered.cumsum(-1) - ordered
        drop |= before >= sampling.top_p
    if sampling.top_k:
        drop[:, sampling.top_k :] = True
    ordered = ordered.masked_fill(drop, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered)


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    for at in range(limit):
        if first[at] != second[at]:
            return at
    return limit
