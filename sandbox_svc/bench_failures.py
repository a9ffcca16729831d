"""Measures what failing tests cost: a suite of a hundred, all broken by one change, and mended.

- `python -m sandbox_svc.bench_failures --json` prints one JSON object; without the flag, a table.
- The peer is pytest as everyone starts it, with the tracebacks that the runner asks for, in a fork
  of the same State that is there already; all take turns within one run, and count the same.
- The failures come out of a framework of usual size, a few calls deep, as after an upgrade.
"""

import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from regreen.rpc.errors import InfraError, RegreenError
from sandbox_svc.backends.base import Command
from sandbox_svc.bench_warm import RUNNER, Bench, report_of, timed, usual_python
from sandbox_svc.builders.base import REPO, FileChange
from sandbox_svc.builders.python import box_environment
from sandbox_svc.state_records import State
from sandbox_svc.verdicts import Outcome

_TESTS, _FUNCTIONS, _DEPTH = 100, 300, 5
_FAILED = re.compile(r"(\d+) failed")
_PYTEST = ("python", "-m", "pytest", "-q", "--tb=short", "--color=no", "tests")


def _framework(works: bool) -> str:
    """A module of about 2,000 lines through which every test goes."""
    many = "".join(
        f"def part_{n}(value):\n"
        f"    '''Part {n} of it.'''\n"
        f"    if value > {n}:\n"
        f"        return [value, *(one for one in range({n} % 7))]\n"
        f"    return None\n\n\n"
        for n in range(_FUNCTIONS)
    )
    calls = "".join(
        f"def call_{n}(value):\n    return call_{n + 1}(\n        value,\n    )\n\n\n"
        for n in range(_DEPTH)
    )
    last = "return value" if works else "raise AttributeError('gone since 2.0')"
    return f"{many}{calls}def call_{_DEPTH}(value):\n    {last}\n"


def _files() -> dict[str, str]:
    tests = "".join(f"def test_{n}():\n    assert call_0({n}) == {n}\n\n\n" for n in range(_TESTS))
    return {
        "framework.py": _framework(works=False),
        "tests/test_all.py": f"from framework import call_0\n\n\n{tests}",
    }


async def _plain(bench: Bench, state: State) -> tuple[int, float]:
    """Failures that pytest counts by itself, and seconds; its start is in both."""
    async with bench.box(state) as box:
        began = time.perf_counter()
        done = await box.run(Command(_PYTEST, env=box_environment(), cwd=REPO))
        spent_s = time.perf_counter() - began
    found = _FAILED.search(done.stdout.text)
    if found is None:
        raise InfraError(f"pytest counts nothing: {done.stdout.text[-300:]}{done.stderr.text}")
    return int(found[1]), spent_s


async def measure(rounds: int, home: Path) -> dict[str, Any]:
    """The runner on the broken and on the mended suite, and pytest on the broken one."""
    seconds: dict[str, list[float]] = {"pytest": [], "broken": [], "mended": []}
    report: dict[str, Any] = {"bench": "failures", "tests": _TESTS, "rounds": rounds}
    report |= {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)}
    fix = [FileChange("framework.py", _framework(works=True).encode())]
    async with Bench(home) as bench:
        try:
            state = await bench.prepare("failures", usual_python(), RUNNER, _files())
        except RegreenError as error:
            return report | {"rows": {}, "skipped": {"failures": str(error)}}
        for number in range(rounds + 1):
            counted, plain_s = await _plain(bench, state)
            broken, broken_s = await timed(bench.cold, state, [])
            mended, mended_s = await timed(bench.cold, state, fix)
            failed = sum(test.outcome == "failed" for test in broken.tests)
            if not failed == counted == _TESTS or mended.outcome is not Outcome.PASSED:
                raise InfraError(f"{failed} and {counted} of {_TESTS} tests are said to fail")
            if number:
                for name, spent_s in zip(seconds, (plain_s, broken_s, mended_s), strict=True):
                    seconds[name].append(spent_s)
    rows = {
        name: {
            "median_s": round(statistics.median(values), 2),
            "lowest_s": round(min(values), 2),
            "highest_s": round(max(values), 2),
        }
        for name, values in seconds.items()
    }
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "pytest over the runner": round(middle["pytest"] / middle["broken"], 2),
        "broken over mended": round(middle["broken"] / middle["mended"], 2),
    }
    return report | {"rows": rows, "ratios": ratios, "skipped": {}}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    report = report_of("sandbox_svc.bench_failures", __doc__, argv, 5, measure)
    if report is None:
        return 0
    for name, row in report["rows"].items():
        sys.stdout.write(
            f"{name:8} {row['median_s']:6.2f} s  ({row['lowest_s']} to {row['highest_s']})\n"
        )
    for name, ratio in report.get("ratios", {}).items():
        sys.stdout.write(f"{name}: {ratio}\n")
    for name, reason in report["skipped"].items():
        sys.stdout.write(f"{name}: skipped, {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
