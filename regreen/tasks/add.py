"""Makes a gated task of a team's own failing build: detect, pin, find what fails, gate.

- What a fix changes is told apart: tests are laid over the broken project, requirements become
  moved pins, what is left is the reference fix. Changes of test settings are no part of a fix.
- With a fix the gate decides. Without one the task is `unverified`: broken in the same way in every
  repeat, stored and shown as such, never trained on.
- A test that fails with the fix as well is not asked for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import cast

from regreen.client.stack import Stack
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks import environment as env
from regreen.tasks import probes
from regreen.tasks.admit import import_records, last_report, verify
from regreen.tasks.checkout import Checkout, Wish, copied
from regreen.tasks.drift import drift
from regreen.tasks.gate import NOOP_PATH
from regreen.tasks.local import Project, detect, project_files, test_arguments
from regreen.tasks.model import (
    Build,
    Change,
    DistributionRecord,
    Fix,
    ModeName,
    Split,
    TaskRecord,
    Tests,
    TreeRecord,
    ids_sha256,
)
from regreen.tasks.project import Show, pinned_project, prepared, prepared_project
from regreen.tasks.reading import kept_inside, top_of
from regreen.tasks.records import RecordStore, releases_of
from regreen.tasks.trial import NOOP
from regreen.tasks.verify import ServiceGateClient

_TESTS = frozenset({"test", "tests", "testing"})
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.py")
_REQUIRES = re.compile(
    r"pyproject\.toml|setup\.(cfg|py)|.*requirements.*\.(txt|in)|requirements\.lock|uv\.lock|"
    r"poetry\.lock|Pipfile(\.lock)?|\.python-version|(dev|tests?|constraints)\.txt"
)
_SETTINGS = re.compile(r"tox\.ini|pytest\.ini|\.pytest\.ini|noxfile\.py|task\.toml")
_MODES = ("any_fix", "keep_new")


@dataclass(frozen=True, slots=True)
class Added:
    """What became of a build."""

    task: pb.Task
    report: pb.GateReport
    notes: tuple[str, ...]
    """What was left out of the fix or laid over the project, for people."""


@dataclass(frozen=True, slots=True)
class Repair:
    """A fix, told apart."""

    tests: Mapping[str, bytes | None]
    requirements: tuple[str, ...]
    source: Mapping[str, bytes | None]
    settings: tuple[str, ...]


async def add(
    stack: Stack,
    checkout: Checkout,
    home: Path,
    work: Path,
    show: Show,
    *,
    repeats: int,
    keep: RecordStore,
) -> Added:
    """Store and decide on the task of a project.

    Raises:
        InvalidArgument: no project, nothing fails, or the fix repairs nothing; names the field.
        MissingDependency: an interpreter or release is not to be had.
    """
    wish = checkout.wish
    if wish.mode not in _MODES:
        raise InvalidArgument(
            "fix.mode", f"{wish.mode!r} is not known", f"give {' or '.join(_MODES)}"
        )
    repair = told_apart(checkout.broken, checkout.fixed) if checkout.fixed else None
    root, notes = checkout.broken, []
    if repair is not None and repair.tests:
        root = work / "with-tests"
        overlaid(checkout.broken, root, repair.tests)
        notes.append(f"{len(repair.tests)} test files of the fix are laid over the project")
    project = await _detected(stack, checkout.broken, wish)
    if root != project.root:
        project = replace(project, root=root, test_arguments=wish.tests or test_arguments(root))
    notes += project.notes
    spec, state = await prepared_project(stack, project, home, show)
    failing = _failing(state)
    releases = releases_of(spec)
    record = record_of(wish, project, spec, failing)
    if repair is None:
        return await _unverified(stack, record, releases, state, tuple(notes), repeats, show)
    record, more, said = await _with_fix(
        stack, record, project, repair, checkout, home, show, releases
    )
    notes += said
    record = await _asked_for(stack, record, more, show)
    known: list[int] = [0]

    def told(task_id: str, text: str) -> None:
        known[0] += 1
        show("gate", known[0], 0, f"{task_id}: {text}")

    report = await verify(stack, record, more, repeats=repeats, keep=keep, progress=told)
    return Added(await stack.tasks.get_task(record.id), report, tuple(notes))


async def _detected(stack: Stack, root: Path, wish: Wish) -> Project:
    interpreters = (await stack.sandbox.get_capabilities()).interpreters
    lock = root / wish.lock if wish.lock else None
    if lock is not None:
        kept_inside(lock, top_of(root), "task.lock")
    return detect(root, interpreters, python=wish.python, lock=lock, tests=wish.tests)


def _failing(state: sandbox_pb.State) -> list[str]:
    """The tests that fail.

    Raises:
        InvalidArgument: none does, or none was found.
    """
    seen = state.baseline
    if seen.failing:
        return sorted(set(seen.failing))
    if seen.passing:
        problem = f"all {len(seen.passing)} tests pass"
        raise InvalidArgument("path", problem, "give the project as it is when its build fails")
    last = (seen.log.strip().splitlines() or ["no output"])[-1]
    raise InvalidArgument("tests", f"no test was found ({last[:200]})", "name the tests' path")


def told_apart(broken: Path, fixed: Path) -> Repair:
    """What changes between two trees: tests, requirements, source, settings.

    Raises:
        InvalidArgument: nothing does.
    """
    before, after = _contents(broken), _contents(fixed)
    changed = {
        path: after.get(path)
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path)
    }
    if not changed:
        raise InvalidArgument("fix", "changes nothing", "give the commit or patch that repairs it")
    kinds = {path: _kind(path) for path in changed}

    def of(kind: str) -> dict[str, bytes | None]:
        return {path: changed[path] for path in changed if kinds[path] == kind}

    return Repair(of("test"), tuple(of("requirements")), of("source"), tuple(of("settings")))


def _contents(root: Path) -> dict[str, bytes]:
    found = {}
    for path in project_files(root):
        name = path.relative_to(root).as_posix()
        if not name.isprintable():
            raise InvalidArgument("fix", f"{name!r} is no name in Unicode", "rename the file")
        found[name] = path.read_bytes()
    return found


def _kind(path: str) -> str:
    place = PurePosixPath(path)
    if _TESTS & set(place.parts[:-1]) or _TEST_FILE.fullmatch(place.name):
        return "test"
    if _SETTINGS.fullmatch(place.name):
        return "settings"
    return "requirements" if _REQUIRES.fullmatch(place.name) else "source"


def overlaid(project: Path, target: Path, files: Mapping[str, bytes | None]) -> None:
    """A copy of a project with other contents of some files."""
    copied(project, target)
    for name, content in files.items():
        path = target / name
        if content is None:
            path.unlink(missing_ok=True)
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            problem = f"puts {name} where the project has something else: {error.strerror}"
            raise InvalidArgument(
                "fix", problem, "give a fix that leaves tests in place"
            ) from error


def _pins(pins: Sequence[sandbox_pb.Pin]) -> list[str]:
    return sorted(f"{pin.name}=={pin.version}" for pin in pins)


def record_of(
    wish: Wish, project: Project, spec: sandbox_pb.EnvironmentSpec, failing: Sequence[str]
) -> TaskRecord:
    """The record of a project without a fix."""
    tree = spec.source_tree
    for field, value in (("name", project.name), ("version", project.version)):
        if len(value) > 200 or not value.isprintable():
            raise InvalidArgument(field, f"{value[:80]!r} is none of a project", "correct it")
    name = re.sub(r"[^a-z0-9._-]+", "-", project.name.lower()).strip("-._") or "project"
    pins = _pins(spec.pins)
    if wish.split not in ("train", "validation", "test"):
        problem = f"{wish.split!r} is not known"
        raise InvalidArgument("task.split", problem, "give train, validation or test")
    id = wish.id or f"{name}-{project.version}-{tree.sha256[:8]}"
    if not re.fullmatch(r"[a-z0-9][A-Za-z0-9._-]{0,199}", id):
        remedy = "begin with a small letter or digit; then letters, digits, . _ -"
        raise InvalidArgument("task.id", f"{id!r} is no task id", remedy)
    tests = Tests(
        arguments=list(spec.test.arguments),
        timeout_s=wish.timeout_s,
        fail_to_pass_count=len(failing),
    )
    build = {"mode": spec.install_mode, "tools": _pins(spec.build_pins)}
    return TaskRecord(
        id=id,
        kind="local",
        package=project.name,
        version=project.version,
        python=project.python,
        tree=TreeRecord(sha256=tree.sha256, size_bytes=tree.size_bytes),
        build=Build.model_validate(build),
        pins_pass=pins,
        pins_fail=pins,
        wheelhouse=_pins(spec.wheelhouse),
        tests=_tests(tests, failing),
        stage="test-run" if any("::" in id for id in failing) else "collection",
        category="local",
        licence=wish.licence,
        split=cast("Split", wish.split),
        modes=[cast("ModeName", wish.mode)],
    )


def _tests(tests: Tests, failing: Sequence[str]) -> Tests:
    found = {
        "fail_to_pass": sorted(failing),
        "fail_to_pass_count": len(failing),
        "fail_to_pass_sha256": ids_sha256(failing),
    }
    return tests.model_copy(update=found)


async def _with_fix(
    stack: Stack,
    record: TaskRecord,
    project: Project,
    repair: Repair,
    checkout: Checkout,
    home: Path,
    show: Show,
    releases: Mapping[str, DistributionRecord],
) -> tuple[TaskRecord, dict[str, DistributionRecord], list[str]]:
    """The record with its fix, every release, and what there is to say of it."""
    notes = []
    changes = [Change(path=path, text=_text(path, data)) for path, data in repair.source.items()]
    update: dict[str, object] = {}
    known = dict(releases)
    if repair.requirements and checkout.fixed is not None:
        wish = replace(checkout.wish, python=project.python)
        after = await _detected(stack, checkout.fixed, wish)
        spec, _ = await pinned_project(after, home, show)
        known |= releases_of(spec)
        update["pins_pass"] = _pins(spec.pins)
        moved = set(_pins(spec.pins)) ^ set(record.pins_fail)
        names = sorted({pin.partition("==")[0] for pin in moved})
        notes.append(
            f"{', '.join(repair.requirements)}: counts as "
            + (f"moved packages ({', '.join(names[:8])})" if names else "no change of packages")
        )
        update["changed"] = _moved(record.pins_fail, _pins(spec.pins))
    if repair.settings:
        notes.append(f"no part of a fix: {', '.join(repair.settings)}")
    if not changes and not update.get("changed"):
        remedy = "give a fix that changes source or requirements"
        raise InvalidArgument("fix", "changes neither source nor installed packages", remedy)
    fix = Fix.model_validate({"mode": checkout.wish.mode, "origin": "patch", "changes": changes})
    return record.model_copy(update={**update, "fixes": [fix]}), known, notes


def _moved(before: Sequence[str], after: Sequence[str]) -> dict[str, str]:
    """Packages that the broken project has otherwise than the repaired one: "from to"."""
    old, new = (dict(pin.split("==", 1) for pin in pins) for pins in (after, before))
    names = sorted({*old, *new})
    return {n: f"{old.get(n, '-')} {new.get(n, '-')}" for n in names if old.get(n) != new.get(n)}


def _text(path: str, data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "leave it out of the fix: fixes are text"
        raise InvalidArgument("fix", f"{path} is no text", remedy) from error


async def _asked_for(
    stack: Stack, record: TaskRecord, releases: env.Distributions, show: Show
) -> TaskRecord:
    """The record with the tests that the fix turns green, of those that fail.

    Raises:
        InvalidArgument: it turns none green.
    """
    state = await prepared(stack, env.environment(_unasked(record), releases), show)
    client = ServiceGateClient(stack.state, stack.sandbox)
    changes = env.patched_files(record, record.fixes[0], state.python)
    show("try the fix", 0, 1, f"{len(changes)} files")
    found = await client.validate(
        state.id, changes, held_pins={}, required_tests=(), skip_cache_lookup=False
    )
    outcomes = probes.outcomes_of(found)
    green = {id for id, outcome in outcomes.items() if outcome == probes.PASSED}
    whole = {id.partition("::")[0] for id in green} - set(found.failing)
    whole -= {id.partition("::")[0] for id, outcome in outcomes.items() if id not in green}
    turned = [id for id in _failing(state) if id in green or ("::" not in id and id in whole)]
    show("try the fix", 1, 1, found.summary)
    if not turned:
        remedy = "give the fix that was seen to work, or leave it out to store the task unverified"
        left_out = "".join(f"; left out {r.path}: {r.reason}" for r in found.reverted)
        raise InvalidArgument("fix", f"turns no test green ({found.summary}{left_out})", remedy)
    return record.model_copy(update={"tests": _tests(record.tests, turned)})


def _unasked(record: TaskRecord) -> TaskRecord:
    """The record before it is known which tests are asked for."""
    tests = record.tests.model_copy(update={"fail_to_pass": [], "fail_to_pass_sha256": ""})
    return record.model_copy(update={"tests": tests})


async def _unverified(
    stack: Stack,
    record: TaskRecord,
    releases: env.Distributions,
    state: sandbox_pb.State,
    notes: tuple[str, ...],
    repeats: int,
    show: Show,
) -> Added:
    """Store a task without a fix; broken in the same way in every repeat, or quarantined."""
    report = pb.GateReport(task_id=record.id, state_id=state.id, error_log=state.baseline.log)
    report.repeats, report.python = repeats, state.python
    seen = await _repeated(stack, state, report, show)
    steady, ever = set.intersection(*seen), set.union(*seen)
    report.flaky.extend(sorted(ever - steady))
    steadily = [id for id in record.tests.fail_to_pass if id in steady]
    report.fail_to_pass.extend(steadily)
    cut = next((check.detail for check in report.checks if not check.ok), "")
    if cut:
        report.status = pb.TASK_STATUS_WAITING
        report.reason = f"a run came to no end ({cut}); raise its time, or ask a quieter machine"
    elif steadily:
        report.status = pb.TASK_STATUS_UNVERIFIED
        report.reason = f"{len(steadily)} tests fail in each of {repeats} runs; no fix is known"
    else:
        report.status = pb.TASK_STATUS_QUARANTINED
        report.reason = "no test fails in the same way in every run"
    tests = _tests(record.tests, steadily or record.tests.fail_to_pass)
    tests = tests.model_copy(update={"unstable": sorted(ever - steady)})
    kept = record.model_copy(update={"tests": tests})
    await import_records(stack, [kept], releases)
    report.drift.extend(drift(await last_report(stack, kept.id), report))
    task = await stack.tasks.record_gate(report)
    return Added(task, await stack.tasks.get_gate_report(kept.id), notes)


async def _repeated(
    stack: Stack, state: sandbox_pb.State, report: pb.GateReport, show: Show
) -> list[set[str]]:
    """What fails in each repeat; the checks go into the report."""
    client = ServiceGateClient(stack.state, stack.sandbox)
    added = common_pb.CHANGE_KIND_ADD
    noop = common_pb.FileChange(path=NOOP_PATH, kind=added, content=NOOP, mode=0o644)
    seen: list[set[str]] = []
    for repeat, around in enumerate(probes.schedule(report.repeats), 1):
        show("repeat", repeat - 1, report.repeats, f"{report.task_id} {around}".rstrip())
        found = await client.validate(
            state.id,
            [noop],
            held_pins={},
            required_tests=(),
            skip_cache_lookup=True,
            conditions=around.message(),
        )
        seen.append(set(found.failing))
        report.checks.add(
            name="broken-fails",
            repeat=repeat,
            ok=found.outcome == sandbox_pb.VALIDATION_OUTCOME_FAILED and found.lasting,
            detail=found.summary,
            conditions=str(around),
            duration=found.duration,
        )
    show("repeat", report.repeats, report.repeats, report.task_id)
    return seen
