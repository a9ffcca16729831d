"""Metrics of the latest step: they go with the last run of their kind."""

from prometheus_client import REGISTRY

from learner_svc import metrics
from learner_svc.record import StepRecord


def hack_rate(kind: str) -> float | None:
    return REGISTRY.get_sample_value("regreen_learner_hack_rate", {"kind": kind})


def test_what_was_latest_goes_with_the_last_run_of_its_kind() -> None:
    metrics.show_active(["grpo", "sft"])
    for kind in ("grpo", "sft"):
        metrics.observe_step(kind, StepRecord(1, "0" * 64, (), {"batch/hack_rate": 0.2}, 1.0))
    metrics.show_active(["grpo"])
    assert (hack_rate("grpo"), hack_rate("sft")) == (0.2, None)
    metrics.show_active([])
    assert hack_rate("grpo") is None
    assert REGISTRY.get_sample_value("regreen_learner_active_runs") == 0
