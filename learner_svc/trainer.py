"""One step of a run: a Batch in, gradients of its loss through the engine, metrics out.

- The loss of a step does not depend on packing, micro-batches or the number of ranks (`bnpo` asks
  for micro-batches by definition).
- Tokens, masks and logprobs come from the Batch as sampled; nothing is tokenized here.
- Samples that cannot move the policy (dropped, or advantage 0 without KL) are never computed.
- Advantages are those of trajectories: one reward each, whatever number of samples they give.
- Ratios are against the weights that the step began with, whichever of its updates they belong to.
- A step whose every sample is such leaves the weights untouched and says so (`skipped`).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from learner_svc.algo.advantages import add_turn_scores, group_advantages
from learner_svc.algo.batch import Pack, pack_samples
from learner_svc.algo.choices import Baseline, KlPlace, LossKind, Scale, Truncated
from learner_svc.algo.kl import kl_penalties
from learner_svc.algo.losses import LossOutput, TokenTerms, policy_loss, sft_loss, token_scales
from learner_svc.algo.ratios import high_entropy, rejected
from learner_svc.engines.base import Engine, learning_rate_at
from learner_svc.spec import RunKind, RunSpec
from regreen.batch import Batch, BatchError, Sample
from regreen.rpc.errors import InvalidArgument

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""
Reference = Callable[[Pack], Tensor]
"""Logprobs of the reference policy."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the loss needs to know of the n samples and T trained tokens of a batch."""

    sample: Tensor
    """i64 [T]: sample of each token."""
    sampled: Tensor
    """f32 [T]."""
    advantages: Tensor
    """f32 [n]."""
    weights: Tensor
    """f32 [n]; 0 = out of loss and denominator."""
    compute: list[bool]
    """Which samples need a forward pass."""
    scores: Tensor | None = None
    """f32 [T]: own scores of the tokens' turns; None = they do not count."""
    kept: Tensor | None = None
    """bool [T]; False = rejected: out of loss and denominator."""
    selected: Tensor | None = None
    """bool [T]; False = no policy loss, but a share of the denominator."""
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Steps of one run on one rank."""

    def __init__(self, spec: RunSpec, engine: Engine, reference: Reference | None = None) -> None:
        self._spec = spec
        self._engine = engine
        self._reference = reference
        self._loss = spec.hyperparameters.loss_spec() if spec.kind is RunKind.GRPO else None
        self.updates = 0
        """Optimizer updates so far; the learning rate depends on it."""
        self.policy_version = 0
        """Version of the weights last published; staleness is counted from it."""

    def step(self, batch: Batch, progress: Progress = lambda done, total: None) -> dict[str, float]:
        """Train on one batch.

        Raises:
            InvalidArgument: the batch does not fit the model or the kind of run.
        """
        started = time.perf_counter()
        self._check(batch)
        rows = self._rows(batch)
        metrics = _batch_metrics(batch, self.policy_version) | rows.metrics
        packed = [(share, self._pack(batch, share)) for share in self._shares(batch, rows)]
        packed = [(share, packs) for share, packs in packed if packs]
        begin = self._begin(rows, [packs for _, packs in packed])
        chosen = self._choose(rows, packed, begin)
        packed = [
            (replace(share, kept=chosen.kept, selected=chosen.selected), packs)
            for share, packs in packed
        ]
        metrics |= chosen.metrics
        proximal = begin if len(packed) > 1 else None
        totals: dict[str, float] = {}
        tokens = scored = 0
        advance = self._counted([packs for _, packs in packed], progress)
        for share, packs in packed:
            sums = self._update(packs, share, proximal, advance)
            tokens += sum(pack.tokens for pack in packs)
            scored += sum(int(pack.rows.numel()) for pack in packs)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        per_update = {name: totals.pop(name, 0.0) for name in ("loss", "grad_norm", "updates")}
        updates = per_update["updates"]
        metrics |= {name: value / max(scored, 1) for name, value in totals.items()}
        seconds = time.perf_counter() - started
        return metrics | {
            "loss": per_update["loss"] / max(updates, 1),
            "grad_norm": per_update["grad_norm"] / max(updates, 1),
            "updates": updates,
            "skipped": float(updates == 0),
            "learning_rate": learning_rate_at(max(self.updates, 1), self._spec.hyperparameters),
            "tokens_computed": float(tokens),
            "scored_tokens": float(scored),
            "step_seconds": seconds,
            "tokens_per_second": batch.tokens / max(seconds, 1e-9),
        }

    def _check(self, batch: Batch) -> None:
        if batch.kind != self._spec.kind.value:
            raise InvalidArgument(
                "batch.kind",
                f"is {batch.kind}, but the run is {self._spec.kind.value}",
                "send a batch of the run's kind",
            )
        try:
            batch.check(vocab_size=self._engine.vocab_size())
        except BatchError as error:
            raise InvalidArgument(
                f"batch.{error.field}",
                error.problem,
                "write the batch with regreen.batch",
            ) from error
        if self._loss is None or self._loss.importance_cap is None:
            return
        if not any(sample.logprobs.any() for sample in batch) and batch.trained_tokens:
            raise InvalidArgument(
                "batch.logprobs",
                "are 0 for every trained token, which no policy that samples gives",
                "send those of the policy that sampled, or set importance_cap to -1",
            )

    def _rows(self, batch: Batch) -> _Rows:
        lengths = torch.tensor([sample.trained_tokens for sample in batch])
        sample = torch.repeat_interleave(torch.arange(len(batch)), lengths)
        sampled = torch.from_numpy(
            np.concatenate([s.logprobs[s.loss_mask == 1] for s in batch]).astype(np.float32)
        )
        weights = torch.tensor([s.weight for s in batch], dtype=torch.float32)
        if self._loss is None:
            ones = torch.ones(len(batch))
            return _Rows(sample, sampled, ones, weights, [bool(w > 0) for w in weights])
        penalties, metrics = self._penalties(batch, sample, sampled, weights)
        advantages, in_loss, flat = self._advantages(batch, penalties)
        scores = self._turn_scores(batch)
        scored = torch.zeros(len(batch), dtype=torch.bool)
        if scores is not None:
            scored[sample[scores != 0]] = True
            metrics["turn_score"] = float(scores.mean())
            metrics["turn_scored_fraction"] = float((scores != 0).float().mean())
        flat = flat & ~scored
        kept = in_loss if self._spec.hyperparameters.keep_flat_groups else in_loss & ~flat
        weights = torch.where(kept & (lengths > 0), weights, torch.zeros_like(weights))
        moves = (weights > 0) & ((advantages != 0) | scored | self._kl_in(KlPlace.LOSS))
        metrics |= {
            "dropped_samples": float((~kept).sum()),
            "flat_group_fraction": float(flat.float().mean()),
            "advantage_abs_mean": float(advantages.abs().mean()),
        }
        return _Rows(
            sample, sampled, advantages, weights, moves.tolist(), scores=scores, metrics=metrics
        )

    def _turn_scores(self, batch: Batch) -> Tensor | None:
        """f32 [T]: own scores of the tokens' turns, where the run lets them count."""
        if not self._spec.hyperparameters.turn_score_coefficient:
            return None
        parts = [
            np.zeros(s.trained_tokens) if s.turn_scores is None else s.turn_scores[s.loss_mask == 1]
            for s in batch
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    def _kl_in(self, place: KlPlace) -> bool:
        """Whether there is a KL term, and there."""
        return bool(self._loss and self._loss.kl_coefficient > 0 and self._loss.kl_place is place)

    def _penalties(
        self, batch: Batch, sample: Tensor, sampled: Tensor, weights: Tensor
    ) -> tuple[Tensor | None, dict[str, float]]:
        """f64 [n]: what the KL in the reward takes off that of each sample's trajectory."""
        if self._loss is None or self._reference is None or not self._kl_in(KlPlace.REWARD):
            return None, {}
        if batch.samples[0].advantage is not None:
            raise InvalidArgument(
                "batch.advantage", "is given, so that no reward counts", "set kl_place to loss"
            )
        everything = _Rows(sample, sampled, weights, weights, [True] * len(batch))
        packs = self._pack(batch, everything)
        kl = kl_penalties(
            self._loss.kl_estimator,
            _score_all(packs, everything, self._engine.score),
            _score_all(packs, everything, self._reference),
            sample,
            len(batch),
        )
        metrics = {"kl": float(kl.sum()) / max(int(sample.numel()), 1)}
        return self._loss.kl_coefficient * kl, metrics

    def _advantages(
        self, batch: Batch, penalties: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages f32 [n], rows in the loss bool [n], rows of flat groups bool [n]."""
        given = [sample.advantage for sample in batch]
        none = torch.zeros(len(batch), dtype=torch.bool)
        if given[0] is not None:
            return torch.tensor(given, dtype=torch.float32), ~none, none
        hyperparameters = self._spec.hyperparameters
        order = {group: index for index, group in enumerate(batch.group_ids)}
        owner = torch.tensor(batch.trajectories)
        ones = batch.one_per_trajectory
        rewards = torch.tensor([s.reward for s in ones])
        if penalties is not None:
            taken = torch.zeros(len(ones), dtype=torch.double).index_add_(0, owner, penalties)
            rewards = (rewards - taken).float()
        result = group_advantages(
            rewards,
            torch.tensor([order[s.group_id] for s in ones]),
            torch.tensor([s.truncated for s in ones]),
            baseline=Baseline(hyperparameters.baseline),
            scale=Scale(hyperparameters.advantage_scale),
            truncated_policy=Truncated(hyperparameters.truncated),
            k=hyperparameters.pass_at_k,
        )
        return result.values[owner], result.in_loss[owner], result.zero_variance[owner]

    def _shares(self, batch: Batch, rows: _Rows) -> list[_Rows]:
        """Split the groups over the updates of this step; one share for one update."""
        count = self._spec.hyperparameters.updates_per_step
        if count == 1:
            return [rows]
        order = {group: index for index, group in enumerate(batch.group_ids)}
        owner = torch.tensor([order[s.group_id] % count for s in batch])
        return [
            replace(
                rows,
                weights=torch.where(owner == index, rows.weights, torch.zeros_like(rows.weights)),
                compute=[c and bool(o == index) for c, o in zip(rows.compute, owner, strict=True)],
            )
            for index in range(count)
        ]

    def _pack(self, batch: Batch, rows: _Rows) -> list[Pack]:
        hyperparameters = self._spec.hyperparameters
        return pack_samples(
            [sample.token_ids for sample in batch],
            [sample.loss_mask for sample in batch],
            max_tokens=hyperparameters.micro_batch_tokens if self._engine.packs else 1,
            keep=rows.compute,
            share=self._engine.packs and not hyperparameters.no_prefix_sharing,
        )

    def _terms(self, packs: list[Pack], rows: _Rows) -> TokenTerms:
        kind = self._loss.kind if self._loss else LossKind.DAPO
        micro = torch.zeros_like(rows.sample)
        for index, pack in enumerate(packs):
            micro[pack.scored] = index
        scale = token_scales(
            kind,
            rows.sample,
            rows.weights,
            max_completion_tokens=self._spec.hyperparameters.max_completion_tokens,
            micro_batch=micro,
            kept=rows.kept,
        )
        advantages = rows.advantages[rows.sample]
        if rows.scores is not None:
            coefficient = self._spec.hyperparameters.turn_score_coefficient
            advantages = add_turn_scores(advantages, rows.scores, coefficient)
        return TokenTerms(
            rows.sampled,
            advantages,
            scale,
            sample=rows.sample,
            selected=rows.selected,
        )

    def _begin(self, rows: _Rows, packed: list[list[Pack]]) -> Tensor | None:
        """f32 [T]: logprobs under the weights that the step begins with.

        None where nobody asks: with one update its forward pass gives them, and every ratio is
        exactly 1.
        """
        if self._loss is None or (len(packed) < 2 and not self._rejects()):
            return None
        return _score_all([p for packs in packed for p in packs], rows, self._engine.score)

    def _rejects(self) -> bool:
        loss = self._loss
        return bool(loss and loss.importance_cap is not None and loss.correction.rejects)

    def _choose(
        self, rows: _Rows, packed: list[tuple[_Rows, list[Pack]]], begin: Tensor | None
    ) -> _Rows:
        """`rows` with the tokens that are rejected and selected, before any update.

        Rejected tokens leave the denominator, so they have to be known before the loss is.
        """
        if self._loss is None or not packed:
            return rows
        packs = [pack for _, packs in packed for pack in packs]
        metrics: dict[str, float] = {}
        kept = selected = None
        if begin is not None and self._loss.importance_cap is not None and self._rejects():
            kept = ~rejected(
                begin,
                rows.sampled,
                rows.sample,
                correction=self._loss.correction,
                cap=self._loss.importance_cap,
                floor=self._loss.importance_floor,
            )
            metrics["importance_rejected_fraction"] = float((~kept).float().mean())
        share = self._spec.hyperparameters.top_entropy_share
        if 0 < share < 1:
            scored = torch.cat([pack.scored for pack in packs])
            entropies = _score_all(packs, rows, self._engine.entropies)[scored]
            selected = torch.zeros_like(rows.sample, dtype=torch.bool)
            selected[scored] = high_entropy(entropies, share)
            metrics["token_entropy"] = float(entropies.mean())
        return replace(rows, kept=kept, selected=selected, metrics=metrics)

    def _counted(self, packed: list[list[Pack]], progress: Progress) -> Callable[[int], None]:
        """Takes tokens as they are done, and tells them with those of all updates of this rank."""
        total = sum(pack.tokens for packs in packed for pack in self._mine(packs))
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total)

        return advance

    def _update(
        self,
        packs: list[Pack],
        rows: _Rows,
        proximal: Tensor | None,
        advance: Callable[[int], None],
    ) -> dict[str, float]:
        """One optimizer update; sums over scored tokens, and loss, grad_norm, updates."""
        engine = self._engine
        terms = replace(self._terms(packs, rows), proximal=proximal)
        if self._reference and self._kl_in(KlPlace.LOSS):
            terms = replace(terms, reference=_score_all(packs, rows, self._reference))
        mine = self._mine(packs)
        rounds = -(-len(packs) * engine.sequence_ranks // engine.world_size)
        counts = engine.rank % engine.sequence_ranks == 0  # each of them has the whole pack's sums
        sums: dict[str, float] = {"loss": 0.0}
        for index in range(rounds):
            # A rank that ran out of packs joins in with a weightless one, or the others would hang.
            idle = index >= len(mine)
            pack = packs[0] if idle else mine[index]
            output = self._pack_loss(pack, terms)
            engine.backward(output.loss * (0.0 if idle else 1.0), last=index == rounds - 1)
            if not idle and counts:
                sums["loss"] += float(output.loss.detach())
                for name, value in output.sums.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
                advance(pack.tokens)
        self.updates += 1
        rate = learning_rate_at(self.updates, self._spec.hyperparameters)
        return _over_ranks(sums) | {"grad_norm": engine.step(rate), "updates": 1.0}

    def _mine(self, packs: list[Pack]) -> list[Pack]:
        """Those that this rank computes, alone or with the others of its group."""
        engine = self._engine
        place = engine.rank // engine.sequence_ranks
        return packs[place :: engine.world_size // engine.sequence_ranks]

    def _pack_loss(self, pack: Pack, terms: TokenTerms) -> LossOutput:
        logprobs = self._engine.logprobs(pack)
        own = terms.take(pack.scored).to(logprobs.device)
        if self._loss is None:
            return sft_loss(logprobs, own.scale)
        return policy_loss(logprobs, own, self._loss)


def _score_all(packs: list[Pack], rows: _Rows, score: Reference) -> Tensor:
    """f32 [T]: logprobs of all packs without gradient; tokens not packed keep their sampled."""
    scored = rows.sampled.clone()
    for pack in packs:
        scored[pack.scored] = score(pack).float().cpu()
    return scored


def _over_ranks(sums: dict[str, float]) -> dict[str, float]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    if torch.distributed.get_world_size() == 1:
        return sums
    gathered: list[dict[str, float] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sums)
    parts = [part for part in gathered if part]
    return {name: sum(part.get(name, 0.0) for part in parts) for name in sums}


def _batch_metrics(batch: Batch, policy_version: int) -> dict[str, float]:
    rewards = np.array([sample.reward for sample in batch.one_per_trajectory])
    metrics: dict[str, float] = {
        "samples": float(len(batch)),
        "groups": float(len(batch.group_ids)),
        "tokens": float(batch.tokens),
        "trained_tokens": float(batch.trained_tokens),
        "truncated_fraction": float(np.mean([sample.truncated for sample in batch])),
    }
    if batch.kind == "grpo":
        metrics |= {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
        metrics |= _staleness(batch.samples, policy_version)
    return metrics | _passed_through(batch.metrics)


def _passed_through(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"batch/{name}": float(value) for name, value in metrics.items()}


def _staleness(samples: tuple[Sample, ...], policy_version: int) -> dict[str, float]:
    """How many versions behind the tokens were sampled: mean over tokens, and maximum.

    Counted from the last version published, or the newest one met where that is newer: a run's
    first weights have a version that only its samples tell.
    """
    newest = max((span.version for s in samples for span in s.spans), default=0)
    policy_version = max(policy_version, newest)
    sizes = np.array([span.end - span.start for s in samples for span in s.spans], dtype=float)
    lags = np.array([policy_version - span.version for s in samples for span in s.spans])
    if not sizes.size:
        return {}
    return {
        "staleness": float((sizes * lags).sum() / sizes.sum()),
        "staleness_max": float(lags.max()),
    }
