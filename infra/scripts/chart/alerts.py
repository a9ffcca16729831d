"""Whether Prometheus reads the expressions of a PrometheusRule: asked of its own `promtool`.

- Without the program nothing is found, and `missing` says why.
"""

import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chart.objects import Object, label


def missing() -> str:
    """Why expressions cannot be checked here; empty if they can."""
    if shutil.which("promtool"):
        return ""
    return "no program `promtool` here: Debian's package `prometheus` has it"


def check_expressions(rule: Object) -> Iterator[str]:
    """Expressions and templates are as Prometheus reads them."""
    for line in _problems(json.dumps(rule["spec"], sort_keys=True)):
        yield f"{label(rule)}: spec.groups: {line}: write it as Prometheus reads it"


@functools.cache
def _problems(spec: str) -> tuple[str, ...]:
    program = shutil.which("promtool")
    if program is None:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.yml"
        path.write_text(spec)  # JSON is YAML
        done = subprocess.run(
            [program, "check", "rules", "--lint=none", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    if done.returncode == 0:
        return ()
    lines = [line.strip().removeprefix(f"{path}: ") for line in done.stderr.splitlines()]
    return tuple(line.rstrip(":") for line in lines if line and not line.endswith("FAILED:"))
