"""The PromQL expressions of the alerts and dashboards, as they lie in infra/observability."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "observability"
ALERTS, DASHBOARDS = FOLDER / "alerts.yml", FOLDER / "dashboards"
_SELECTOR = re.compile(r"\b([a-z_][a-z0-9_]*)\{([^}]*)\}")
_BARE = re.compile(r"\b(?:regreen|grpc|process)_\w+\b")


def alerts() -> Iterator[tuple[str, str]]:
    """Name and expression of each alert."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def panels() -> Iterator[tuple[str, str]]:
    """Dashboard with panel, and expression, of each query."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]


def prices() -> dict[str, str]:
    """What stands in the dashboards' text boxes at first."""
    return {
        box["name"]: box["query"]
        for path in DASHBOARDS.glob("*.json")
        for box in json.loads(path.read_text())["templating"]["list"]
        if box["type"] == "textbox"
    }


def selectors(expr: str) -> set[str]:
    """The series that an expression takes, as selectors."""
    return {f"{name}{{{labels}}}" for name, labels in _SELECTOR.findall(expr)}


def metrics_of(expr: str) -> set[str]:
    """Names of the metrics in an expression, those without a selector too."""
    labels = set(re.findall(r"(?:by|on|without|group_left) ?\(([^)]*)\)", expr))
    of_labels = {word.strip() for text in labels for word in text.split(",")}
    return (
        {name for name, _ in _SELECTOR.findall(expr)}
        | set(_BARE.findall(re.sub(r"\{[^}]*\}", "", expr)))
    ) - of_labels
