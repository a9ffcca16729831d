"""Prometheus metrics of training; the latest step's values are gauges, labelled by kind of run."""

import contextlib
from collections.abc import Collection

from prometheus_client import Counter, Gauge, Histogram

from learner_svc.record import StepRecord

_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 900, 3600)
ACTIVE = Gauge("regreen_learner_active_runs", "Runs that train now.")
STEPS = Counter("regreen_learner_steps", "Steps done.", ["kind"])
TOKENS = Counter("regreen_learner_tokens", "Tokens trained on, prompts included.", ["kind"])
STEP_SECONDS = Histogram(
    "regreen_learner_step_seconds", "Time of a step.", ["kind"], buckets=_BUCKETS
)
CHECKPOINT_SECONDS = Histogram(
    "regreen_learner_checkpoint_seconds", "Time to write a checkpoint.", buckets=_BUCKETS
)
PUBLISH_SECONDS = Histogram(
    "regreen_learner_publish_seconds",
    "Time to write weights where a policy can load them.",
    buckets=_BUCKETS,
)
SYNC_SECONDS = Histogram(
    "regreen_learner_weight_sync_seconds",
    "Time to offer weights through the blob store.",
    buckets=_BUCKETS,
)
SYNCS = Counter(
    "regreen_learner_weight_syncs", "Weights offered, by what was put: delta, snapshot.", ["kind"]
)
SYNC_BYTES = Counter(
    "regreen_learner_weight_sync_bytes", "Bytes of weights put, by kind.", ["kind"]
)
for _put in ("delta", "snapshot"):
    SYNCS.labels(_put)
    SYNC_BYTES.labels(_put)
RESTARTS = Counter(
    "regreen_learner_restarts",
    "Times that a run's ranks were begun anew from its last checkpoint after some were lost.",
    ["kind"],
)
for _kind in ("sft", "grpo"):  # there from the start: the first step is an increase too
    STEPS.labels(_kind)
    TOKENS.labels(_kind)
    STEP_SECONDS.labels(_kind)
LATEST = {
    name: Gauge(f"regreen_learner_{name}", help_text, ["kind"])
    for name, help_text in {
        "loss": "Loss of the latest step.",
        "grad_norm": "Gradient norm before clipping.",
        "learning_rate": "Learning rate of the latest update.",
        "reward_mean": "Mean reward of the batch.",
        "kl": "k3 estimate of KL against the reference, per token.",
        "clip_fraction": "Fraction of tokens whose ratio was clipped.",
        "importance_capped_fraction": "Fraction of tokens whose importance weight was capped.",
        "mismatch_k3": "k3 estimate of KL between sampling and training policy, per token.",
        "entropy": "Mean negative logprob of sampled tokens.",
        "staleness": "Versions between sampling and training, mean over tokens.",
        "flat_group_fraction": "Fraction of samples in groups without spread of rewards.",
        "truncated_fraction": "Fraction of samples that hit a limit.",
        "tokens_per_second": "Tokens of the batch per second of the step.",
        "hack_rate": "Rate of rollouts flagged as hacks, as the driver reported it.",
    }.items()
}


def show_active(kinds: Collection[str]) -> None:
    """Show how many runs train, by their kinds; the last of a kind takes what was latest along."""
    ACTIVE.set(len(kinds))
    for kind in {"sft", "grpo"} - set(kinds):
        for gauge in LATEST.values():
            with contextlib.suppress(KeyError):  # it was never shown
                gauge.remove(kind)


def observe_step(kind: str, record: StepRecord) -> None:
    """Show the metrics of a step."""
    STEPS.labels(kind).inc()
    TOKENS.labels(kind).inc(record.metrics.get("tokens", 0.0))
    STEP_SECONDS.labels(kind).observe(record.duration_s)
    for name, gauge in LATEST.items():
        value = record.metrics.get(name, record.metrics.get(f"batch/{name}"))
        if value is not None:
            gauge.labels(kind).set(value)
