"""Prometheus metrics of the sandbox service.

- Labels are enums of this service; no id, path or package ever becomes a label.
"""

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
WARM_WAITING = Gauge("regreen_sandbox_warm_waiting", "Sandboxes started ahead that wait.")
