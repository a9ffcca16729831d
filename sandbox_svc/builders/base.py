"""What a builder is given, what it gives back, and the interface of every builder.

- An `EnvironmentSpec` names every byte it needs by sha256; equal specs have equal digests.
- A builder runs no code of the task on the host: only inside boxes of the runtime it is given.
- What a builder returns is plain data: layers, mounts and a JSON-able description.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from sandbox_svc.backends.base import Limits, Mount, Runtime

FORMAT = 1
"""Part of every spec digest: raise it when a builder's output changes for the same spec."""

REPO = "/work/repo"
ENV = "/work/env"
HOME = "/work/home"
LOCK = "requirements.lock"
WHEELHOUSE = "/wheelhouse"
BUILDHOUSE = "/buildhouse"
TOOLS = "/opt/regreen"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a package index, named by content."""

    filename: str
    sha256: str
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Distribution:
    """One release of one package and the files of it that may be used."""

    name: str
    version: str
    files: tuple[File, ...]

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the repository's tree comes from: an archive, and another one's files over it."""

    name: str
    version: str
    archive: File
    overlay: File | None = None
    """A later release whose `overlay_paths` replace those of `archive` (release-bugfix tasks)."""
    overlay_version: str = ""
    overlay_paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TestPlan:
    """How the repository's tests are run and which of them a fix must turn green."""

    __test__ = False

    paths: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    fail_to_pass: tuple[str, ...] = ()
    timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """A complete recipe for a State; every input is pinned by hash."""

    builder: str
    source: Source
    python: str
    """Version of the interpreter of the broken State, `major.minor`."""
    pins: tuple[str, ...]
    """`name==version` of everything installed in the broken State."""
    wheelhouse: tuple[Distribution, ...]
    """Everything a fix may install; holds at least the releases named by `pins`."""
    build_tools: tuple[Distribution, ...] = ()
    """What builds the project and source-only pins; never visible to the environment."""
    pythons: tuple[str, ...] = ()
    """Interpreters that a fix may choose, `python` among them; empty means `python` only."""
    tests: TestPlan = field(default_factory=TestPlan)

    def canonical(self) -> bytes:
        """The JSON form that the digest is taken of: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """Hex sha256 that names the State this spec leads to."""
        return hashlib.sha256(b"regreen-env-%d\n" % FORMAT + self.canonical()).hexdigest()


def spec_from_json(data: bytes | str) -> EnvironmentSpec:
    """The inverse of `canonical`.

    Raises:
        InvalidArgument: a field is missing or of the wrong type.
    """
    from sandbox_svc.builders.specjson import parse_spec

    return parse_spec(data)


@dataclass(frozen=True, slots=True)
class Stage:
    """Progress of a preparation: `done` of `total` units of `stage`; `eta_s` < 0 if unknown."""

    stage: str
    done: int
    total: int
    detail: str = ""
    eta_s: float = -1.0


Progress = Callable[[Stage], None]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the broken State's own tests say; the yardstick of every validation."""

    passing: tuple[str, ...]
    failing: tuple[str, ...]
    collected: int
    log: str
    """Head and tail of the failing run, as an agent may read it."""
    error_lines: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """A built State, before it has an id."""

    layers: tuple[str, ...]
    mounts: tuple[Mount, ...]
    """Every box over these layers needs them: wheelhouse, interpreters, tools."""
    env: Mapping[str, str]
    metadata: Mapping[str, Any]
    """JSON-able: `spec`, `python`, `interpreters`, `wheelhouse`, `protected`, `baseline`..."""


class Builder(Protocol):
    """Turns specs of one ecosystem into layers."""

    name: str

    async def prepare(
        self, spec: EnvironmentSpec, runtime: Runtime, limits: Limits, progress: Progress
    ) -> Prepared:
        """Fetch, build, install, run the tests once, freeze.

        Raises:
            InvalidArgument: the spec cannot be followed.
            MissingDependency: an interpreter or a file is not here and cannot be fetched.
            InfraError: the runtime failed.
        """
        ...
