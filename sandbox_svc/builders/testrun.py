"""Runs a State's tests with the trusted runner and reads what it reported.

- Results are believed only if every frame carries the right HMAC in sequence and the stream ends
  with the runner's own farewell, whose status is the status that the process ended with.
- What a test prints never counts.
- A run in which a control passed, or none ran beside the tests, is not believed.
- Ids come from the runner; the worst outcome wins where one id reports twice.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from regreen.rpc.errors import DiskFull, FailedPrecondition, InfraError, ResourceExhausted
from sandbox_svc.backends.base import (
    Box,
    Command,
    EndReason,
    ExecResult,
    Later,
    Limits,
    Mount,
    Runtime,
)
from sandbox_svc.backends.fds import no_space
from sandbox_svc.builders.base import ENV, REPO, TOOLS, Baseline
from sandbox_svc.builders.standing import Where, learned, refuse_loose
from sandbox_svc.builders.unseen import completed
from sandbox_svc.builders.written import Pristine, doubts, written

MAX_FRAME = 4 << 20
LOG_BYTES = 24 * 1024
BASELINE_TRIES = 2
_RANK = ("passed", "xfailed", "xpassed", "skipped", "failed", "error")
OUTCOMES = frozenset(_RANK)
PASSED_OVER = ("skipped", "xfailed")


class BoxEnded(InfraError):
    """The whole sandbox died under the run, and nobody asked for it."""

    def __init__(self, log: str) -> None:
        super().__init__(f"the sandbox died under the tests: {log[-500:]}")
        self.log = log


@dataclass(frozen=True, slots=True)
class TestResult:
    """What one test id reported."""

    __test__ = False

    id: str
    outcome: str
    message: str = ""
    seconds: float = 0.0
    own: bool = True
    """Whether the tests themselves, and not the code under test, say that it is passed over."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a run imported before its tests, in order."""

    names: tuple[tuple[str, str], ...]
    """Each with a digest of the conditions if the repository or pytest asked for it."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a run that was to run a part has collected."""

    collected: int
    chosen: int
    ids_sha256: str
    """Over all collected ids, in order."""


@dataclass(frozen=True, slots=True)
class TestRun:
    """One run of the tests."""

    __test__ = False

    tests: Mapping[str, TestResult]
    collect_errors: Mapping[str, str]
    collected: int
    deselected: int
    crash: str
    """Why pytest itself could not run; empty if it could."""
    complete: bool
    """The runner reported its end and agrees with the process about the status."""
    tampered: str
    """Why the results are not believed whatever they say; empty if they are."""
    status: int
    result: ExecResult
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    """Functions of the test runner that were replaced during the run."""
    anew: str = ""
    """Why a run that was started ahead has to be done anew; empty if it need not."""
    survey: Survey | None = None
    where: Where = field(default_factory=Where)
    """Where its tests come from, if that was asked for."""
    part: Part | None = None
    """What there was to run, where only a part was to."""
    stopped: str = ""
    """The required test whose result ended the run before its end; empty if none did."""
    unmet: Mapping[str, str] = field(default_factory=dict)
    """Conditions that were asked for and not brought about, and why."""

    def ids(self, *outcomes: str) -> frozenset[str]:
        return frozenset(i for i, test in self.tests.items() if test.outcome in outcomes)

    @property
    def log(self) -> str:
        return readable_log(self.result)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run the tests."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    timeout_s: float
    skip: tuple[str, ...] = ()
    """Roots that coverage leaves out."""
    coverage: bool = False
    seed: int = 0
    part: Mapping[str, Any] | None = None
    """Which part of the tests runs (`inbox/part.py`); None: all."""
    root: str = REPO
    order_seed: int = 0
    where: bool = False
    """Whether it tells where its tests come from."""
    elsewhere: Mapping[str, Any] = field(default_factory=dict)
    """Another clock or host name (`inbox/elsewhere.py`)."""


def pytest_arguments(arguments: Sequence[str]) -> list[str]:
    """The fixed options of every run, then the task's own arguments."""
    fixed = ["-o", "addopts=", "-o", "cache_dir=/tmp/pytest-cache"]
    return [*fixed, "--continue-on-collection-errors", "--tb=short", "--color=no", *arguments]


async def run_tests(box: Box, options: RunOptions, *, survey: bool = False) -> TestRun:
    """Run the tests in a box in which nothing of an agent has run.

    With `survey` they are only collected, to learn what that imports.

    Raises:
        BoxEnded: the sandbox died under the run.
        InfraError: the runtime failed.
    """
    key = secrets.token_bytes(32)
    command = run_command(options, stdin=run_request(options, key, survey=survey))
    result = await box.run(command)
    if result.reason is EndReason.INFRA:
        raise BoxEnded(readable_log(result))
    return read_run(result, key)


async def looked_at(
    run: TestRun,
    box: Box,
    facts: Mapping[str, Any],
    pristine: Pristine,
    *,
    ours: Iterable[str] = (),
    since: int | None = None,
) -> TestRun:
    """The run, which is not believed where it wrote over the State's tests (`written.py`).

    Raises:
        InfraError: the fork, or a fresh one, cannot be looked at.
    """
    if run.tampered or run.anew or run.result.reason is not EndReason.EXIT:
        return run
    why = await doubts(box, facts, pristine, ours=ours, since=since)
    return replace(run, tampered=why) if why else run


def run_request(options: RunOptions, key: bytes, *, survey: bool = False) -> bytes:
    """What the runner reads before it runs the tests."""
    arguments = pytest_arguments(options.arguments)
    setup = {
        "key": key.hex(),
        "arguments": [*arguments, "--collect-only"] if survey else arguments,
        "coverage": options.coverage,
        "root": options.root,
        "skip": list(options.skip),
        "survey": survey,
        "part": options.part,
        "order": options.order_seed,
        "where": options.where,
        "elsewhere": dict(options.elsewhere),
    }
    return json.dumps(setup).encode()


def run_command(options: RunOptions, *, stdin: bytes = b"", later: Later | None = None) -> Command:
    """The command that runs the tests; started ahead, its request comes `later`."""
    environment = {**options.environment, "PYTHONHASHSEED": str(options.seed % 4294967296)}
    if places := environment.pop("PYTHONPATH", ""):
        environment["REGREEN_PYTHONPATH"] = (
            places  # until the runner has its key (`inbox/start.py`)
        )
    return Command(
        (f"{ENV}/bin/python", "-S", f"{TOOLS}/lib/run_tests.py"),
        env=environment,
        cwd=options.root,
        stdin=stdin,
        timeout_s=options.timeout_s,
        channel=True,
        later=later,
        measured=True,
    )


def read_frames(data: bytes, key: bytes) -> tuple[list[dict[str, Any]], str]:
    """The authentic frames at the start of a stream, and what is wrong after them."""
    frames: list[dict[str, Any]] = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < 36:
            return frames, "the result stream is cut"
        (length,) = struct.unpack_from(">I", data, offset)
        if length > MAX_FRAME:
            return frames, "a result frame is too long"
        mac, body = data[offset + 4 : offset + 36], data[offset + 36 : offset + 36 + length]
        if len(body) < length:
            return frames, "the result stream is cut"
        expected = hmac.new(key, struct.pack(">Q", len(frames)) + body, hashlib.sha256).digest()
        if not hmac.compare_digest(mac, expected):
            return frames, "a result frame was not written by the runner"
        try:
            frame = _plain(json.loads(body))
        except (ValueError, RecursionError):
            return frames, "a result frame is no JSON"
        if not isinstance(frame, dict):
            return frames, "a result frame is no object"
        frames.append(frame)
        offset += 36 + length
    return frames, ""


def _plain(value: Any) -> Any:
    """The same without halves of surrogate pairs, which no message could hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return value


def read_run(result: ExecResult, key: bytes) -> TestRun:
    """Turn the frames of a finished run into results."""
    frames, tampered = read_frames(result.channel, key)
    if tampered == "the result stream is cut" and result.reason is not EndReason.EXIT:
        tampered = ""
    tests: dict[str, TestResult] = {}
    errors: dict[str, str] = {}
    coverage: dict[str, tuple[int, int]] = {}
    replaced: set[str] = set()
    controls: list[str] = []
    collected = deselected = 0
    crash, status, ended, anew = "", -1, False, ""
    survey: Survey | None = None
    where: dict[str, Any] = {"others": ()}
    part, stopped = None, ""
    unmet: dict[str, str] = {}
    for frame in frames:
        kind = frame.get("t")
        if kind == "test":
            _add(tests, frame)
        elif kind == "collect":
            errors[str(frame.get("id"))] = str(frame.get("msg", ""))
        elif kind == "collected":
            collected = int(frame.get("n", 0))
        elif kind == "deselected":
            deselected += int(frame.get("n", 0))
        elif kind == "coverage":
            coverage = {str(k): (int(v[0]), int(v[1])) for k, v in frame["files"].items()}
        elif kind == "replaced":
            replaced.update(map(str, frame["names"]))
        elif kind == "control":
            controls.append(str(frame.get("o")))
        elif kind == "survey":
            survey = Survey(tuple((n, d) for n, d in frame["names"]))
        elif kind == "where":
            told = frame.keys() & {"places", "files", "roots", "plugins", "rewritten"}
            where.update({name: tuple(map(str, frame[name])) for name in told})
            where["whole"] = bool(where.get("whole") or "plugins" in told)
            where["rootdir"] = str(frame.get("rootdir", where.get("rootdir", "")))
            where["others"] += tuple((str(i), str(p)) for i, p in frame.get("others", ()))
        elif kind == "part":
            part = Part(int(frame.get("n", 0)), int(frame.get("run", 0)), str(frame.get("ids")))
        elif kind == "stopped":
            stopped = str(frame.get("by"))
        elif kind == "unmet":
            unmet.update({str(k): str(v)[:300] for k, v in frame["what"].items()})
        elif kind == "anew":
            anew = str(frame.get("msg", "")) or "unknown"
        elif kind == "crash":
            crash = str(frame.get("msg", "")) or "unknown"
        elif kind == "exit":
            status, ended = int(frame.get("status", -1)), True
    agreed = ended and result.reason is EndReason.EXIT and result.exit_code == status & 0xFF
    tampered = tampered or _distrust(controls, bool(tests) and agreed)
    return TestRun(
        tests=tests,
        collect_errors=errors,
        collected=collected,
        deselected=deselected,
        crash=crash,
        complete=agreed,
        tampered=tampered,
        status=status,
        result=result,
        coverage=coverage,
        replaced=frozenset(replaced),
        anew=anew,
        survey=survey,
        where=Where(**where),
        part=part,
        stopped=stopped,
        unmet=unmet,
    )


def _distrust(controls: Sequence[str], finished: bool) -> str:
    """What the controls of a run say against it."""
    if any(outcome in ("passed", "xpassed", "") for outcome in controls):
        return "a control that must fail was reported as passed"
    return "no control ran beside the tests" if finished and not controls else ""


def _add(tests: dict[str, TestResult], frame: Mapping[str, Any]) -> None:
    outcome = str(frame.get("o"))
    outcome = outcome if outcome in OUTCOMES else "error"
    new = TestResult(
        str(frame.get("id")),
        outcome,
        str(frame.get("msg", "")),
        float(frame.get("s", 0.0)),
        outcome not in PASSED_OVER or bool(frame.get("own")),
    )
    old = tests.get(new.id)
    if old is None or _RANK.index(new.outcome) >= _RANK.index(old.outcome):
        tests[new.id] = new


def readable_log(result: ExecResult, limit: int = LOG_BYTES) -> str:
    """Head and tail of what the run printed, at most `limit` characters."""
    text = result.stdout.text
    errors = result.stderr.text.strip()
    if errors:
        text = f"{text.rstrip()}\n{errors}\n" if text.strip() else errors + "\n"
    if len(text) <= limit:
        return text
    head, tail = limit // 4, limit - limit // 4
    return f"{text[:head]}\n[... {len(text) - limit} characters left out ...]\n{text[-tail:]}"


def error_lines(run: TestRun, limit: int = 8) -> tuple[str, ...]:
    """The distinct first lines of what went wrong, most frequent first."""
    counts: dict[str, int] = {}
    messages = [run.crash, *run.collect_errors.values()]
    messages += [t.message for t in run.tests.values() if t.outcome in ("failed", "error")]
    for message in messages:
        line = message.strip()
        if line:
            counts[line] = counts.get(line, 0) + 1
    if not counts:
        printed = [line[1:].strip() for line in run.log.splitlines() if line.startswith("E  ")]
        counts = dict.fromkeys(printed[-1:], 1)
    return tuple(sorted(counts, key=lambda line: (-counts[line], line))[:limit])


async def baseline(
    runtime: Runtime,
    layers: Sequence[str],
    mounts: Sequence[Mount],
    env: Mapping[str, str],
    facts: Mapping[str, Any],
    limits: Limits,
    files: Sequence[str] = (),
) -> tuple[Baseline, dict[str, Any]]:
    """What the tests of an untouched State say, and its facts with what that tells of them.

    `files` are those of its repository that could be imported.

    Raises:
        InvalidArgument: the spec requires a test that a fix may edit away.
        InfraError: the runtime failed, or two runs had no use for different reasons.
        DiskFull: there is no space, so that what failed may have failed for that.
        FailedPrecondition: two runs did not come to their own end for the same reason, so that
            what they said is only a part.
    """
    problems: list[str] = []
    wrote: tuple[str, ...] = ()
    fresh = partial(_box, runtime, layers, limits, mounts)
    while True:
        async with fresh() as box:
            run = await run_tests(box, replace(options_of(facts, env), where=True))
            async with fresh() as untouched:
                errors = run.collect_errors
                where, more = await completed(untouched, facts, run.where, errors, files)
            known = learned({**facts, **more}, where, files)
            if runtime.disk_is_full():
                raise no_space("no space to run the tests of a new state")
            try:
                wrote = tuple(await written(box, known))
            except ResourceExhausted as error:
                if isinstance(error, DiskFull) or error.retry_after_s is not None:
                    raise  # the service's trouble; else no run of it can be believed
        problem = _uselessness(run)
        if not problem:
            break
        problems.append(problem)
        if len(problems) == BASELINE_TRIES:
            raise _useless(problems)
    refuse_loose(known["spec"]["test"]["fail_to_pass"], known, "test.fail_to_pass")
    loose = frozenset(known["loose"])
    failing = run.ids("failed", "error") | frozenset(run.collect_errors)
    failing -= {""}  # the session itself, which nothing can turn green
    found = Baseline(
        passing=tuple(sorted(run.ids("passed") - loose)),
        failing=tuple(sorted(failing - loose)),
        collected=run.collected,
        log=run.log,
        error_lines=error_lines(run),
        seconds=round(run.result.wall_s, 3),
        replaced=tuple(sorted(run.replaced)),
        written=wrote,
        notes=tuple(known["notes"]),
    )
    return found, known


@contextlib.asynccontextmanager
async def _box(
    runtime: Runtime, layers: Sequence[str], limits: Limits, mounts: Sequence[Mount]
) -> AsyncIterator[Box]:
    box = await runtime.create(layers, limits=limits, mounts=mounts)
    try:
        yield box
    finally:
        await box.delete()


def _uselessness(run: TestRun) -> str:
    """Why a run is no yardstick, or empty: one that is only a part would be kept for good.

    A repository that ends the process by itself is as broken as one whose tests fail.
    """
    if run.result.reason not in (EndReason.EXIT, EndReason.SIGNAL):
        return f"it was ended by {run.result.reason.value}"
    return run.tampered


def _useless(problems: Sequence[str]) -> FailedPrecondition | InfraError:
    """The error after useless runs: the same end every time is the repository's own."""
    if len(set(problems)) > 1:
        return InfraError(
            f"the first runs of the tests are of no use: {'; '.join(problems)}; "
            "prepare the state again"
        )
    return FailedPrecondition(
        f"the tests of the untouched repository cannot be used: {problems[0]}, in each of "
        f"{len(problems)} runs; raise test.timeout or the limits, or leave such tests out with "
        "test.arguments"
    )


def options_of(facts: Mapping[str, Any], env: Mapping[str, str]) -> RunOptions:
    """The options that a State's recorded facts ask for."""
    test = facts["spec"]["test"]
    return RunOptions(
        arguments=tuple(test["arguments"]),
        environment={**env, **test["environment"]},
        timeout_s=float(test["timeout_s"]),
        skip=tuple(facts["protected"]),
    )
