"""Prometheus metrics of the sandbox service.

- Labels are enums of this service; no id, path or package ever becomes a label.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from prometheus_client import Counter, Gauge, Histogram

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_LONG = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

START_SECONDS = Histogram(
    "regreen_sandbox_start_seconds", "Time to fork a state into a sandbox.", buckets=_SHORT
)
ACTIVE = Gauge("regreen_sandbox_active", "Sandboxes that live now.")
EXEC_SECONDS = Histogram(
    "regreen_sandbox_exec_seconds", "Wall time of commands.", ["reason"], buckets=_LONG
)
VALIDATE_SECONDS = Histogram(
    "regreen_sandbox_validate_seconds",
    "Wall time of validations, cached ones included.",
    ["outcome"],
    buckets=_LONG,
)
VALIDATION_CACHE_HITS = Counter(
    "regreen_sandbox_validation_cache_hits", "Validations answered from the cache."
)
STATE_CACHE_HITS = Counter(
    "regreen_sandbox_state_cache_hits", "Preparations answered with a state that was there."
)
STATE_CACHE_MISSES = Counter(
    "regreen_sandbox_state_cache_misses", "Preparations that had to build."
)
STATES = Gauge("regreen_sandbox_states", "States that this host holds.")
EXPIRED = Counter("regreen_sandbox_expired", "Sandboxes deleted because their time was over.")
QUEUE_DEPTH = Gauge("regreen_sandbox_queue_depth", "Validations that wait for a place.")
WORKERS = Gauge("regreen_sandbox_workers", "Workers of a front, by state.", ["state"])
STATE_MOVES = Counter(
    "regreen_sandbox_state_moves", "States that a front brought to a worker that lacked them."
)
LIMIT_KILLS = Counter("regreen_sandbox_limit_kills", "Commands that a limit ended.", ["reason"])
_LIMITS = frozenset(("timeout", "oom", "pids", "disk", "output"))
for _reason in _LIMITS:  # there from the start: the first one is an increase too
    LIMIT_KILLS.labels(_reason)
LAYERS = Gauge("regreen_sandbox_layers", "Layers that this host holds.")
LAYER_BYTES = Gauge("regreen_sandbox_layer_bytes", "Bytes of all layers together.")
DISK_FREE_BYTES = Gauge(
    "regreen_sandbox_disk_free_bytes", "Free space of the file system that holds the layers."
)
LEAKS = Gauge(
    "regreen_sandbox_leaks",
    "What is left of sandboxes that are no more: must stay 0.",
    ["kind"],
)
SELF_CHECKS = Counter("regreen_sandbox_self_checks", "Looks for leaks that came to an end.")
EGRESS_REQUESTS = Counter(
    "regreen_sandbox_egress_requests", "Requests of sandboxes to the network.", ["decision"]
)
EGRESS_BYTES = Counter(
    "regreen_sandbox_egress_bytes", "Bytes between sandboxes and the network.", ["direction"]
)
EGRESS_CONNECTIONS = Gauge(
    "regreen_sandbox_egress_connections", "Connections of sandboxes to the proxy."
)

LAYERS_FLATTENED = Counter(
    "regreen_sandbox_layers_flattened", "Layers that were merged with others into one."
)
STATES_DROPPED = Counter(
    "regreen_sandbox_states_dropped", "States dropped to keep the disk budget.", ["kind"]
)
ACTION_CACHE_HITS = Counter(
    "regreen_sandbox_action_cache_hits", "Actions answered from the cache or one in flight."
)
ACTION_CACHE_MISSES = Counter("regreen_sandbox_action_cache_misses", "Actions that had to run.")
ACTION_RERUNS = Counter(
    "regreen_sandbox_action_reruns", "Cached actions that were run again to compare."
)
ACTIONS_QUARANTINED = Counter(
    "regreen_sandbox_actions_quarantined", "Actions whose runs were seen to differ."
)
ACTION_QUEUE_DEPTH = Gauge("regreen_sandbox_action_queue_depth", "Actions that wait for a place.")
WARM_HITS = Counter(
    "regreen_sandbox_warm_hits", "Test runs that went on in a sandbox started ahead."
)
WARM_MISSES = Counter(
    "regreen_sandbox_warm_misses", "Test runs that had to start cold, by reason.", ["reason"]
)
WARM_CHECKS = Counter("regreen_sandbox_warm_checks", "Warm verdicts that were checked cold.")
WARM_MISMATCHES = Counter(
    "regreen_sandbox_warm_mismatches", "Warm verdicts that a cold run contradicted."
)
WORKER_RUNS = Counter(
    "regreen_sandbox_worker_runs", "Test runs shared among several forks, by result.", ["result"]
)
WORKER_CHECKS = Counter(
    "regreen_sandbox_worker_checks", "Verdicts of several workers that were checked serially."
)
WORKER_MISMATCHES = Counter(
    "regreen_sandbox_worker_mismatches", "Verdicts of several workers that one run contradicted."
)
WARM_WAITING = Gauge("regreen_sandbox_warm_waiting", "Sandboxes started ahead that wait.")


_counting: ContextVar[bool] = ContextVar("counting", default=True)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Around the service's own probes, which run into limits on purpose."""
    token = _counting.set(False)
    try:
        yield
    finally:
        _counting.reset(token)


def count_limit(reason: str) -> None:
    """Count a command by the limit that ended it, if one did."""
    if reason in _LIMITS and _counting.get():
        LIMIT_KILLS.labels(reason).inc()
