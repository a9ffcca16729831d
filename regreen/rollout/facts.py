"""What a developer sees of a broken repository before touching it.

- Gathered from inside a sandbox of the task's State and from the log of the broken build; nothing
  comes from the task's fix, culprit, moves or good versions.
- Gathered once per State, log and process: members of a group see the same facts, and tasks that
  share a State each see their own log.
- A sandbox that dies meanwhile raises; facts that were cut short would mislead every later rollout.
"""

import asyncio
import contextlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from regreen.dataset import v1 as pb
from regreen.lockfile import Lock, normalize, parse_lock
from regreen.rollout.logs import PrimaryError, analyse, suspects
from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    NoSuchFile,
    SandboxLost,
)
from regreen.sandbox import v1 as sandbox_pb

if TYPE_CHECKING:
    from regreen.client.stack import Stack

REPO = "/work/repo"
LOCK = f"{REPO}/requirements.lock"
PYTHON = "/work/env/bin/python"
INDEX = "/wheelhouse/index.json"
_PROBE_S = 30.0
_MOST_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Facts:
    """The visible facts of one State."""

    package: str
    version: str
    python: str
    log: str
    """End of the log of the broken build."""
    error: PrimaryError | None
    declared: tuple[str, ...] = ()
    """Requirements that the project declares."""
    lock: Lock = field(default_factory=lambda: Lock({}))
    """What is installed."""
    offered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Versions that the offline wheelhouse offers, oldest first, by normalised name."""
    pythons: tuple[str, ...] = ()
    """Interpreters that may be chosen."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Top-level module to package, where the names differ."""

    def suspects(self, error: PrimaryError | None) -> tuple[str, ...]:
        """Installed packages that an error points at, most likely first."""
        return suspects(error, self.lock.pins, self.modules) if error else ()

    def to_look_at(self, error: PrimaryError | None) -> tuple[str, ...]:
        """What a reader can act on: up to three packages that have other versions on offer.

        Those that the error points at; where it points at none, the declared dependencies.
        """
        named = [name for name in self.suspects(error) if name in self.offered]
        declared = [name for name in self.direct if name in self.offered]
        return tuple((named or declared)[:3])

    @property
    def direct(self) -> tuple[str, ...]:
        """Names of the declared dependencies, normalised."""
        from packaging.requirements import InvalidRequirement, Requirement

        names: dict[str, None] = {}
        for text in self.declared:
            with contextlib.suppress(InvalidRequirement):
                names.setdefault(normalize(Requirement(text).name))
        return tuple(names)


_Key = tuple[str, str]


def _key(task: pb.Task) -> _Key:
    return task.state_id, task.error_log


class FactsCache:
    """Facts by State and log; concurrent askers of the same share one gathering."""

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._found: OrderedDict[_Key, Facts] = OrderedDict()
        self._locks: dict[_Key, asyncio.Lock] = {}

    async def get(self, stack: "Stack", task: pb.Task, sandbox_id: str) -> Facts:
        """Facts of the task's State, gathered in `sandbox_id` when not known yet.

        Raises:
            FailedPrecondition: the task was not prepared here.
            RegreenError: the sandbox, or its service, went away.
        """
        if not task.state_id:
            raise FailedPrecondition(
                f"task {task.id} has no state here; run `regreen tasks verify {task.id}`"
            )
        key = _key(task)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            facts = self._found.get(key)
            if facts is None:
                facts = await gather(stack, task, sandbox_id)
                self._found[key] = facts
            self._found.move_to_end(key)
            while len(self._found) > self._size:
                self._locks.pop(self._found.popitem(last=False)[0], None)
        return facts

    def peek(self, task: pb.Task) -> Facts | None:
        """Facts if they are known already."""
        return self._found.get(_key(task))


async def gather(stack: "Stack", task: pb.Task, sandbox_id: str) -> Facts:
    """Read the visible facts of an untouched sandbox."""
    environment = task.environment
    log = task.error_log or (await stack.state.get_state(task.state_id)).baseline.log
    declared, modules = await _probe(stack, environment.package, sandbox_id)
    return Facts(
        package=environment.package,
        version=environment.version,
        python=environment.python,
        log=log,
        error=analyse(log),
        declared=declared,
        lock=await _lock(stack, sandbox_id),
        offered=await _offered(stack, sandbox_id),
        pythons=tuple(environment.pythons) or (environment.python,),
        modules=modules,
    )


def sorted_versions(versions: Mapping[str, object] | tuple[str, ...]) -> tuple[str, ...]:
    """Versions oldest first (PEP 440); texts that are no version are left out."""
    valid: list[tuple[Version, str]] = []
    for text in versions:
        with contextlib.suppress(InvalidVersion):
            valid.append((Version(text), text))
    return tuple(text for _, text in sorted(valid))


async def _probe(
    stack: "Stack", package: str, sandbox_id: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    code = (resources.files(__package__) / "probe.py").read_text("utf-8")
    result = await stack.sandbox.run(
        sandbox_id,
        [PYTHON, "-I", "-S", "-c", code, package],
        timeout_s=_PROBE_S,
        output_bytes=1 << 20,
    )
    if result.reason != sandbox_pb.END_REASON_EXIT:
        how = sandbox_pb.EndReason.Name(result.reason)[11:].lower()
        lost = result.reason == sandbox_pb.END_REASON_INFRA
        raise (SandboxLost if lost else InfraError)(
            f"sandbox {sandbox_id} could not be looked at ({how})"
        )
    try:
        found = json.loads(result.stdout.head + result.stdout.tail)
        declared = tuple(str(item)[:200] for item in found["requires"])
        modules = {str(k): normalize(str(v)) for k, v in found["modules"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return (), {}  # the environment does not even start: the log alone has to do
    return declared, modules


async def _lock(stack: "Stack", sandbox_id: str) -> Lock:
    try:
        found = await stack.sandbox.read_file(sandbox_id, LOCK, max_bytes=_MOST_BYTES)
        return parse_lock(found.content)
    except (NoSuchFile, InvalidArgument):
        return Lock({})


async def _offered(stack: "Stack", sandbox_id: str) -> dict[str, tuple[str, ...]]:
    try:
        found = await stack.sandbox.read_file(sandbox_id, INDEX, max_bytes=_MOST_BYTES)
        index = json.loads(found.content)
        return {normalize(name): sorted_versions(versions) for name, versions in index.items()}
    except (NoSuchFile, InvalidArgument, ValueError, AttributeError):
        return {}
