"""Completes mined records to tasks: hashes of every file, a wheelhouse that gives nothing away.

- `python -m regreen.tasks.pin MINED.jsonl --out DIR` asks the user's own package index, once.
- Runs no code of any package: sdists are unpacked in memory to read their names, never built.
- The wheelhouse holds the newest release of everything and other releases of every package, so
  that what it offers does not tell which package broke the build.
"""

import argparse
import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from regreen.lockfile import normalize
from regreen.pkgindex import (
    IndexFile,
    PackageIndex,
    find_uv,
    index_urls,
    interpreter_tags,
    python_allowed,
    usable_files,
    wheel_fits,
)
from regreen.rpc.errors import NotFound, RegreenError
from regreen.tasks.jsonl import load_distributions, load_tasks, write_lines
from regreen.tasks.model import (
    Added,
    Build,
    Culprit,
    DistributionRecord,
    FileRecord,
    Fix,
    Overlay,
    TaskRecord,
    Tests,
)

MACHINES = ("x86_64", "aarch64")
DEMO_PYTHON = "3.11"
TOOLS = (
    "setuptools", "wheel", "poetry-core", "flit-core", "hatchling", "hatch-vcs", "pbr",
    "hatch-fancy-pypi-readme", "setuptools-scm[toml]", "tomli", "pytest-runner", "editables",
)  # fmt: skip
TOOLS_NEWEST = "2023-07-01"
"""Build tools of this day can still build old sdists in place and know PEP 660; a younger
project gets the tools of its own day."""
DECOYS_PER_PACKAGE = 3
DECOY_MAX_BYTES = 12 << 20


class Pinner:
    """Collects the releases that tasks refer to."""

    def __init__(self, index: PackageIndex, uv: str) -> None:
        self.index, self.uv = index, uv
        self.pythons: dict[str, set[str]] = {}
        self._tools: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}

    def need(self, pins: Iterable[str], pythons: Iterable[str]) -> None:
        """Remember that `pins` must be installable on `pythons`."""
        for pin in pins:
            self.pythons.setdefault(pin, set()).update(pythons)

    async def tools(self, python: str, day: str, requires: Sequence[str] = ()) -> list[str]:
        """Pins of the build tools for an interpreter and a project of that day.

        `requires` is what the project's own build asks for; where that does not go with the other
        tools, or has no wheels, these are offered without it.
        """
        key = (python, max(day, TOOLS_NEWEST), tuple(sorted(requires)))
        if key not in self._tools:
            try:
                self._tools[key] = await self._resolve((*TOOLS, *key[2]), *key[:2])
            except NotFound:
                if not requires:
                    raise
                self._tools[key] = await self.tools(python, day)
        return self._tools[key]

    async def _resolve(
        self, names: Sequence[str], python: str, newest: str = "", *options: str
    ) -> list[str]:
        """A consistent set of wheels of the newest releases of `names` and what they need."""
        command = [
            self.uv, "pip", "compile", "-", "--no-header", "--no-annotate", "--quiet",
            # This interpreter is asked, since to look for others can take uv long.
            "--python", sys.executable, "--python-version", python, "--only-binary", ":all:",
            "--python-platform", "x86_64-manylinux_2_28",
            *(["--exclude-newer", newest] if newest else []), *options,
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "UV_DEFAULT_INDEX": self.index.urls[0]},
            cwd="/",  # settings of whatever project somebody stands in do not count
        )
        out, err = await process.communicate("\n".join(names).encode())
        if process.returncode:
            raise NotFound(f"no newest set for Python {python}: {err.decode()[-600:]}")
        lines = [line.split(" ;")[0].strip() for line in out.decode().splitlines()]
        return [line for line in lines if "==" in line and not line.startswith("#")]

    async def resolve(
        self,
        requirements: Sequence[str],
        python: str,
        *,
        constraints: Sequence[str] = (),
        overrides: Sequence[str] = (),
    ) -> list[str]:
        """Pins of the newest wheels that satisfy `requirements` together.

        `constraints` bound what is needed anyway; `overrides` replace whatever is required of
        their packages, by anyone.

        Raises:
            NotFound: there is no such set; ends with the resolver's reasons.
        """
        with tempfile.TemporaryDirectory() as folder:
            options: list[str] = []
            for flag, lines in (("--constraint", constraints), ("--override", overrides)):
                path = Path(folder) / f"{flag.strip('-')}.txt"
                path.write_text("\n".join([*lines, ""]))
                options += [flag, str(path)] if lines else []
            return await self._resolve(requirements, python, "", *options)

    async def newest(self, names: Sequence[str], python: str) -> list[str]:
        """Newest releases that fit together; names without a usable wheel are left out."""
        usable = [n for n in names if await self._fitting(n, python)]
        return await self._resolve(usable, python)

    async def _fitting(self, name: str, python: str) -> dict[Version, IndexFile]:
        """Final, unyanked releases with a wheel for `python`, with that wheel."""
        tags = interpreter_tags(python, MACHINES[0])
        found: dict[Version, IndexFile] = {}
        for entry in await self.index.files(name):
            if not entry.is_wheel or entry.yanked or not entry.version:
                continue
            try:
                version = Version(entry.version)
            except InvalidVersion:
                continue
            if version.is_prerelease or not wheel_fits(entry.filename, tags):
                continue
            if python_allowed(entry.requires_python, python):
                found[version] = entry
        return found

    async def decoys(self, pin: str, python: str) -> list[str]:
        """Other releases of a package: the last of nearby series, and the one before `pin`."""
        name, _, text = pin.partition("==")
        here = Version(text)
        fitting = await self._fitting(name, python)
        small = {v for v, f in fitting.items() if f.size_bytes <= DECOY_MAX_BYTES}
        series: dict[tuple[int, ...], Version] = {}
        for version in sorted(small):
            series[version.release[:2] if version.major == 0 else version.release[:1]] = version
        minors: dict[tuple[int, ...], Version] = {}
        for version in sorted(small):
            minors[version.release[:2]] = version
        after = [v for v in minors.values() if v > here]
        chosen = [v for v in series.values() if v >= here][:DECOYS_PER_PACKAGE] + after[:2]
        before = sorted(v for v in minors.values() if v < here)
        return sorted({f"{name}=={v}" for v in [*chosen, *before[-1:]]})

    async def distributions(self) -> list[DistributionRecord]:
        """Every needed release with its files; releases without any file are left out."""
        records = []
        for pin, pythons in sorted(self.pythons.items()):
            name, _, version = pin.partition("==")
            files = usable_files(await self.index.files(name), version, sorted(pythons), MACHINES)
            chosen = [FileRecord(filename=f.filename, sha256=f.sha256) for f in files if f.sha256]
            if chosen:
                records.append(DistributionRecord(name=name, version=version, files=chosen))
        return records


async def complete(mined: dict[str, Any], pinner: Pinner) -> TaskRecord:
    """A task from one mined record."""
    bugfix = mined["kind"] == "release-bugfix"
    upgrade = mined["kind"] == "interpreter-upgrade"
    culprit = mined.get("culprit") or {}
    good = mined["python"]
    python = culprit["to"] if upgrade else good
    choices = sorted({good, python}, key=Version) if upgrade else []
    pins_pass = [_canonical(p) for p in mined["pins_pass"]]
    pins_fail = pins_pass if bugfix else [_canonical(p) for p in mined["pins_fail"]]
    every = sorted({*pins_pass, *pins_fail})
    names = sorted({p.split("==")[0] for p in every})
    offered = {*every}
    for interpreter in choices or [python]:
        offered.update(await pinner.newest(names, interpreter))
        for pin in pins_pass:
            offered.update(await pinner.decoys(pin, interpreter))
    tools = mined["build"].get("tools") or await pinner.tools(
        python, mined["build"].get("exclude_newer") or ""
    )
    targets = {python, good, *([] if upgrade else [DEMO_PYTHON])}
    pinner.need(every, targets)
    pinner.need(offered - {*every}, {python, good})
    pinner.need(tools, targets)
    tests = mined["tests"]
    known = {"mode": "any_fix", "origin": "upstream" if bugfix else "pins-restored"}
    fixes = [Fix(**fix) for fix in mined.get("fixes_verified") or [known]]
    return TaskRecord(
        id=mined["id"],
        kind=mined["kind"],
        package=normalize(mined["package"]),
        version=mined["version"],
        python=python,
        choices=choices,
        good_python=good if upgrade else None,
        sdist=await _sdist(mined, pinner.index),
        overlay=await _overlay(mined, pinner.index) if bugfix else None,
        added=[Added(**added) for added in mined.get("added", [])],
        build=Build(mode=mined["build"]["mode"], tools=tools),
        pins_pass=pins_pass,
        pins_fail=pins_fail,
        wheelhouse=sorted(offered - {*every}),
        culprit=_culprit(mined) if culprit else None,
        changed={
            k: " ".join(v or "-" for v in pair) for k, pair in (mined.get("changed") or {}).items()
        },
        tests=Tests(
            arguments=_arguments(mined["test_command"]),
            timeout_s=max(120.0, round(15 * mined["seconds"].get("test", 30.0))),
            fail_to_pass=sorted(tests["fail_to_pass"]),
            fail_to_pass_count=tests["n_fail_to_pass"],
            fail_to_pass_sha256=tests.get("fail_to_pass_sha256", ""),
            pass_to_pass_count=tests.get("pass_to_pass_n", tests.get("n_pass_to_pass", 0)),
        ),
        stage=mined.get("stage", ""),
        category=mined.get("category", ""),
        blame=mined.get("blame_top") or ("source" if bugfix else ""),
        error_lines=[line[:300] for line in mined.get("error_lines", [])[:8]],
        modes=list(dict.fromkeys(fix.mode for fix in fixes)),
        fixes=fixes,
    )


def _canonical(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{normalize(name)}=={version}"


def _arguments(command: str) -> list[str]:
    """What follows `python -m pytest -o addopts=`."""
    return command.split("addopts=", 1)[1].split()


def _culprit(mined: dict[str, Any]) -> Culprit:
    culprit = mined["culprit"]
    return Culprit(
        name=normalize(culprit["name"]),
        good=culprit["from"],
        bad=culprit["to"],
        direct=bool(culprit.get("direct", True)),
    )


async def _sdist(mined: dict[str, Any], index: PackageIndex) -> FileRecord:
    """The source archive; for release-bugfix records that of the version before the fix."""
    if mined["kind"] != "release-bugfix":
        return FileRecord(**mined["sdist"])
    for entry in await index.files(mined["package"]):
        if entry.is_wheel or not entry.version or not entry.filename.endswith(".tar.gz"):
            continue
        if Version(entry.version) == Version(mined["version"]):
            return FileRecord(filename=entry.filename, sha256=entry.sha256)
    raise NotFound(f"{mined['id']}: the index has no sdist of version {mined['version']}")


async def _overlay(mined: dict[str, Any], index: PackageIndex) -> Overlay:
    """The later release: its tests are laid over, its changed files are the reference fix."""
    sdist = FileRecord(**mined["sdist"])
    named = [a for a in _arguments(mined["test_command"]) if not a.startswith("-")]
    roots = mined.get("overlay_paths") or named
    fix = [p for p in mined["reference_patch"]["files"] if not _under(p, roots)]
    with tempfile.TemporaryDirectory() as folder:
        path = await index.download(
            mined["package"], sdist.filename, sdist.sha256, Path(folder) / sdist.filename
        )
        names = _member_names(path.read_bytes())
    fix = [p for p in fix if p in names]
    return Overlay(version=mined["fixed_version"], sdist=sdist, paths=roots, fix_paths=fix)


def _under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def _member_names(archive: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


async def run(source: Path, out: Path, only: Sequence[str]) -> int:
    """Complete every record of `source` into `out`; returns the number that failed."""
    mined = [json.loads(line) for line in source.read_text("utf-8").splitlines() if line.strip()]
    failed = 0
    tasks: list[TaskRecord] = []
    async with PackageIndex(index_urls()) as index:
        pinner = Pinner(index, find_uv())
        for number, record in enumerate(mined, 1):
            if only and record["id"] not in only:
                continue
            try:
                tasks.append(await complete(record, pinner))
                note = f"{len(tasks[-1].wheelhouse)} further releases"
            except RegreenError as error:
                failed, note = failed + 1, f"FAILED: {error}"
            sys.stderr.write(f"[{number}/{len(mined)}] {record['id']}: {note}\n")
        distributions = await pinner.distributions()
    out.mkdir(parents=True, exist_ok=True)
    if (out / "tasks.jsonl").exists():
        tasks, distributions = _merged(out, tasks, distributions)
    write_lines(out / "distributions.jsonl", distributions)
    write_lines(out / "tasks.jsonl", tasks)
    digest = hashlib.sha256((out / "tasks.jsonl").read_bytes()).hexdigest()
    sys.stderr.write(f"{len(tasks)} tasks, {len(distributions)} releases, sha256 {digest}\n")
    return failed


def _merged(
    out: Path, tasks: list[TaskRecord], distributions: list[DistributionRecord]
) -> tuple[list[TaskRecord], list[DistributionRecord]]:
    """What `out` holds already, with the new records in place of old ones."""
    new = {task.id: task for task in tasks}
    old = load_tasks(out / "tasks.jsonl")
    kept = [new.pop(task.id, task) for task in old]
    releases = load_distributions(out / "distributions.jsonl")
    for record in distributions:
        files = {f.filename: f for f in (*_files(releases, record.pin), *record.files)}
        ordered = [files[name] for name in sorted(files)]
        releases[record.pin] = record.model_copy(update={"files": ordered})
    return [*kept, *new.values()], [releases[pin] for pin in sorted(releases)]


def _files(releases: dict[str, DistributionRecord], pin: str) -> list[FileRecord]:
    return releases[pin].files if pin in releases else []


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m regreen.tasks.pin", description=__doc__
    )
    parser.add_argument("source", type=Path, help="mined records, JSON Lines")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory to write the task set to"
    )
    parser.add_argument("--only", action="append", default=[], help="id of one record; repeatable")
    options = parser.parse_args()
    sys.exit(1 if asyncio.run(run(options.source, options.out, options.only)) else 0)


if __name__ == "__main__":
    main()
