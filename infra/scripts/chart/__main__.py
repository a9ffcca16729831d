"""`check`: the chart and its overlays, with counts. `try`: cases from standard input, as JSON.

- A case has `values` to render, or `objects` to check as they are; `mutate` changes what was
  rendered: `[["Deployment/regreen-judge", "spec.replicas", "two"]]`; null takes a field away.
  `add` puts objects beside them. With `only_digest` nothing is checked. Whole numbers of `set` lie
  over the values, of the type that `helm --set` gives them.
- An answer has `refused` (by Helm), `schema`, `policy` (findings), `objects`, and `digest`, that of
  what was rendered.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from chart import alerts, policy, schemas
from chart.objects import label
from chart.render import (
    CHART,
    Chart,
    Refused,
    as_set,
    kustomized,
    lint,
    parse,
    read_values,
)

ROOT = Path(__file__).resolve().parents[3]
OVERLAYS = ROOT / "infra" / "k8s" / "overlays"
BUILD = ROOT / "build" / "chart"


def changed(objects: list[dict[str, Any]], changes: list[list[Any]]) -> list[dict[str, Any]]:
    """Objects with some fields replaced."""
    by_name = {label(obj): obj for obj in objects}
    for name, path, value in changes:
        at: Any = by_name[name]
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            at = at[key]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return objects


def tried(chart: Chart, case: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a case."""
    answer: dict[str, Any] = {"refused": "", "schema": [], "policy": [], "objects": []}
    if given := case.get("set"):
        chart = as_set(given)
    options = {key: case[key] for key in ("name", "upgrade") if key in case}
    try:
        if case.get("only_digest"):
            text = json.dumps(chart.texts(case["values"], **options))
            return answer | {"digest": hashlib.sha256(text.encode()).hexdigest()}
        objects = case.get("objects") or chart.objects(case["values"], **options)
    except Refused as error:
        return answer | {"refused": str(error)}
    objects = changed(objects, case.get("mutate", [])) + case.get("add", [])
    answer["schema"] = [line for obj in objects for line in schemas.problems(obj)]
    if not answer["schema"]:
        check = policy.check_fleet if case.get("objects") else policy.check_release
        answer["policy"] = list(check(objects))
    return answer | {"objects": objects}


def check(kubectl: str) -> int:
    """Everything; the exit code."""
    chart, wrong, count = Chart(), lint(), 0
    rows: list[str] = []
    for path in sorted((CHART / "ci").glob("*.yaml")):
        for upgrade in (False, True):
            answer = tried(chart, {"values": read_values(path), "upgrade": upgrade})
            found = [*filter(None, [answer["refused"]]), *answer["schema"], *answer["policy"]]
            wrong += [f"{path.name}: {line}" for line in found]
        rows.append(f"  {path.name:<24} {len(answer['objects']):3} objects")
        count += len(answer["objects"])
    for source in sorted(OVERLAYS.iterdir()):
        found, number = overlaid(chart, source, kubectl)
        wrong += [f"overlay {source.name}: {line}" for line in found]
        rows.append(f"  overlay {source.name:<16} {number:3} objects")
        count += number
    print("\n".join(rows))
    for line in wrong:
        print(f"FAIL  {line}")
    if why := alerts.missing():
        print(f"  expressions of alerts: skipped: {why}")
    kubes = " and ".join(schemas.VERSIONS)
    print(f"chart: {count} objects against the API of {kubes}, CRDs and policy: {len(wrong)} wrong")
    return 1 if wrong else 0


def overlaid(chart: Chart, source: Path, kubectl: str) -> tuple[list[str], int]:
    """What is wrong with an overlay, and the number of its objects."""
    target = BUILD / "overlays" / source.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    try:
        rendered = chart.objects(read_values(source / "values.yaml"))
        objects = parse(kustomized(target, rendered, kubectl), source.name)
    except Refused as error:
        return [str(error)], 0
    found = [line for obj in objects for line in schemas.problems(obj)]
    return found or list(policy.check_release(objects)), len(objects)


def main() -> int:
    """Entry point."""
    if sys.argv[1] == "check":
        return check(sys.argv[2])
    chart = Chart()
    json.dump([tried(chart, case) for case in json.load(sys.stdin)], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
