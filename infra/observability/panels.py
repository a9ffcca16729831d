"""What the dashboards show: title, unit and expressions of every panel.

- Every selector names the job, so that nothing else in a Prometheus is counted.
- Windows of rates are chosen by Grafana, by the scrape interval.
- Every expression answers with data on a stack that trains (`make observe`).
"""

from dataclasses import dataclass

RATE = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `shows` are pairs of an expression and the legend of its series.

    In an expression `%` stands for the matcher of the job, and `@` for the window of rates.
    """

    title: str
    unit: str
    shows: tuple[tuple[str, str], ...]
    about: str = ""
    stat: bool = False

    @property
    def queries(self) -> list[tuple[str, str]]:
        """Expressions as Prometheus takes them once Grafana has filled in the window."""
        return [
            (expr.replace("%", 'job="regreen"').replace("@", RATE), legend)
            for expr, legend in self.shows
        ]


def one(title: str, unit: str, expr: str, legend: str = "", about: str = "") -> Panel:
    """A panel of one expression."""
    return Panel(title, unit, ((expr, legend),), about)


def number(title: str, unit: str, expr: str, about: str = "") -> Panel:
    """A panel that shows the latest value alone."""
    return Panel(title, unit, ((expr, ""),), about, stat=True)


def quantiles(title: str, metric: str, by: str = "", about: str = "") -> Panel:
    """Median and 99th percentile of a histogram of seconds."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return Panel(
        title,
        "s",
        tuple(
            (
                f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{%}}[@])))",
                name + legend,
            )
            for q, name in ((0.5, "p50"), (0.99, "p99"))
        ),
        about,
    )


def latest(title: str, unit: str, name: str, about: str = "") -> Panel:
    """A value of the learner's latest step, by kind of run."""
    return one(title, unit, f"max by (kind) (regreen_learner_{name}{{%}})", "{{kind}}", about)


def each_trajectory(expr: str) -> str:
    """So much of something, in an hour, for each trajectory that was stored in it.

    In the usual window many a step has no trajectory, and its cost would be nobody's.
    """
    return (
        f"({expr}) / "
        'scalar(sum(increase(regreen_dataset_rows_total{%, table="trajectories"}[1h])) > 0)'
    )


FLEET = (
    number("Services that answer", "none", "sum(up{%})"),
    number("Versions", "none", "count(count by (version) (regreen_build_info{%}))"),
    number(
        "First certificate ends",
        "dateTimeFromNow",
        "min(regreen_tls_certificate_expires_seconds{%} > 0) * 1000",
        "Empty without TLS.",
    ),
    one("Answers", "none", "sum by (component) (up{%})", "{{component}}"),
    one(
        "Calls a second",
        "reqps",
        "sum by (component) (rate(grpc_server_started_total{%}[@]))",
        "{{component}}",
    ),
    one(
        "Calls by result",
        "reqps",
        "sum by (grpc_code) (rate(grpc_server_handled_total{%}[@]))",
        "{{grpc_code}}",
        "A failing build is a result, so it is OK here.",
    ),
    one(
        "Calls on their way",
        "none",
        "sum by (component) (grpc_server_started_total{%})"
        " - sum by (component) (grpc_server_handled_total{%})",
        "{{component}}",
        "Streams that watch a run are among them.",
    ),
    quantiles("Time of calls", "grpc_server_handling_seconds", "component"),
    one(
        "Processor cores",
        "none",
        "sum by (component) (rate(process_cpu_seconds_total{%}[@]))",
        "{{component}}",
        "Of the service's own process: no rank, engine or sandbox.",
    ),
    one(
        "Memory",
        "bytes",
        "sum by (component) (process_resident_memory_bytes{%})",
        "{{component}}",
        "Of the service's own process: no rank, engine or sandbox.",
    ),
    one("Open files", "none", "sum by (component) (process_open_fds{%})", "{{component}}"),
)

ROLLOUTS = (
    one("Rollouts by state", "none", "max by (state) (regreen_dataset_rollouts{%})", "{{state}}"),
    one("Groups by state", "none", "max by (state) (regreen_dataset_groups{%})", "{{state}}"),
    one(
        "Trajectories a minute",
        "none",
        '60 * sum(rate(regreen_dataset_rows_total{%, table="trajectories"}[@]))',
    ),
    Panel(
        "What went wrong",
        "none",
        (
            ("sum(increase(regreen_dataset_rollouts_lost_total{%}[@]))", "rollouts lost"),
            ("sum(increase(regreen_dataset_tasks_parked_total{%}[@]))", "tasks parked"),
            ("sum(increase(regreen_dataset_leases_refused_total{%}[@]))", "leases refused"),
        ),
        "All three are 0 where all is well.",
    ),
    quantiles("Database transactions", "regreen_dataset_query_seconds"),
    one(
        "Rows stored a second",
        "none",
        "sum by (table) (rate(regreen_dataset_rows_total{%}[@]))",
        "{{table}}",
    ),
    one(
        "Tokens a second",
        "none",
        "sum by (kind) (rate(regreen_policy_tokens_total{%}[@]))",
        "{{kind}}",
        "Cached ones are among those of prompts.",
    ),
    Panel(
        "Requests of the policy",
        "none",
        (
            ("sum(regreen_policy_requests_running{%})", "running"),
            ("sum(regreen_policy_requests_waiting{%})", "waiting"),
            ("sum(rate(regreen_policy_requests_refused_total{%}[@]))", "refused a second"),
        ),
    ),
    quantiles("Time to generate", "regreen_policy_generate_seconds"),
    one(
        "Completions by end",
        "none",
        "sum by (finish_reason) (rate(regreen_policy_completions_total{%}[@]))",
        "{{finish_reason}}",
    ),
    one(
        "Verdicts a second",
        "none",
        "sum by (accepted) (rate(regreen_judge_verdicts_total{%}[@]))",
        "accepted: {{accepted}}",
    ),
    quantiles("Time of the judge", "regreen_judge_seconds", "method"),
)

LEARNING = (
    latest("Reward", "none", "reward_mean"),
    latest("Hack rate", "percentunit", "hack_rate", "Rollouts flagged as hacks; must stay near 0."),
    latest("Staleness", "none", "staleness", "Versions between sampling and training."),
    latest("Flat groups", "percentunit", "flat_group_fraction", "Groups that teach nothing."),
    latest("Loss", "none", "loss"),
    latest("Gradient norm", "none", "grad_norm", "Before clipping."),
    latest("Learning rate", "sci", "learning_rate"),
    latest("Entropy", "none", "entropy", "Mean negative logprob of sampled tokens."),
    Panel(
        "Clipped and capped",
        "percentunit",
        (
            ("max by (kind) (regreen_learner_clip_fraction{%})", "clipped {{kind}}"),
            ("max by (kind) (regreen_learner_importance_capped_fraction{%})", "capped {{kind}}"),
        ),
    ),
    latest(
        "Mismatch", "none", "mismatch_k3", "KL between sampling and training policy, per token."
    ),
    latest("Truncated", "percentunit", "truncated_fraction", "Samples that hit a limit."),
    latest("Tokens a second", "none", "tokens_per_second"),
    one("Time of a step", "s",
        "sum by (kind) (rate(regreen_learner_step_seconds_sum{%}[@]))"
        " / sum by (kind) (rate(regreen_learner_step_seconds_count{%}[@]))", "{{kind}}"),
    one("Steps", "none", "sum by (kind) (regreen_learner_steps_total{%})", "{{kind}}"),
    quantiles("Time of a checkpoint", "regreen_learner_checkpoint_seconds"),
    one("Policy version", "none", "max by (instance) (regreen_policy_version{%})", "{{instance}}"),
    one(
        "Weights loaded", "none", "sum by (outcome) (increase(regreen_policy_loads_total{%}[@]))",
        "{{outcome}}",
    ),
    one("Runs that train", "none", "sum(regreen_learner_active_runs{%})"),
)  # fmt: skip

SANDBOXES = (
    one("Sandboxes", "none", "sum by (instance) (regreen_sandbox_active{%})", "{{instance}}"),
    quantiles("Time to fork a State", "regreen_sandbox_start_seconds"),
    quantiles("Time of commands", "regreen_sandbox_exec_seconds"),
    quantiles("Time of validations", "regreen_sandbox_validate_seconds"),
    one(
        "Validations by outcome", "none",
        "sum by (outcome) (rate(regreen_sandbox_validate_seconds_count{%}[@]))", "{{outcome}}",
    ),
    Panel(
        "Caches",
        "none",
        tuple(
            (f"sum(rate(regreen_sandbox_{name}_{what}_total{{%}}[@]))", f"{legend}: {what}")
            for name, legend in (
                ("state_cache", "States"),
                ("action_cache", "actions"),
                ("warm", "warm starts"),
            )
            for what in ("hits", "misses")
        ),
        "Hits and misses a second.",
    ),
    Panel(
        "Queues",
        "none",
        (
            ("sum(regreen_sandbox_queue_depth{%})", "validations"),
            ("sum(regreen_sandbox_action_queue_depth{%})", "actions"),
        ),
    ),
    one(
        "Commands ended by a limit", "none",
        "sum by (reason) (increase(regreen_sandbox_limit_kills_total{%}[@]))", "{{reason}}",
    ),
    Panel(
        "What must stay 0",
        "none",
        (
            ("sum by (kind) (regreen_sandbox_leaks{%})", "left over: {{kind}}"),
            ("sum(increase(regreen_sandbox_warm_mismatches_total{%}[@]))", "warm verdicts"),
            ("sum(increase(regreen_sandbox_worker_mismatches_total{%}[@]))", "shared verdicts"),
            ("sum(increase(regreen_sandbox_actions_quarantined_total{%}[@]))", "quarantined"),
        ),
    ),
    Panel(
        "Disk",
        "bytes",
        (
            ("sum by (instance) (regreen_sandbox_layer_bytes{%})", "layers {{instance}}"),
            (
                "min by (job, instance) (regreen_sandbox_disk_free_bytes{%})"
                " unless on (job, instance) regreen_sandbox_workers{%}",
                "free {{instance}}",
            ),
        ),
    ),
    one("States", "none", "sum by (instance) (regreen_sandbox_states{%})", "{{instance}}"),
    one(
        "Requests to the network", "none",
        "sum by (decision) (rate(regreen_sandbox_egress_requests_total{%}[@]))", "{{decision}}",
    ),
)  # fmt: skip

COST = (
    one(
        "Processor time of services for a trajectory", "s",
        each_trajectory("sum by (component) (increase(process_cpu_seconds_total{%}[1h]))"),
        "{{component}}", "Of the service's own process: no rank, engine or sandbox.",
    ),
    Panel(
        "Sandbox time for a trajectory", "s",
        (
            (each_trajectory("sum(increase(regreen_sandbox_exec_seconds_sum{%}[1h]))"), "commands"),
            (
                each_trajectory("sum(increase(regreen_sandbox_validate_seconds_sum{%}[1h]))"),
                "validations",
            ),
        ),
        "Wall time; validations are commands too.",
    ),
    one(
        "Engine time for a trajectory", "s",
        each_trajectory("sum(increase(regreen_policy_generate_seconds_sum{%}[1h]))"),
    ),
    one(
        "Tokens for a trajectory", "none",
        each_trajectory("sum by (kind) (increase(regreen_policy_tokens_total{%}[1h]))"), "{{kind}}",
    ),
    one(
        "Prompt tokens from the cache", "percentunit",
        'sum(increase(regreen_policy_tokens_total{%, kind="cached"}[1h]))'
        ' / sum(increase(regreen_policy_tokens_total{%, kind="prompt"}[1h]))',
    ),
    one(
        "Learner time for a trajectory", "s",
        each_trajectory("sum(increase(regreen_learner_step_seconds_sum{%}[1h]))"),
    ),
    one(
        "Tokens trained on for a trajectory", "none",
        each_trajectory("sum by (kind) (increase(regreen_learner_tokens_total{%}[1h]))"),
        "{{kind}}",
    ),
    Panel(
        "Price of a trajectory", "currencyUSD",
        (
            (
                each_trajectory(
                    "$core_hour_usd / 3600 * sum(increase(process_cpu_seconds_total{%}[1h]))"
                ),
                "services",
            ),
            (
                each_trajectory(
                    "$core_hour_usd / 3600 * sum(increase(regreen_sandbox_exec_seconds_sum{%}[1h]))"
                ),
                "sandboxes",
            ),
            (
                each_trajectory(
                    "$engine_hour_usd / 3600"
                    " * sum(increase(regreen_policy_generate_seconds_sum{%}[1h]))"
                ),
                "engine",
            ),
            (
                each_trajectory(
                    "$learner_hour_usd / 3600"
                    " * sum(increase(regreen_learner_step_seconds_sum{%}[1h]))"
                ),
                "learner",
            ),
        ),
        "By the prices above, which are yours to set: of an hour of a core, of one request in the "
        "engine, of a step's ranks together. A command counts as one core.",
    ),
)  # fmt: skip

DASHBOARDS = {
    "fleet": ("Regreen: fleet", FLEET),
    "rollouts": ("Regreen: rollouts", ROLLOUTS),
    "learning": ("Regreen: learning", LEARNING),
    "sandboxes": ("Regreen: sandboxes", SANDBOXES),
    "cost": ("Regreen: cost", COST),
}
PRICES = {"core_hour_usd": "0.04", "engine_hour_usd": "0.10", "learner_hour_usd": "2.00"}
"""Text boxes of the cost dashboard, and what stands in them at first."""
