"""Prometheus series of the policy service.

- Every label's values come from an enum or a constant here, never from a request.
- Those that alerts count are there from the start: the first of a kind is an increase too.
"""

from prometheus_client import Counter, Gauge, Histogram

TOKENS = Counter(
    "regreen_policy_tokens", "Tokens by kind: prompt, cached (of the prompt), sampled.", ["kind"]
)
COMPLETIONS = Counter("regreen_policy_completions", "Completions ended.", ["finish_reason"])
RUNNING = Gauge("regreen_policy_requests_running", "Requests in the engine.")
WAITING = Gauge("regreen_policy_requests_waiting", "Requests that wait for a place.")
REFUSED = Counter("regreen_policy_requests_refused", "Requests refused since the queue was full.")
VERSION = Gauge("regreen_policy_version", "Policy version that serves.")
PAUSED = Gauge("regreen_policy_paused", "1 while paused.")
ASLEEP = Gauge("regreen_policy_asleep", "1 while its memory is given back, or on its way.")
GENERATE_SECONDS = Histogram(
    "regreen_policy_generate_seconds",
    "Time of requests in the engine.",
    buckets=(0.05, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
LOADS = Counter("regreen_policy_loads", "Weight loads by outcome: loaded, failed.", ["outcome"])
for _outcome in ("loaded", "failed"):
    LOADS.labels(_outcome)
RECEIVED = Counter(
    "regreen_policy_weights_received",
    "Versions that servers took from a sender, by outcome: received, failed (and read instead).",
    ["outcome"],
)
for _outcome in ("received", "failed"):
    RECEIVED.labels(_outcome)
LOAD_SECONDS = Histogram(
    "regreen_policy_load_seconds",
    "Time from the call to serving a new version.",
    buckets=(0.3, 1, 3, 10, 30, 100, 300),
)
FETCHES = Counter(
    "regreen_policy_weight_fetches",
    "Weights fetched from the blob store, by what they came as: delta, snapshot.",
    ["kind"],
)
FETCH_BYTES = Counter("regreen_policy_weight_fetch_bytes", "Their bytes, by kind.", ["kind"])
for _kind in ("delta", "snapshot"):
    FETCHES.labels(_kind)
    FETCH_BYTES.labels(_kind)
FALLBACKS = Counter(
    "regreen_policy_weight_fallbacks",
    "Weights taken whole in place of deltas, by reason: no_base, damaged, missing.",
    ["reason"],
)
for _reason in ("no_base", "damaged", "missing"):
    FALLBACKS.labels(_reason)
ENGINE_DEATHS = Counter(
    "regreen_policy_engine_deaths", "Times that the engine's process ended on its own."
)
SESSIONS = Gauge("regreen_policy_http_sessions", "Recorded HTTP sessions held in memory.")
