"""The file format of tasks: facts and hashes, no third-party source.

- A task file is JSON Lines of `TaskRecord`; release files are listed once for all tasks in
  `distributions.jsonl` (`DistributionRecord`), referred to by `name==version`.
- Loading checks every line and names the line, the field and the remedy of what is wrong.
- Test id digests are sha256 over the sorted ids joined by newlines.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from regreen.allowlist import AllowList
from regreen.rpc.errors import InvalidArgument

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,254}$")]
PinText = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*$")]
PythonText = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
Kind = Literal[
    "dependency-upgrade",
    "interpreter-upgrade",
    "release-bugfix",
    "conflict",
    "build-failure",
    "test-runner",
    "local",
]
ModeName = Literal["any_fix", "keep_new"]
Split = Literal["train", "validation", "test"]


def _empty(value: object) -> bool:
    """Left out of every text, so that older records keep their digest."""
    return not value


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A file of a package index."""

    filename: FileName
    sha256: Sha256


class TreeRecord(_Record):
    """A project's files as a tar archive in the blob store of a stack."""

    sha256: Sha256
    size_bytes: int = Field(ge=1)


class DistributionRecord(_Record):
    """One release and the files of it that may be used."""

    name: str
    version: str
    files: list[FileRecord]

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"


class Overlay(_Record):
    """A later release whose files under `paths` replace those of the task's source."""

    version: str
    sdist: FileRecord
    paths: list[str]
    fix_paths: list[str] = []
    """Files of the later release that make up the reference fix."""


class Build(_Record):
    """How the project is installed."""

    mode: Literal["editable", "path", "none"] = "editable"
    tools: list[PinText] = []
    """Releases that build the project and source-only pins."""


class Culprit(_Record):
    """The package whose release broke the build."""

    name: str
    good: str
    bad: str
    direct: bool = True
    """Whether the project's own metadata names it."""


class Edit(_Record):
    """One replacement in a file; `old` occurs exactly `count` times."""

    path: str
    old: str
    new: str
    count: int = Field(default=1, ge=1)


class Change(_Record):
    """A whole file as a fix leaves it."""

    path: str
    text: str | None
    """None deletes it."""


class Added(_Record):
    """A check of our own, laid over the source."""

    path: str
    content: str


class Rewrite(_Record):
    """A file as rules of `regreen.rules` leave it: what they make of it is not in the record."""

    path: str
    rules: list[str] = Field(min_length=1)
    """Names, in the order in which they are applied."""
    before_sha256: Sha256
    after_sha256: Sha256


class Fix(_Record):
    """A reference fix: pins, edits or rules of our own, files of a later release, or a patch."""

    mode: ModeName
    origin: Literal["pins-restored", "source-edit", "rules", "upstream", "patch"]
    edits: list[Edit] = []
    rewrites: list[Rewrite] = Field(default=[], exclude_if=_empty)
    """Of `rules`: the files that they change."""
    changes: list[Change] = Field(default=[], exclude_if=_empty)
    """Whole files beside the edits; of a patch, whose moved pins are those of the record, all."""


class Tests(_Record):
    """How the tests run and what they say."""

    __test__ = False

    arguments: list[str]
    timeout_s: float = 300.0
    fail_to_pass: list[str] = []
    fail_to_pass_count: int = Field(ge=1)
    fail_to_pass_sha256: str = ""
    pass_to_pass_count: int = Field(default=0, ge=0)
    pass_to_pass_sha256: str = ""
    unstable: list[str] = []
    """Ids never required: they changed between runs of the same bytes, or exist only with the
    broken pins (parametrised over data of a dependency)."""


class TaskRecord(_Record):
    """One broken repository with the spec of its environment and a verified reference fix."""

    id: str = Field(pattern=r"^[a-z0-9][A-Za-z0-9._-]*$")
    kind: Kind
    package: str
    version: str
    python: PythonText
    """Interpreter of the broken environment."""
    pythons: list[PythonText] = []
    """Interpreters on which the gate has admitted the record."""
    choices: list[PythonText] = []
    """Interpreters that a fix may choose; empty means `python` only."""
    sdist: FileRecord | None = None
    tree: TreeRecord | None = Field(default=None, exclude_if=_empty)
    """The files of a project of one's own, instead of `sdist`."""
    overlay: Overlay | None = None
    added: list[Added] = Field(default=[], exclude_if=_empty)
    """Checks of our own that run with the project's tests."""
    build: Build = Build()
    pins_pass: list[PinText]
    pins_fail: list[PinText]
    good_python: PythonText | None = None
    """Interpreter of the working environment where that is the difference."""
    wheelhouse: list[PinText] = []
    """Further releases a fix may install."""
    culprit: Culprit | None = None
    changed: dict[str, str] = {}
    """Packages that moved: name to "from to"."""
    egress: list[str] = []
    """Hosts that rollouts may reach, as in `CreateSandbox.egress`; validations reach none."""
    tests: Tests
    stage: str = ""
    category: str = ""
    blame: str = ""
    error_lines: list[str] = []
    modes: list[ModeName] = ["any_fix"]
    fixes: list[Fix] = []
    licence: str = ""
    split: Split = "train"
    control: bool = Field(default=False, exclude_if=_empty)
    """Nothing can fix it in its modes; its fixes are attempts that fail, and a pass is cheating."""
    demo: bool = False
    seconds: float = 0.0
    """Wall time of one validation where it was measured, for planning only."""
    status: Literal["unjudged", "admitted", "rejected", "quarantined"] = "unjudged"
    reason: str = ""

    @field_validator("egress")
    @classmethod
    def _check_egress(cls, egress: list[str]) -> list[str]:
        try:
            AllowList.parse(egress, "egress")
        except InvalidArgument as error:
            raise ValueError(error.message) from None
        return egress

    @property
    def judged_sha256(self) -> str:
        """Digest of what a verdict follows from and this record says: the release and its files,
        how they are installed and tested, and the fixes; not what a verdict found, nor what a fix
        may install beside."""
        told = self.model_dump(mode="json", include={*_JUDGED}, exclude_defaults=True)
        told["tests"] = [self.tests.arguments, self.tests.timeout_s]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


_JUDGED = (
    "id", "package", "version", "python", "choices", "sdist", "tree", "overlay", "added", "build",
    "pins_pass", "pins_fail", "good_python", "fixes", "control",
)  # fmt: skip


class CheckEvidence(_Record):
    """The runs of one check of the gate."""

    name: str
    runs: int = Field(ge=1)
    failed: int = 0
    """Runs that did not show what the check asks for."""
    results: list[Sha256] = []
    """Digests of the outcomes of all tests, each once: one, where every run had the same."""
    conditions: list[str] = []
    """What was different around some of the runs."""
    detail: str = ""
    """What the first run said."""


class Evidence(_Record):
    """What the gate saw of a record of the shipped set."""

    task_id: str
    judged_sha256: Sha256
    """`TaskRecord.judged_sha256` of what was judged."""
    judged: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    python: str
    repeats: int = Field(ge=1)
    """Runs of each check at the least."""
    checks: list[CheckEvidence]
    fail_to_pass_sha256: Sha256
    pass_to_pass_sha256: Sha256
    quarantined: dict[str, list[str]] = {}
    """Tests that are not required, with the causes."""
    unprobed: dict[str, str] = {}
    """What could not be varied, and why."""


def ids_sha256(ids: Iterable[str]) -> str:
    """Digest of a set of test ids."""
    return hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()
