"""Writes the table of values in docs/operations/chart.md from values.yaml: `--check` compares.

- A value's meaning is the comment `# --` above it, or above the mapping that it stands in.
- Every leaf has a line; one without a meaning is an error, not an empty cell.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from made import keep

ROOT = Path(__file__).resolve().parents[2]
VALUES = ROOT / "infra" / "helm" / "regreen" / "values.yaml"
PAGE = ROOT / "docs" / "operations" / "chart.md"
START, END = "<!-- values: made by infra/scripts/chart_values.py -->", "<!-- end of values -->"
COMMON = {
    "replicas": "Processes.",
    "settings": "Settings of the service, by its own names.",
    "secretSettings": "Secret and key of settings that are secret.",
    "env": "Variables of libraries, such as `NCCL_DEBUG`; those that the chart sets are refused.",
    "envFrom": "Secrets whose entries become variables, such as `OTEL_EXPORTER_OTLP_HEADERS`.",
    "scheduling": "nodeSelector, tolerations, affinity, topologySpreadConstraints, "
    "priorityClassName.",
    "requests": "Requests of a pod.",
    "limits": "Limits of a pod.",
    "autoscaling": "A HorizontalPodAutoscaler on CPU.",
    "minReplicas": "Least processes.",
    "maxReplicas": "Most processes.",
    "cpuPercent": "Share of the requested processor time that is aimed at.",
    "pollingSeconds": "Time between two looks at the queue.",
    "cooldownSeconds": "Time without work before the last processes go.",
    "kube_workers": "Workers that there should be.",
    "kube_api": "What makes workers: `agent-sandbox`, `pods` or `auto`.",
    "keda": "A ScaledObject on rollouts that wait and run.",
}
"""Meanings of what several components have."""


def leaves(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Paths of the values, with the lines that their keys are on."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            inner = (*path, key.value)
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from leaves(value, inner)
            else:
                yield inner, key.start_mark.line


def meaning(path: tuple[str, ...], line: int, lines: list[str]) -> str:
    """What the comments say of a value."""
    above = lines[line - 1].strip()
    if above.startswith("# --"):
        return above.removeprefix("# --").strip()
    for name in reversed(path):
        if name in COMMON:
            return COMMON[name]
    for number in range(line - 1, 0, -1):
        head = lines[number]
        inner = lines[line]
        if head.strip().endswith(":") and indent(head) < indent(inner):
            before = lines[number - 1].strip()
            if before.startswith("# --"):
                return before.removeprefix("# --").strip()
            inner = head
    raise SystemExit(f"{VALUES.name}: {'.'.join(path)} has no comment with # -- above it")


def indent(line: str) -> int:
    """Blanks at the beginning of a line."""
    return len(line) - len(line.lstrip())


def table() -> str:
    """The table of all values."""
    text = VALUES.read_text()
    lines, values = text.splitlines(), yaml.safe_load(text)
    rows = []
    for path, line in leaves(yaml.compose(text)):
        value = values
        for name in path:
            value = value[name]
        shown = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
        default = f"`{shown}`" if value not in ("", None) else "none"
        rows.append(f"| `{'.'.join(path)}` | {default} | {meaning(path, line, lines)} |")
    return "\n".join([START, "| value | default | meaning |", "| --- | --- | --- |", *rows, END])


def main() -> int:
    """Write or check the page; the exit code."""
    head, _, rest = PAGE.read_text().partition(START)
    return keep({PAGE: head + table() + rest.partition(END)[2]}, "chart_values")


if __name__ == "__main__":
    sys.exit(main())
