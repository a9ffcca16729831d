"""Runs the tests of the repository and writes the reward: 1 if all that must pass do, else 0.

- Which tests must pass is in required.json beside this file; a run that does not end is a 0.
- It runs in the container that the solver worked in, as this format has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("REGREEN_WORK", "/work"))
LOGS = Path(os.environ.get("REGREEN_LOGS", "/logs/verifier"))


def outcomes(required: dict[str, Any]) -> dict[str, str]:
    """Outcome by test id."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        env = {**os.environ, "PYTHONPATH": str(HERE), "REGREEN_REPORT": str(report)}
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        argv = [str(WORK / "env/bin/python"), "-m", "pytest", "-p", "regreen_report"]
        argv += ["-p", "no:cacheprovider", *required["arguments"]]
        try:
            subprocess.run(argv, cwd=WORK / "repo", env=env, timeout=required["timeout_s"])
        except subprocess.TimeoutExpired:
            return {}
        found: dict[str, str] = json.loads(report.read_text()) if report.exists() else {}
        return found


def passed(test: str, seen: dict[str, str]) -> bool:
    """Whether a test passed; of a whole module one must and none may fail."""
    if "::" in test:
        return seen.get(test) == "passed"
    inside = [outcome for id, outcome in seen.items() if id.partition("::")[0] == test]
    return "passed" in inside and "failed" not in inside


def main() -> int:
    """Run, write the reward, say what is lacking."""
    required = json.loads((HERE / "required.json").read_text())
    seen = outcomes(required)
    wanted = [*required["fail_to_pass"], *required["pass_to_pass"]]
    lacking = [test for test in wanted if not passed(test, seen)]
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / "reward.txt").write_text("0\n" if lacking or not wanted else "1\n")
    sys.stdout.write(f"{len(wanted) - len(lacking)} of {len(wanted)} required tests pass\n")
    for test in lacking[:20]:
        sys.stdout.write(f"not passed: {test}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
