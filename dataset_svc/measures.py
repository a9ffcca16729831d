"""What this service tells Prometheus.

- Labels are bounded: tables, operations and states are named in the code, never by a request.
"""

from prometheus_client import Counter, Gauge, Histogram

ROWS = Counter("regreen_dataset_rows", "Things stored.", ["table"])
ROWS.labels("trajectories")  # there from the start: the first one is an increase too
QUERY_SECONDS = Histogram(
    "regreen_dataset_query_seconds",
    "Time of a database transaction, waiting for a connection included.",
    ["operation"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
ROLLOUTS = Gauge("regreen_dataset_rollouts", "Rollouts in the queue by state.", ["state"])
GROUPS = Gauge("regreen_dataset_groups", "Groups by state.", ["state"])
LOST = Counter("regreen_dataset_rollouts_lost", "Rollouts lost to infrastructure after all tries.")
LEASES_EXPIRED = Counter(
    "regreen_dataset_leases_refused", "Calls refused because the lease belongs to another."
)
PARKED = Counter("regreen_dataset_tasks_parked", "Tasks set aside because rollouts were lost.")
GATHERED = Histogram(
    "regreen_dataset_gathered",
    "Calls that were answered by one transaction.",
    ["operation"],
    buckets=(1, 2, 4, 8, 16, 32, 64),
)
PRUNED = Counter("regreen_dataset_trajectories_pruned", "Trajectories removed by retention.")
COLLECTED = Counter("regreen_dataset_blobs_collected", "Blobs removed because nobody names them.")
COLLECTED_BYTES = Counter("regreen_dataset_blob_bytes_collected", "Their size.")
