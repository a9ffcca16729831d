"""Runs a release's tests under any set of pins, in sandboxes of the sandbox service.

- The first set makes a State; any other set is a Validation of it with another lock: the service
  installs by hash in a fork, without a network, and runs the same tests.
- A set that the State does not offer makes a new State that does; its own first run is one more
  run of the untouched tests, and what it disagrees about is never required.
- What was prepared is deleted when the laboratory closes.
"""

import platform
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from time import monotonic
from types import TracebackType
from typing import Self

from google.protobuf.duration_pb2 import Duration

from regreen.client.sandbox import SandboxClient, StateClient
from regreen.common.v1 import common_pb2
from regreen.lockfile import format_lock, lock_of
from regreen.mine.facts import Run, own_crash, stable_ids
from regreen.mine.registry import Registry
from regreen.pkgindex import usable_files
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, MissingDependency, NotFound
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.sandbox.v1 import state_service_pb2 as state_pb
from regreen.tasks import environment as env
from regreen.tasks.model import Added, FileRecord
from regreen.tasks.verify import ServiceGateClient

Pins = Mapping[str, str]
_BAD = (common_pb2.TEST_OUTCOME_FAILED, common_pb2.TEST_OUTCOME_ERROR)


class Unusable(Exception):
    """A set of pins that cannot be installed or whose tests cannot be used."""


class RunnerCrashed(Exception):
    """Our own runner of the tests raised: what a run said tells nothing of the project."""


class MiningClient(ServiceGateClient):
    """The gate's client, which remembers what it prepared so that it can be deleted."""

    def __init__(
        self,
        states: StateClient,
        sandboxes: SandboxClient,
        say: Callable[[str], None] = lambda text: None,
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`leave` is awaited before each unit of work; the wait is no time of a candidate."""
        super().__init__(states, sandboxes)
        self._prepared: list[str] = []
        self._say, self._leave = say, leave
        self.idle_s = 0.0
        """Seconds that were spent waiting for leave."""

    async def prepare(self, spec: pb.EnvironmentSpec) -> pb.State:
        """The state of an environment."""
        state = await super().prepare(spec)
        self._prepared.append(state.id)
        return state

    async def ready(self) -> None:
        """Wait for leave."""
        began = monotonic()
        if self._leave is not None:
            await self._leave()
        self.idle_s += monotonic() - began

    def prepared(self, progress: state_pb.PrepareProgress) -> None:
        """Say how far a preparation is."""
        self._say(f"{progress.stage} {progress.message}".strip())

    async def clear(self) -> None:
        """Delete every state that was prepared."""
        while self._prepared:
            try:
                await self.states.delete_state(self._prepared.pop())
            except (NotFound, FailedPrecondition):
                continue


@dataclass(frozen=True, slots=True)
class Release:
    """What is tested, and how."""

    package: str
    version: str
    sdist: FileRecord
    python: str
    tools: tuple[str, ...]
    roots: tuple[str, ...]
    mode: str = "editable"
    overlay: FileRecord | None = None
    """A later source archive whose tests are laid over."""
    timeout_s: float = 75.0
    """Seconds after which its tests are ended."""
    added: tuple[Added, ...] = ()
    """Checks of our own; their paths are among `roots`."""
    modules: tuple[str, ...] = ()
    """Modules of tests that run in place of all."""
    uploaded: date = date.min
    """The day that it is of."""

    @property
    def tested(self) -> tuple[str, ...]:
        """What the runner of the tests is given."""
        return self.modules or self.roots


@dataclass(slots=True)
class Laboratory:
    """One release under changing pins; use as an async context manager."""

    client: MiningClient
    registry: Registry
    release: Release
    passing: frozenset[str] = frozenset()
    """Ids that passed in every run of the first set."""
    unsteady: frozenset[str] = frozenset()
    """Ids that passed in one of them and not in another."""
    runs: int = 0
    _base: dict[str, str] = field(default_factory=dict)
    _state_id: str = ""
    _offered: set[str] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.client.clear()

    async def base(self, pins: Pins) -> Run:
        """Prepare the set that should work; its first run.

        Raises:
            Unusable: it cannot be installed, or its tests did not end.
        """
        self._base, self._offered = dict(pins), set()
        run = await self._prepare()
        self.passing = stable_ids(run.passed)
        return run

    async def offer(self, sets: Iterable[Pins]) -> None:
        """Make sure that sets of pins can be tried."""
        wanted = {f"{n}=={v}" for pins in sets for n, v in pins.items()}
        if wanted <= self._offered:
            return
        self._offered |= wanted
        run = await self._prepare()
        self.unsteady |= stable_ids(self.passing ^ stable_ids(run.passed))
        self.passing &= run.passed

    async def attempt(self, pins: Pins, files: Mapping[str, bytes] | None = None) -> Run:
        """Run the tests under a set of pins, with other contents of some files.

        Raises:
            Unusable: it cannot be installed, or the tests did not end.
        """
        await self.offer([pins])
        lock = format_lock(lock_of([f"{n}=={v}" for n, v in pins.items()], self.release.python))
        return await self.attempt_files({**(files or {}), env.LOCK: lock.encode()})

    async def attempt_files(self, files: Mapping[str, bytes]) -> Run:
        """Run the tests with other contents of some files; raises as `attempt`."""
        self.runs += 1
        try:
            found = await self.client.validate(
                self._state_id,
                env.replaced_files(files),
                held_pins={},
                required_tests=(),
                skip_cache_lookup=True,
            )
        except (InvalidArgument, FailedPrecondition) as error:
            raise Unusable(str(error)) from error
        if found.outcome in (pb.VALIDATION_OUTCOME_REJECTED, pb.VALIDATION_OUTCOME_TIMEOUT):
            raise Unusable(found.summary)
        if not found.lasting:
            raise Unusable(found.summary)
        return _usable(_run_of(found))

    async def _prepare(self) -> Run:
        release = self.release
        spec = pb.EnvironmentSpec(
            builder="python",
            package=release.package,
            version=release.version,
            source=pb.DistFile(filename=release.sdist.filename, sha256=release.sdist.sha256),
            python=release.python,
            install_mode=release.mode,
        )
        if release.overlay is not None:
            later = release.overlay
            spec.overlay_source.CopyFrom(pb.DistFile(filename=later.filename, sha256=later.sha256))
            spec.overlay_paths.extend(release.roots)
        spec.overlay.extend(env.added_files(release.added))
        base = [f"{n}=={v}" for n, v in sorted(self._base.items())]
        spec.pins.extend(await self._pins(base, must=True))
        spec.wheelhouse.extend(await self._pins(sorted(self._offered - set(base))))
        spec.build_pins.extend(await self._pins(release.tools))
        timeout = Duration()
        timeout.FromNanoseconds(int(release.timeout_s * 1e9))
        spec.test.CopyFrom(
            pb.TestSpec(
                arguments=release.tested,
                timeout=timeout,
                protected_paths=env.further_tests(release.tested, release.roots),
            )
        )
        self._offered |= set(base)
        try:
            state = await self.client.prepare(spec)
        except (InvalidArgument, FailedPrecondition, MissingDependency, NotFound) as error:
            raise Unusable(str(error)) from error
        self._state_id = state.id
        self.runs += 1
        known = state.baseline
        passed, failed = frozenset(known.passing), frozenset(known.failing)
        seconds = known.duration.ToTimedelta().total_seconds()
        return _usable(Run(passed, failed, passed | failed, known.log, seconds))

    async def _pins(self, pins: Sequence[str], *, must: bool = False) -> list[pb.Pin]:
        found = []
        for pin in pins:
            name, _, version = pin.partition("==")
            try:
                every = await self.registry.files(name)
            except NotFound:
                every = []
            machine = platform.machine()
            files = usable_files(every, version, [self.release.python], [machine])
            chosen = [pb.DistFile(filename=f.filename, sha256=f.sha256) for f in files if f.sha256]
            if chosen:
                found.append(pb.Pin(name=name, version=version, files=chosen))
            elif must:
                raise Unusable(f"{pin} has no file that can be used")
        return found


def _usable(run: Run) -> Run:
    """What is our own fault is no break of the project."""
    if error := own_crash(run.log):
        raise RunnerCrashed(error[:300])
    return run


def _run_of(found: pb.Validation) -> Run:
    tests = {t.id: t for t in found.tests if t.outcome != common_pb2.TEST_OUTCOME_MISSING}
    passed = frozenset(i for i, t in tests.items() if t.outcome == common_pb2.TEST_OUTCOME_PASSED)
    failed = frozenset(i for i, t in tests.items() if t.outcome in _BAD)
    log = found.log if tests else f"{found.log}\nError: {found.summary}"
    return Run(
        passed, failed, frozenset(tests), log, found.duration.ToTimedelta().total_seconds(),
        messages={i: t.message for i, t in tests.items() if t.outcome in _BAD},
    )  # fmt: skip
