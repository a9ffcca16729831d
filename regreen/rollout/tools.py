"""The tools of the agent over one sandbox.

- A tool never raises for what the policy did: every such failure is a short observation.
- Trouble of the platform is never an observation: it leaves as it came; so does a sandbox that is
  gone (`NotFound`), unlike a path in it (`NoSuchFile`).
- Validation sees the diff of the repository alone, in a fresh fork of the task's State; a diff
  that the service refuses is a failed validation, because the policy made it.
- Nothing privileged is read here except the pins that the mode holds.
"""

import hashlib
import posixpath
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from regreen.client.sandbox import succeeded
from regreen.common.v1 import CHANGE_KIND_DELETE, MODE_KEEP_NEW, FileChange, Mode
from regreen.dataset import v1 as pb
from regreen.rollout import past
from regreen.rollout.calls import Call
from regreen.rollout.context import Budget
from regreen.rollout.dependencies import Dependencies, ToolError
from regreen.rollout.facts import REPO, Facts
from regreen.rollout.logs import PrimaryError, analyse
from regreen.rpc.errors import (
    DiskFull,
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NoSuchFile,
    ResourceExhausted,
    SandboxLost,
)
from regreen.sandbox import v1 as sandbox_pb

if TYPE_CHECKING:
    from regreen.client.stack import Stack
    from regreen.rollout.knowledge import Knowledge

_GENERATED = ("__pycache__", ".pytest_cache", ".mypy_cache", ".git", ".hypothesis", ".tox")
_ENVIRONMENT = {"PATH": "/work/env/bin:/usr/local/bin:/usr/bin:/bin", "VIRTUAL_ENV": "/work/env"}
_LINE_CHARS = 160
_COMMANDS_KEPT = 200
_LEFT_OUT = 5
_LOG_FROM_CHARS = 1000
"""Observations that may be longer than this show the end of a failed validation's log."""

Ending = Literal["", "passed", "gave-up"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a tool answered."""

    text: str
    ok: bool = True
    ending: Ending = ""
    validation: sandbox_pb.Validation | None = None
    error: PrimaryError | None = None
    """Primary error of a failed validation."""

    @property
    def headline(self) -> str:
        """The first line."""
        return self.text.partition("\n")[0]


@dataclass(slots=True)
class Workbench:
    """A sandbox, the tools over it, and what was done with them."""

    stack: "Stack"
    task: pb.Task
    sandbox_id: str
    facts: Facts
    mode: Mode.ValueType
    budget: Budget
    knowledge: "Knowledge | None" = None
    clock: Callable[[], float] = time.monotonic
    commands: list[str] = field(default_factory=list)
    """What the agent ran, for the judge; bounded."""
    rebuilds_without_edit: int = 0
    stage_s: dict[str, float] = field(default_factory=dict)
    """Wall time by stage, in seconds."""
    last_validation: sandbox_pb.Validation | None = None
    error: PrimaryError | None = None
    """Primary error of the last validation that failed."""
    stop_early: bool = False
    """Whether validations that the agent asks for end with what decides them."""
    shown: list[str] = field(default_factory=list)
    """Items of the knowledge base that the agent was shown."""
    kept_states: list[str] = field(default_factory=list)
    """States made in this episode; deleted when it ends, unless it keeps them."""
    left_out: str = ""
    """What else than regular files the last diff found changed, and so is in no validation."""
    _validated: str = ""

    async def call(self, call: Call) -> Observation:
        """Run one call."""
        tool = _TOOLS[call.key]
        started = self.clock()
        try:
            seen = await tool(self, call)
        except ToolError as error:
            seen = Observation(f"error: {error}", ok=False)
        except (InvalidArgument, FailedPrecondition, NoSuchFile) as error:
            seen = Observation(f"error: {error}", ok=False)
        except ResourceExhausted as error:
            if isinstance(error, DiskFull) or error.retry_after_s is not None:
                raise
            seen = Observation(f"error: {error}", ok=False)
        if call.key != "validate_and_build":
            self.spend("tool", self.clock() - started)
        limit = self.budget.observation_chars
        if len(seen.text) <= limit:
            return seen
        return replace(seen, text=clip(seen.text, limit))

    def spend(self, stage: str, seconds: float) -> None:
        """Add wall time to a stage."""
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + seconds

    async def keep_state(self, trajectory_id: str) -> str:
        """Freeze the sandbox into a State; its id."""
        state = await self.stack.sandbox.snapshot_sandbox(
            self.sandbox_id, labels={"trajectory": trajectory_id}
        )
        self.kept_states.append(state.id)
        return state.id

    @property
    def held(self) -> Mapping[str, str]:
        """Pins that the mode holds."""
        if self.mode != MODE_KEEP_NEW or not self.task.culprit:
            return {}
        if self.task.kind == "build-failure":
            return {}  # build tools are in no lock; where they are held, no others are on offer
        return {self.task.culprit: self.task.culprit_version}

    @property
    def dependencies(self) -> Dependencies:
        """Dependency actions on this sandbox."""
        return Dependencies(
            self.stack, self.sandbox_id, self.facts, self.held, self.budget.tool_s * 2
        )

    async def diff(self) -> tuple[list[FileChange], str]:
        """The agent's diff of the repository, without generated files; and as unified text.

        Raises:
            ToolError: it is over the size bound, or the agent's own doing has ended the sandbox.
        """
        try:
            found = await self.stack.sandbox.diff(
                self.sandbox_id, root=REPO, base_state_id=self.task.state_id
            )
        except ResourceExhausted as error:
            if isinstance(error, DiskFull) or error.retry_after_s is not None:
                raise
            raise ToolError("the diff is too large; undo what is not needed") from error
        except FailedPrecondition as error:
            if "overrun" not in error.metadata:
                raise
            raise ToolError(str(error)) from error
        left_out = [f"{c.path} ({c.reason})" for c in found.left_out if not generated(c.path)]
        self.left_out = ", ".join(left_out[:_LEFT_OUT])
        return [change for change in found.changes if not generated(change.path)], found.unified

    async def validate(
        self,
        changes: Sequence[FileChange],
        *,
        fresh: bool = False,
        coverage: bool = False,
        seed: int = 0,
        stop_early: bool = False,
    ) -> sandbox_pb.Validation:
        """The verdict on a diff in a fresh fork of the task's State."""
        started = self.clock()
        try:
            verdict = await self.stack.sandbox.validate(
                self.task.state_id,
                changes,
                held_pins=self.held,
                coverage=coverage,
                timeout_s=self.budget.validation_s,
                skip_cache_lookup=fresh,
                seed=seed,
                stop_early=stop_early,
            )
        except InvalidArgument as error:
            if not error.field.startswith("changes"):
                raise
            verdict = sandbox_pb.Validation(
                state_id=self.task.state_id,
                outcome=sandbox_pb.VALIDATION_OUTCOME_REJECTED,
                summary=f"the diff is refused: {error}",
            )
        self.spend("validate", self.clock() - started)
        return verdict


async def _read_file(bench: Workbench, call: Call) -> Observation:
    path = _path(call.text("path"))
    start = max(1, int(call.arguments.get("start", 1)))
    found = await bench.stack.sandbox.read_file(bench.sandbox_id, path, max_bytes=1 << 20)
    if b"\0" in found.content[:4096]:
        return Observation(f"error: {call.text('path')} is a binary file", ok=False)
    lines = found.content.decode("utf-8", "replace").splitlines()
    if start > max(1, len(lines)):
        return Observation(f"error: the file has {len(lines)} lines", ok=False)
    room = bench.budget.observation_chars * 3 // 4
    shown: list[str] = []
    for line in lines[start - 1 :]:
        text = line if len(line) <= room else line[:room] + "..."
        if shown and room < len(text) + 1:
            break
        room -= len(text) + 1
        shown.append(text)
    last = start + len(shown) - 1
    head = "" if start == 1 and last >= len(lines) else f"lines {start}-{last} of {len(lines)}\n"
    return Observation(head + "\n".join(shown) if lines else "(empty file)")


async def _write_file(bench: Workbench, call: Call) -> Observation:
    path = _path(call.text("path"))
    if not path.startswith(REPO + "/"):
        return Observation("error: write only inside the repository", ok=False)
    content = call.text("content").encode()
    await bench.stack.sandbox.write_file(bench.sandbox_id, path, content)
    _remember(bench, f"write_file {path}")
    return Observation(f"wrote {len(content)} bytes to {posixpath.relpath(path, REPO)}")


async def _find_files(bench: Workbench, call: Call) -> Observation:
    found = await bench.stack.sandbox.list_files(
        bench.sandbox_id, root=REPO, glob=call.text("glob"), limit=60
    )
    paths = [f.path for f in found.files if not f.directory and not generated(f.path)]
    more = "\n..." if found.truncated else ""
    return Observation("\n".join(paths) + more if paths else "no file matches")


async def _find_text(bench: Workbench, call: Call) -> Observation:
    found = await bench.stack.sandbox.find_text(
        bench.sandbox_id, call.text("text"), root=REPO, limit=30
    )
    lines = [
        f"{m.path}:{m.line}: {m.text.strip()[:_LINE_CHARS]}"
        for m in found.matches
        if not generated(m.path)
    ]
    return Observation("\n".join(lines) if lines else "no line holds that text")


async def _run_sh(bench: Workbench, call: Call) -> Observation:
    command = call.text("cmd")
    _remember(bench, command)
    result = await bench.stack.sandbox.run(
        bench.sandbox_id,
        ["/bin/sh", "-c", command],
        environment=_ENVIRONMENT,
        cwd=REPO,
        timeout_s=bench.budget.tool_s,
        output_bytes=16 << 10,
    )
    if result.reason == sandbox_pb.END_REASON_INFRA:
        raise SandboxLost("the sandbox could not run the command")
    output = "\n".join(t for t in (_output(result.stdout), _output(result.stderr)) if t)
    if result.reason == sandbox_pb.END_REASON_EXIT:
        head = f"exit {result.exit_code}"
    else:
        head = f"stopped: {sandbox_pb.EndReason.Name(result.reason)[11:].lower()}"
    room = bench.budget.observation_chars - len(head) - 1
    return Observation(f"{head}\n{clip(output, room)}".rstrip(), ok=succeeded(result))


async def _dependency_upgrade(bench: Workbench, call: Call) -> Observation:
    version = call.text("version") if "version" in call.arguments else None
    look_at = bench.facts.to_look_at(bench.error or bench.facts.error)
    name = call.text("name") or next(iter(look_at), "")
    if not name:
        raise ToolError("name a package; the error points at none")
    _remember(bench, f"dependency_upgrade {name} {version or ''}".rstrip())
    return Observation(await bench.dependencies.upgrade(name, version))


async def _remove_dependency(bench: Workbench, call: Call) -> Observation:
    _remember(bench, f"remove_dependency {call.text('name')}")
    return Observation(await bench.dependencies.remove(call.text("name")))


async def _upgrade_gradle(bench: Workbench, call: Call) -> Observation:
    _remember(bench, f"upgrade_gradle {call.text('version')}")
    return Observation(await bench.dependencies.upgrade_gradle(call.text("version")))


async def _ask_for_help(bench: Workbench, call: Call) -> Observation:
    if bench.knowledge is None:
        return Observation("no past fixes are known")
    question = call.text("question")
    error = bench.error or bench.facts.error
    hits = await past.ask(
        bench.stack, bench.task, question, bench.facts, error=error, mode=bench.mode
    )
    bench.shown += [hit.item_id for hit in hits if hit.item_id not in bench.shown]
    return Observation("\n".join(hit.advice for hit in hits) or "no past fix is like this")


async def _validate_and_build(bench: Workbench, call: Call) -> Observation:
    try:
        changes, _ = await bench.diff()
        digest = changes_digest(changes)
        if digest == bench._validated:
            bench.rebuilds_without_edit += 1
        bench._validated = digest
        verdict = await bench.validate(changes, stop_early=bench.stop_early)
    except FailedPrecondition as error:  # of a State or a host, never of what the policy did
        raise InfraError(str(error)) from error
    bench.last_validation = verdict
    seen = describe(verdict, bench.facts)
    if bench.left_out and not seen.ending:
        told = f"not applied (a diff has regular files alone): {bench.left_out}"
        seen = replace(seen, text=f"{seen.text}\n{told}")
    bench.error = seen.error or bench.error
    room = bench.budget.observation_chars - _LOG_FROM_CHARS
    if seen.ending or room <= 0 or not verdict.log:
        return seen
    return replace(seen, text=f"{seen.text}\nend of the log:\n{verdict.log.strip()[-room:]}")


async def _give_up(bench: Workbench, call: Call) -> Observation:
    return Observation("the task ends here", ending="gave-up")


def describe(verdict: sandbox_pb.Validation, facts: Facts) -> Observation:
    """A validation as an observation: green, or counts and the primary error."""
    if verdict.outcome == sandbox_pb.VALIDATION_OUTCOME_PASSED:
        return Observation("PASSED: build and tests are green", True, "passed", verdict)
    error = analyse(verdict.log)
    if error is None and (first := next((t for t in verdict.tests if t.message), None)):
        error = analyse(f"E   {first.message}")
    outcome = sandbox_pb.ValidationOutcome.Name(verdict.outcome)[19:].lower().replace("_", " ")
    counts = ", ".join(f"{n} {name}" for name, n in sorted(verdict.counts.items()) if n)
    counts += f", stopped there with {verdict.not_run} not run" if verdict.partial else ""
    parts = [f"NOT GREEN ({outcome})" + (f": {counts}" if counts else "")]
    if verdict.outcome == sandbox_pb.VALIDATION_OUTCOME_REJECTED or error is None:
        parts.append(verdict.summary)
    else:
        parts.append(error_text(error, frames=1))
        if shown := facts.to_look_at(error):
            parts.append(f"look at: {', '.join(shown)}")
    if verdict.reverted:
        paths = ", ".join(sorted({change.path for change in verdict.reverted})[:3])
        parts.append(f"not applied (tests and configuration are restored): {paths}")
    return Observation("\n".join(filter(None, parts)), True, "", verdict, error)


def error_text(error: PrimaryError, *, frames: int, chars: int = 260) -> str:
    """An error for a prompt or an observation: type and message, then where it happened."""
    lines = [clip(error.text, chars)]
    own = [frame for frame in error.frames if frame.place != "stdlib"]
    lines += [f"at {frame.short}" for frame in reversed(own[-frames:])] if frames else []
    return "\n".join(lines)


def generated(path: str) -> bool:
    """Whether a path is a by-product that belongs in no diff."""
    parts = path.split("/")
    return any(
        part in _GENERATED or part.endswith((".egg-info", ".dist-info")) for part in parts
    ) or path.endswith((".pyc", ".pyo"))


def changes_digest(changes: Sequence[FileChange]) -> str:
    """SHA-256 over a diff, whatever the order of its files."""
    digest = hashlib.sha256()
    for change in sorted(changes, key=lambda c: c.path):
        content = b"" if change.kind == CHANGE_KIND_DELETE else change.content
        for part in (change.path.encode(), str(change.kind).encode(), content):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def clip(text: str, chars: int) -> str:
    """At most `chars` characters: the head and, a little, the tail."""
    if len(text) <= chars:
        return text
    tail = max(0, chars // 3)
    head = max(0, chars - tail - 5)
    return f"{text[:head]} ... {text[len(text) - tail :]}"[:chars]


def _path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ToolError("give a path")
    return posixpath.normpath(posixpath.join(REPO, text.strip()))


def _output(output: sandbox_pb.Output) -> str:
    tail = b" ... " + output.tail if output.tail else b""
    return (output.head + tail).decode("utf-8", "replace").strip()


def _remember(bench: Workbench, command: str) -> None:
    if len(bench.commands) < _COMMANDS_KEPT:
        bench.commands.append(command[:2000])


_TOOLS: Mapping[str, Callable[[Workbench, Call], Awaitable[Observation]]] = {
    "read_file": _read_file,
    "write_file": _write_file,
    "find_files": _find_files,
    "find_files_with_text": _find_text,
    "run_sh": _run_sh,
    "dependency_upgrade": _dependency_upgrade,
    "remove_dependency": _remove_dependency,
    "upgrade_gradle": _upgrade_gradle,
    "ask_for_help": _ask_for_help,
    "validate_and_build": _validate_and_build,
    "give_up": _give_up,
}
