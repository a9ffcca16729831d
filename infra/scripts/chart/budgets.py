"""Whether budgets for disruptions let nodes be drained.

- What has to stay is compared with how many pods there are at the least: those of an autoscaler's
  lowest, or the workers that a front makes.
- A learner is never taken away by itself, and so is excepted by its name.
"""

import re
from collections.abc import Iterator
from typing import Any

from chart.objects import Object, fronts, label, labels_of, matches, pods_of

_NEVER = ("learner", "follower")
"""Components that end well when they are asked to, and are not begun anew."""


def check_budgets(objects: list[Object]) -> Iterator[str]:
    """A budget lets pods be taken away, one by one: nodes are drained, and parts stay up."""
    for budget in (obj for obj in objects if obj["kind"] == "PodDisruptionBudget"):
        spec, at = budget["spec"], label(budget)
        most = str(spec.get("maxUnavailable", "1")).strip()
        if re.fullmatch("0+%?", most):
            yield f"{at}: maxUnavailable is {most}, so that no node is ever drained: give 1"
        elif not re.fullmatch(r"\d+|\d{1,2}%", most):
            yield f"{at}: maxUnavailable is {most}, all at once or no share: give 1"
        chosen = (spec.get("selector") or {}).get("matchLabels") or {}
        if "minAvailable" in spec and chosen.get("app.kubernetes.io/component") not in _NEVER:
            yield from _check_least(at, spec["minAvailable"], _count(objects, budget))


def _check_least(at: str, least: Any, count: int) -> Iterator[str]:
    text = str(least).strip()
    if not re.fullmatch(r"\d+%?", text):
        yield f"{at}: minAvailable is {text}, no number and no share: give fewer than there are"
        return
    number = int(text.removesuffix("%"))
    if text.endswith("%"):
        number = -(-number * count // 100)  # as Kubernetes rounds
    if count and number >= count:
        yield f"{at}: minAvailable is {text} of {count}, so no node is ever drained: give fewer"


def _count(objects: list[Object], budget: Object) -> int:
    """How many pods a budget selects at the least."""
    selector, space = budget["spec"].get("selector"), budget["metadata"].get("namespace")
    found = 0
    for obj in objects:
        if obj["metadata"].get("namespace") == space:
            pods = [one for one in pods_of(obj) if matches(selector, labels_of(one))]
            found += _replicas(objects, obj) if pods else 0
        for template in pods_of(obj):
            for workers in fronts(template):
                if space == workers.namespace and matches(selector, workers.labels):
                    found += workers.number
    return found


def _replicas(objects: list[Object], obj: Object) -> int:
    spec = obj.get("spec") or {}
    for scaler in objects:
        of = scaler.get("spec") or {}
        target = of.get("scaleTargetRef") or {}
        if (target.get("kind", "Deployment"), target.get("name")) == (
            obj["kind"],
            obj["metadata"]["name"],
        ):
            return int(of.get("minReplicas", of.get("minReplicaCount", 1)))
    size = (spec.get("leaderWorkerTemplate") or {}).get("size", 1)
    return int(spec.get("replicas", 1)) * int(size)
