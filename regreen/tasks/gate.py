"""The admission gate: a task counts only if it is broken, fixable and stable, shown repeatedly.

- Admitted means: the broken State fails the recorded tests, a diff without effect fails, and the
  reference fix passes every required test, each in `repeats` fresh forks without a cached answer,
  some of them in another order, with another hash seed, on another date, host, user and path.
- A test whose outcome differs between runs of the same bytes is never required; a task that has no
  other test to turn green is quarantined or refused, and says what it hangs on.
- A control has attempts in place of fixes: it is admitted if none of them passes, ever.
- Trouble of the platform is raised, never turned into a verdict.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from regreen.common.v1 import common_pb2
from regreen.pkgindex import PackageIndex
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    MissingDependency,
    RegreenError,
)
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks import environment as env
from regreen.tasks.model import Fix, TaskRecord, ids_sha256
from regreen.tasks.rewrites import rewritten_files
from regreen.tasks.trial import NOOP_PATH, Trial, Unfinished
from regreen.tasks.upstream import release_files
from regreen.tasks.verdict import Check, Quarantined, Verdict, joined

__all__ = ["NOOP_PATH", "REPEATS", "SHIPPED_REPEATS", "Check", "Gate", "Quarantined", "Verdict"]

REPEATS = 3
SHIPPED_REPEATS = 5
"""Repeats of each check, and those for the set that ships."""
STEADY_ROUNDS = 3


class GateClient(Protocol):
    """What the gate needs of the sandbox service."""

    async def prepare(self, spec: pb.EnvironmentSpec) -> pb.State:
        """The state of an environment."""
        ...

    async def validate(
        self,
        state_id: str,
        changes: Sequence[common_pb2.FileChange],
        *,
        held_pins: Mapping[str, str],
        required_tests: Sequence[str],
        skip_cache_lookup: bool,
        conditions: pb.Conditions | None,
    ) -> pb.Validation:
        """The verdict on a diff."""
        ...

    async def read_files(self, state_id: str, paths: Sequence[str]) -> Mapping[str, bytes]:
        """Files of a state's repository."""
        ...


class Gate:
    """Judges tasks through a sandbox service."""

    def __init__(
        self,
        client: GateClient,
        distributions: env.Distributions,
        index: PackageIndex,
        *,
        repeats: int = REPEATS,
        learn: bool = False,
    ) -> None:
        """`learn` takes the failing tests as they are seen here, for records that are being made.

        Otherwise a task whose broken State fails other tests than recorded is refused.
        """
        if not 1 <= repeats <= 20:
            raise InvalidArgument("repeats", f"is {repeats}", "use 1 to 20")
        self.client, self.distributions, self.index = client, distributions, index
        self.repeats, self.learn = repeats, learn

    async def judge(self, task: TaskRecord, python: str = "") -> Verdict:
        """Judge one task; `python` asks for another interpreter than the record's.

        Raises:
            Unavailable, InfraError: the platform failed; try again.
        """
        try:
            check_record(task)
            spec = env.environment(task, self.distributions, python)
            began_s = time.time()
            state = await self.client.prepare(spec)
            made_anew = state.create_time.ToNanoseconds() / 1e9 >= began_s
            prepare_s = round(time.time() - began_s, 6) if made_anew else 0.0
        except MissingDependency as error:
            return _unprepared(task, error, python)
        except FailedPrecondition as error:
            return Verdict(task.id, "waiting", f"cannot be prepared here: {error}", python=python)
        except InvalidArgument as error:
            return Verdict(task.id, "rejected", f"cannot be prepared: {error}", python=python)
        trial = Trial(self, task, state, strict=not self.learn and not python)
        try:
            return replace(await trial.run(), prepare_s=prepare_s)
        except Unfinished as cut:
            reason = f"{cut}; ask again where the machine has more time"
            return Verdict(task.id, "waiting", reason, state_id=state.id, python=state.python)
        except FailedPrecondition as error:
            reason = f"cannot be validated: {error}"
            return Verdict(task.id, "rejected", reason, state_id=state.id, python=state.python)

    async def reference(
        self, task: TaskRecord, fix: Fix, state: pb.State
    ) -> list[common_pb2.FileChange]:
        """The diff of a reference fix against the broken State.

        Raises:
            InvalidArgument: the fix does not fit the State.
            Unavailable: a release to take files from cannot be fetched.
        """
        if fix.origin == "pins-restored":
            return env.restored_pins(task, state.python)
        if fix.origin == "patch":
            return env.patched_files(task, fix, state.python)
        if fix.origin == "upstream":
            if task.overlay is None:
                raise InvalidArgument("overlay", "is missing", "name the later release")
            overlay = task.overlay
            files = await release_files(self.index, task.package, overlay.sdist, overlay.fix_paths)
            return env.replaced_files(files)
        if fix.origin == "rules":
            paths = sorted({one.path for one in fix.rewrites})
            return await rewritten_files(fix, await self.client.read_files(state.id, paths))
        read = await self.client.read_files(state.id, env.edit_paths([fix]))
        return env.edited_files(fix, read)

    def quicker(self) -> "Gate":
        """The same with two repeats at most, for what was shown in full before."""
        client, releases, index = self.client, self.distributions, self.index
        return Gate(client, releases, index, repeats=min(2, self.repeats), learn=self.learn)


def check_record(task: TaskRecord) -> None:
    """Refuse a record that contradicts itself, before anything is built from it.

    Raises:
        InvalidArgument: names the field.
    """
    tests = task.tests
    twice = sorted({id for id in tests.fail_to_pass if tests.fail_to_pass.count(id) > 1})
    if twice:
        raise InvalidArgument("tests.fail_to_pass", f"names {twice[0]} twice", "name it once")
    if len(tests.fail_to_pass) > tests.fail_to_pass_count:
        count = f"is {tests.fail_to_pass_count} for {len(tests.fail_to_pass)} tests"
        raise InvalidArgument("tests.fail_to_pass_count", count, "count every test")
    whole = len(tests.fail_to_pass) == tests.fail_to_pass_count
    digest = tests.fail_to_pass_sha256
    if whole and digest not in ("", ids_sha256(tests.fail_to_pass)):
        raise InvalidArgument("tests.fail_to_pass_sha256", "is not that of fail_to_pass")
    if task.control and task.split != "test":
        raise InvalidArgument(
            "split", f"is {task.split} for a control", "use test: nobody trains on it"
        )
    fair = [mode for mode in task.modes if all(fix.mode != mode for fix in task.fixes)]
    if fair:
        raise InvalidArgument("modes", f"has {fair[0]} without a reference fix", "add one")


def _unprepared(task: TaskRecord, error: MissingDependency, python: str) -> Verdict:
    """Something is not to be had: it waits, unless what is there is something else."""
    if "sha256" in error.message:
        reason = f"cannot be rebuilt from its hashes: {error}"
        return Verdict(task.id, "rejected", reason, python=python)
    return Verdict(task.id, "waiting", str(error), python=python)


async def judge_patiently(
    gate: Gate, task: TaskRecord, python: str = "", *, deadline_s: float = 900.0
) -> Verdict:
    """`Gate.judge`, tried again after trouble of the platform until `deadline_s` is over."""
    stop = time.monotonic() + deadline_s
    while True:
        try:
            return await gate.judge(task, python)
        except RegreenError as error:
            if error.status not in ("UNAVAILABLE", "INTERNAL") or time.monotonic() > stop:
                raise


async def judge_steadily(
    gate: Gate, task: TaskRecord, python: str = "", *, deadline_s: float = 900.0
) -> tuple[TaskRecord, Verdict]:
    """Judge until no test is newly unstable; the record that names all of them, and the verdict.

    Validations leave out what the spec of a State names as unstable and nothing else, so the State
    of an admitted task must name every test that was seen to be so. A State that only names more of
    them holds the same bytes: two repeats show that it is what the first one was.

    Raises:
        Unavailable, InfraError: the platform failed; try again.
    """
    seen: Verdict | None = None
    asked = gate
    for _ in range(STEADY_ROUNDS):
        verdict = await judge_patiently(asked, task, python, deadline_s=deadline_s)
        fresh = set(verdict.flaky) - set(task.tests.unstable)
        verdict = verdict if seen is None else joined(seen, verdict)
        if not verdict.admitted or not fresh:
            return task, verdict
        names = sorted({*task.tests.unstable, *fresh})
        task = without(task, names)
        seen, asked = verdict, gate.quicker()
    reason = f"other tests are unstable in each of {STEADY_ROUNDS} rounds: {', '.join(names[:4])}"
    return task, replace(verdict, status="quarantined", reason=reason)


def without(task: TaskRecord, unstable: Sequence[str]) -> TaskRecord:
    """The record with these tests as unstable, and not among those that must turn green."""
    tests = task.tests.model_copy(update={"unstable": sorted(unstable)})
    return task.model_copy(update={"tests": tests})
