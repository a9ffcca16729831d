"""What a builder is given, what it gives back, and the interface of every builder.

- An `EnvironmentSpec` names every byte it needs by sha256; equal specs have equal digests.
- A builder runs no code of the task on the host: only inside boxes of the runtime it is given.
- What a builder returns is plain data: layers, mounts and a JSON-able description.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from regreen.rpc.errors import InfraError, InvalidArgument, NoSuchFile
from sandbox_svc.backends.base import Box, Command, EndReason, Limits, Mount, Runtime
from sandbox_svc.fetches import Fetches

FORMAT = 4
"""Part of every spec digest: raise it when a builder's output changes for the same spec."""

RUNNER = 11
"""Version of the test runner that a State holds; only its own validator can read it."""

REPO = "/work/repo"
ENV = "/work/env"
HOME = "/work/home"
LOCK = "requirements.lock"
WHEELHOUSE = "/wheelhouse"
BUILDHOUSE = "/buildhouse"
TOOLS = "/opt/regreen"


_PATH_CHARS = 4000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,254}")


def check_sha256(sha256: str, field_name: str = "sha256") -> None:
    """Refuse what is no digest: it becomes part of a path of this host.

    Raises:
        InvalidArgument: it is not 64 lower-case hex digits.
    """
    if not _SHA256.fullmatch(sha256):
        raise InvalidArgument(
            field_name, f"{sha256[:80]!r} is no digest", "give 64 lower-case hex digits"
        )


def check_filename(filename: str, field_name: str = "filename") -> None:
    """Refuse a file name that could leave its directory.

    Raises:
        InvalidArgument: it is not the plain name of a release file.
    """
    if not _FILENAME.fullmatch(filename):
        raise InvalidArgument(
            field_name, f"{filename[:80]!r} is no file name", "use letters, digits and . _ + ! -"
        )


@dataclass(frozen=True, slots=True)
class DistFile:
    """A release file of a package, named by content; no other name can be made."""

    filename: str
    sha256: str

    def __post_init__(self) -> None:
        check_filename(self.filename)
        check_sha256(self.sha256)


@dataclass(frozen=True, slots=True)
class Pin:
    """One exact version of one package and the files that may provide it."""

    name: str
    version: str
    files: tuple[DistFile, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True)
class FileChange:
    """One changed regular file; `content` None deletes it."""

    path: str
    content: bytes | None
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class TestSpec:
    """How the repository's tests are run and which of them a fix must turn green."""

    __test__ = False

    arguments: tuple[str, ...] = ()
    """Arguments for pytest: paths and options."""
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 300.0
    protected_paths: tuple[str, ...] = ()
    fail_to_pass: tuple[str, ...] = ()
    """Ids that must pass after a fix; empty means every failing id of the baseline."""
    unstable: tuple[str, ...] = ()
    """Ids seen to change between runs of the same bytes; never required."""


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """A complete recipe for a State; every input is pinned by hash."""

    builder: str
    package: str
    version: str
    python: str
    """Interpreter of the broken State, `major.minor`."""
    source: DistFile | None = None
    source_tree: str = ""
    """Hex sha256 of a tar archive in the blob store, instead of `source`."""
    source_tree_bytes: int = 0
    pins: tuple[Pin, ...] = ()
    """Everything installed in the broken State."""
    wheelhouse: tuple[Pin, ...] = ()
    """Further releases that a fix may install."""
    install_mode: str = "editable"
    """`editable`: in place; `path`: the repository root is on the path; `none`."""
    build_pins: tuple[Pin, ...] = ()
    """What builds the project and source-only pins; never visible to the environment."""
    test: TestSpec = field(default_factory=TestSpec)
    overlay: tuple[FileChange, ...] = ()
    overlay_source: DistFile | None = None
    """An archive whose files under `overlay_paths` replace those of `source`."""
    overlay_paths: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ()
    """Interpreters that a fix may choose, `python` among them; empty means `python` only."""
    egress: tuple[str, ...] = ()
    """Hosts that rollouts may reach; preparations and validations have no network all the same."""

    def canonical(self) -> bytes:
        """The JSON form that the digest is taken of: sorted keys, no spaces."""
        fields = asdict(self)
        if not self.egress:  # States prepared before there was the field keep their ids
            del fields["egress"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=_hex).encode()

    @property
    def digest(self) -> str:
        """Hex sha256 that names the State this spec leads to."""
        return hashlib.sha256(b"regreen-env-%d\n" % FORMAT + self.canonical()).hexdigest()

    @property
    def installation(self) -> bytes:
        """What the files of the State follow from: not what else is on offer or which tests run.

        Specs that have this alike begin on the same layers.
        """
        fields = json.loads(self.canonical())
        return json.dumps({k: v for k, v in fields.items() if k not in _AFTER}).encode()

    @property
    def allowed_pythons(self) -> tuple[str, ...]:
        return self.pythons or (self.python,)


_AFTER = frozenset(("wheelhouse", "test", "egress"))
"""Fields of a spec that leave no trace in the files of its State."""


def _hex(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(type(value).__name__)


def check_overlay(spec: EnvironmentSpec) -> None:
    """Refuse overlay paths that leave the repository.

    Raises:
        InvalidArgument: names the path.
    """
    for number, change in enumerate(spec.overlay):
        parts = change.path.split("/")
        odd = not parts[-1] or "\0" in change.path or len(change.path) > _PATH_CHARS
        if odd or change.path.startswith("/") or ".." in parts:
            raise InvalidArgument(
                f"spec.overlay[{number}].path",
                f"{change.path[:120]!r} is no path in the repository",
                "give a relative one of at most 4000 characters, without NUL",
            )


async def lay_over(box: Box, number: int, change: FileChange) -> None:
    """Write, or delete, the overlay's file of this number.

    Raises:
        InvalidArgument: something is in its way, it is too large, or what is to be deleted is no
            file; names it in the request.
    """
    if change.content is None:
        await _delete(box, number, change.path)
        return
    field, clear = f"spec.overlay[{number}]", "leave one of the two out, or name another path"
    try:
        await box.write_file(f"{REPO}/{change.path}", change.content, change.mode)
    except NoSuchFile:
        problem = f"{change.path[:120]!r} has a file where it needs a folder"
        raise InvalidArgument(f"{field}.path", problem, clear) from None
    except InvalidArgument as error:
        remedy = clear if error.field == "path" else error.remedy
        raise InvalidArgument(f"{field}.{error.field}", error.problem, remedy) from None


async def _delete(box: Box, number: int, path: str) -> None:
    done = await box.run(Command(("rm", "-f", "--", f"{REPO}/{path}"), cwd="/"))
    if done.reason is not EndReason.EXIT:
        raise InfraError(f"cannot delete {path[:120]!r} of the overlay: ended by {done.reason}")
    if not done.ok:
        raise InvalidArgument(
            f"spec.overlay[{number}].path",
            f"{path[:120]!r} cannot be deleted ({done.stderr.text.strip()[-200:]})",
            "name a file",
        )


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
    replaced: tuple[str, ...] = ()
    """Functions of the test runner that the untouched repository or its plugins replace."""
    written: tuple[str, ...] = ()
    """Files that decide a verdict and that the untouched repository's tests write over."""
    notes: tuple[str, ...] = ()
    """What is not taken from the repository, or not known of it, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A built State, before it has an id."""

    layers: tuple[str, ...]
    mounts: tuple[Mount, ...]
    """Every box over these layers needs them: wheelhouse, interpreters, tools."""
    env: Mapping[str, str]
    metadata: Mapping[str, Any]
    """JSON-able: `spec`, `python`, `interpreters`, `wheelhouse`, `protected`, `baseline`..."""
    installation: str = ""
    """A digest of what the layers' files follow from; empty where no other State may use them."""


Installed = Callable[[str], tuple[str, ...]]
"""The layers of a State that is there with the installation of a digest; empty if there is none.

They stay at least until the preparation that asks has ended.
"""


def nothing_installed(digest: str) -> tuple[str, ...]:
    """For preparations that begin with nothing."""
    return ()


class Builder(Protocol):
    """Turns specs of one ecosystem into layers."""

    name: str

    async def prepare(
        self,
        spec: EnvironmentSpec,
        runtime: Runtime,
        limits: Limits,
        progress: Progress,
        fetches: Fetches | None = None,
        installed: Installed = nothing_installed,
    ) -> Prepared:
        """Fetch, build, install, run the tests once, freeze; `fetches` sees to what is fetched.

        What is installed already is not installed again; the tests run all the same.

        Raises:
            InvalidArgument: the spec cannot be followed.
            MissingDependency: an interpreter or a file is not here and cannot be fetched.
            InfraError: the runtime failed.
        """
        ...
