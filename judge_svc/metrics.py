"""Prometheus metrics of the judge.

- Labels are bounded: finding classes, severities and kinds of source, never paths or ids.
"""

from prometheus_client import Counter, Histogram

from judge_svc.evidence import Verdict

VERDICTS = Counter("regreen_judge_verdicts", "Verdicts given.", ["accepted"])
FINDINGS = Counter("regreen_judge_findings", "Findings given.", ["class", "severity", "source"])
MODEL_ANSWERS = Counter("regreen_judge_model_answers", "Verdicts by use of the model.", ["used"])
for _used in ("true", "false"):  # there from the start: the first one is an increase too
    MODEL_ANSWERS.labels(_used)
SECONDS = Histogram(
    "regreen_judge_seconds",
    "Time of one call.",
    ["method"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)


def count(verdict: Verdict) -> None:
    """Count one verdict that was given."""
    VERDICTS.labels(str(verdict.accepted).lower()).inc()
    if verdict.model:
        MODEL_ANSWERS.labels(str(verdict.model_used).lower()).inc()
    for finding in verdict.findings:
        source = finding.source.partition(":")[0]
        FINDINGS.labels(finding.cls.value, finding.severity.value, source).inc()
