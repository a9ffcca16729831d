"""Measures validations that start cold against those whose interpreter was started ahead.

- `python -m sandbox_svc.bench_warm --json` prints one JSON object; without the flag, a table.
- Cold and warm take turns within one run, through the validator itself; nothing is cached.
- A warm sample counts only if it was served warm and says what the cold one said.
- Packages come from the user's index; where it is away the row is listed with the reason.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from regreen.pkgindex import PackageIndex, index_urls, usable_files
from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from sandbox_svc.backends.base import Box, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import DistFile, EnvironmentSpec, FileChange, Pin, TestSpec
from sandbox_svc.builders.interpreters import find_all
from sandbox_svc.builders.python import PythonBuilder
from sandbox_svc.state_records import State
from sandbox_svc.states import StateStore
from sandbox_svc.validate import Validation, ValidationOptions, Validator
from sandbox_svc.verdicts import difference
from sandbox_svc.warm import WarmPool, WarmSettings
from sandbox_svc.wheelhouse import DistStore

RUNNER = {"pytest": "8.3.5", "pluggy": "1.5.0", "iniconfig": "2.0.0", "packaging": "24.2"}
_SCIENCE = {
    **RUNNER,
    "numpy": "2.2.6",
    "pandas": "2.2.3",
    "python-dateutil": "2.9.0.post0",
    "pytz": "2025.2",
    "tzdata": "2025.2",
    "six": "1.17.0",
}
_SHORT = {
    "short/__init__.py": "def add(a, b):\n    return a - b\n",
    "tests/test_short.py": (
        "from short import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n\n\n"
        "def test_zero():\n    assert add(1, 0) == 1\n"
    ),
}
_MEANS = {
    "means/__init__.py": "import pandas as pd\n\n\ndef mean(x):\n    return pd.Series(x).sum()\n",
    "tests/test_means.py": (
        "import numpy as np\nimport pandas as pd\n\nfrom means import mean\n\n\n"
        "def test_mean():\n    assert mean(np.array([1.0, 3.0])) == 2.0\n\n\n"
        "def test_frame():\n    assert pd.DataFrame({'a': [1, 2]}).a.sum() == 3\n"
    ),
}
CASES: Mapping[str, tuple[dict[str, str], dict[str, str], FileChange]] = {
    "pytest_only": (
        RUNNER,
        _SHORT,
        FileChange("short/__init__.py", b"def add(a, b):\n    return a + b\n"),
    ),
    "numpy_pandas": (
        _SCIENCE,
        _MEANS,
        FileChange(
            "means/__init__.py",
            b"import pandas as pd\n\n\ndef mean(x):\n    return pd.Series(x).mean()\n",
        ),
    ),
}
"""Per case: the packages, the repository, and a fix of it."""
_TARGETS = {"numpy_pandas": 5.0}
"""How many times faster the median warm validation of a case is to be, at least."""


def _archive(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    path = folder / f"{name}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for inside, text in files.items():
            info = tarfile.TarInfo(f"{name}-1.0/{inside}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


async def _pins(packages: Mapping[str, str], python: str) -> tuple[Pin, ...]:
    """The packages with the files that the index has of them.

    Raises:
        Unavailable: the index does not answer.
        NotFound: it has no such package.
    """
    pins = []
    async with PackageIndex(index_urls(), deadline_s=20.0) as index:
        for name, version in packages.items():
            found = usable_files(await index.files(name), version, [python], [os.uname().machine])
            pins.append(Pin(name, version, tuple(DistFile(f.filename, f.sha256) for f in found)))
    return tuple(pins)


class Bench:
    """A runtime with states, a cold validator and a warm one."""

    def __init__(self, home: Path) -> None:
        self.runtime = EmbeddedRuntime(home / "rt", run_probes=False)
        self.states = StateStore(home, self.runtime)
        self.home, self.store = home, DistStore(home / "dists")
        self.builder = PythonBuilder(self.store, home / "tools")

    async def __aenter__(self) -> "Bench":
        await self.runtime.start()
        await self.states.open()
        settings = WarmSettings(check_share=0.0)
        self.pool = WarmPool(self.states, self.runtime, self.home, settings=settings)
        self.cold = Validator(self.states, self.runtime)
        self.warm = Validator(self.states, self.runtime, warm=self.pool)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.warm.close()
        await self.pool.close()
        await self.states.close()
        await self.runtime.close()

    @contextlib.asynccontextmanager
    async def box(self, state: State) -> AsyncIterator[Box]:
        """A fork of a state."""
        box = await self.runtime.create(state.layers, limits=Limits(), mounts=state.mounts)
        try:
            yield box
        finally:
            await box.delete()

    async def prepare(
        self, name: str, python: str, packages: Mapping[str, str], files: Mapping[str, str]
    ) -> State:
        """The state of a repository.

        Raises:
            RegreenError: its packages cannot be had, or it cannot be built.
        """
        source = self.store.adopt(_archive(self.home, name, files))
        spec = EnvironmentSpec(
            "python", name, "1.0", python, source, pins=await _pins(packages, python),
            install_mode="path", test=TestSpec(("tests",), timeout_s=120.0),
        )  # fmt: skip
        return await self.states.prepare(
            spec.digest, lambda p: self.builder.prepare(spec, self.runtime, Limits(), p)
        )

    async def row(self, name: str, python: str, rounds: int) -> dict[str, Any]:
        """Cold and warm validations of one case, by turns."""
        packages, files, fix = CASES[name]
        state = await self.prepare(name, python, packages, files)
        began = time.perf_counter()
        self.pool.warm(state)
        await self.pool.settled()
        learned_s = time.perf_counter() - began
        if self.pool.why_off(state.id):
            return {"skipped": f"the state stays cold: {self.pool.why_off(state.id)}"}
        samples: dict[str, list[float]] = {"cold": [], "warm": []}
        misses = 0
        for number in range(rounds + 1):
            cold, cold_s = await timed(self.cold, state, [fix])
            warm, warm_s = await timed(self.warm, state, [fix])
            told = difference(cold, warm)
            if told:
                raise RuntimeError(f"{name}: cold and warm differ: {told}")
            await self.warm.checked()
            await self.pool.settled()
            misses += not warm.warm
            if number and warm.warm:
                samples["cold"].append(cold_s * 1e3)
                samples["warm"].append(warm_s * 1e3)
        return _row(samples, misses, learned_s, cold.outcome.value)


async def timed(
    validator: Validator,
    state: State,
    diff: Sequence[FileChange],
    options: ValidationOptions | None = None,
) -> tuple[Validation, float]:
    """One validation that no cache answers, and how long it took."""
    began = time.perf_counter()
    verdict = await validator.validate(state.id, diff, options, skip_cache_lookup=True)
    return verdict, time.perf_counter() - began


def target(ratio: float, side: str, bound: float) -> dict[str, Any]:
    """A figure, the bound that it is to keep, and whether it does."""
    met = ratio >= bound if side == "at least" else ratio <= bound
    return {"ratio": ratio, "target": f"{side} {bound:g}", "met": met}


def _row(
    samples: dict[str, list[float]], misses: int, learned_s: float, outcome: str
) -> dict[str, Any]:
    row: dict[str, Any] = {"outcome": outcome, "not_warm": misses}
    row["learned_once_s"] = round(learned_s, 2)
    for kind, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        row[f"{kind}_median_ms"] = round(middle, 1)
        row[f"{kind}_p25_ms"], row[f"{kind}_p75_ms"] = round(low, 1), round(high, 1)
        row[f"{kind}_min_ms"] = round(min(values), 1)
    row["ratio"] = round(row["cold_median_ms"] / row["warm_median_ms"], 2)
    row["samples"] = len(samples["warm"])
    return row


def usual_python() -> str:
    """3.11, or the newest that this host has."""
    found = find_all()
    return "3.11" if "3.11" in found else max(found, key=lambda v: [int(p) for p in v.split(".")])


async def measure_warm(rounds: int, home: Path) -> dict[str, Any]:
    """Cold against warm validations; the report."""
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    python = usual_python()
    async with Bench(home) as bench:
        for name in CASES:
            try:
                row = await bench.row(name, python, rounds)
            except RegreenError as error:
                row = {"skipped": str(error)}
            if "skipped" in row:
                skipped[name] = row["skipped"]
            else:
                rows[name] = row
    return {
        "bench": "warm_validation",
        "rounds": rounds,
        "python": python,
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "rows": rows,
        "targets": {
            f"cold over warm, {name}": target(rows[name]["ratio"], "at least", bound)
            for name, bound in _TARGETS.items()
            if name in rows
        },
        "skipped": skipped,
    }


def report_of(
    prog: str,
    about: str | None,
    argv: list[str] | None,
    rounds: int,
    measure: Callable[[int, Path], Coroutine[Any, Any, dict[str, Any]]],
) -> dict[str, Any] | None:
    """What a benchmark in a home of its own found; None where it was printed as JSON."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    options = parser.parse_args(argv)
    logging.configure("bench", "warning")
    home = Path(tempfile.mkdtemp(prefix="regreen-bench-"))
    home.chmod(0o711)
    try:
        report = asyncio.run(measure(max(3, options.rounds), home))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if not options.json:
        return report
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    report = report_of("sandbox_svc.bench_warm", __doc__, argv, 10, measure_warm)
    if report is None:
        return 0
    for name, row in report["rows"].items():
        sys.stdout.write(
            f"{name:16} cold {row['cold_median_ms']:8.1f} ms   warm {row['warm_median_ms']:8.1f} ms"
            f"   {row['ratio']:5.1f}x  ({row['samples']} samples each)\n"
        )
    for name, found in report["targets"].items():
        told = "met" if found["met"] else "missed"
        sys.stdout.write(f"{name}: {found['ratio']}, {found['target']}: {told}\n")
    for name, reason in report["skipped"].items():
        sys.stdout.write(f"{name}: skipped, {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
