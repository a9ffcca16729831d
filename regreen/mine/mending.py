"""Looks for a source fix among the migration rules, and for the least of it that still holds.

- Rules are asked for by what moved: the culprit, and the packages that had to move with it.
- Nothing is run unless a rule changes a file of the project's source. Tests are never touched: the
  validator restores them, so that a fix of a test is no fix.
- Where a failure points at what no source of the project mends, rules are tried only if the log
  speaks of what one of them is about.
- Everything that rules change is tried at once. If that passes, each rule and then each file is
  left out in turn, and stays out where the tests pass without it.
"""

import io
import re
import tarfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from regreen.mine.facts import Run, stable_ids
from regreen.rules.apart import Wanted, rewrite
from regreen.rules.rule import MAX_BYTES, Moved, Rule, fitting, library
from regreen.tasks.model import Fix, Rewrite, TaskRecord
from regreen.tasks.rewrites import sha256

MAX_FILES, MAX_TRIES = 80, 16
HOPELESS = frozenset({"third-party", "test-runner"})
"""Where a failure points if no source of the project can mend it."""
_ASIDE = re.compile(
    r"(?:^|/)(?:tests?|testing|docs?|examples?|benchmarks?|build|\.[^/]+)/|"
    r"(?:^|/)(?:conftest|setup|noxfile|fabfile|tasks)\.py$|(?:^|/)test_[^/]*\.py$|_test\.py$"
)
Passes = Callable[[Mapping[str, bytes]], Awaitable[bool]]
"""Whether every test that must pass does so with these contents of files."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What came of the search."""

    fix: Fix | None
    said: str
    tries: int = 0


def moved_of(task: TaskRecord) -> Moved:
    """What moved between the working and the broken environment."""
    moved: dict[str, tuple[str, str]] = {}
    for name, text in task.changed.items():
        good, _, bad = text.partition(" ")
        moved[name] = (good, bad)
    if task.culprit is not None:
        moved[task.culprit.name] = (task.culprit.good, task.culprit.bad)
    return moved


def source_texts(archive: bytes, roots: Sequence[str]) -> dict[str, str]:
    """Texts of a source archive's modules, without tests and what is beside the project."""
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if not path.endswith(".py") or not member.isfile() or member.size > MAX_BYTES:
                continue
            if _ASIDE.search(path) or any(path == r or path.startswith(f"{r}/") for r in roots):
                continue
            stream = tar.extractfile(member)
            content = stream.read() if stream is not None else b""
            try:
                found[path] = content.decode("utf-8")
            except UnicodeDecodeError:
                continue
    return found


async def mended(
    texts: Mapping[str, str], moved: Moved, passes: Passes, *, blame: str = "", log: str = ""
) -> Mended:
    """A fix of mode `keep_new` by rules that fit these moves, if one passes."""
    rules = fitting(library(), moved)
    if blame in HOPELESS and not any(rule.signed(log) for rule in rules):
        return Mended(None, f"blame is {blame}")
    if not rules:
        return Mended(None, "no rule fits what moved")
    search = _Search(texts, passes)
    said = "no rule changes a file"
    for chosen in _choices(rules):
        plan = await search.plan(chosen)
        if not plan or plan in search.refused:
            continue
        if await search.holds(plan):
            plan = await search.least(plan)
            fix = Fix(mode="keep_new", origin="rules", rewrites=await search.record(plan))
            names = sorted({name for rules in plan.values() for name in rules})
            return Mended(fix, f"{', '.join(names)} in {len(plan)} files", search.tries)
        said = f"not enough: {', '.join(sorted({n for rs in plan.values() for n in rs}))}"
    return Mended(None, said, search.tries)


def _choices(rules: Sequence[Rule]) -> list[list[str]]:
    """All rules, then those that do not rewrite a file as a whole."""
    every = [rule.name for rule in rules]
    narrow = [rule.name for rule in rules if not rule.sweeping]
    return [every] if narrow == every else [every, narrow]


Plan = dict[str, tuple[str, ...]]
"""For each file the rules that are applied to it."""


class _Search:
    """The search in one project."""

    def __init__(self, texts: Mapping[str, str], passes: Passes) -> None:
        self.texts, self.passes = texts, passes
        self.tries = 0
        self.refused: list[Plan] = []

    async def plan(self, names: Sequence[str]) -> Plan:
        """Which of these rules change which files; nothing where that is too much."""
        rules = [rule for rule in library() if rule.name in names]
        signed = {p: t for p, t in self.texts.items() if any(rule.signed(t) for rule in rules)}
        if len(signed) > MAX_FILES:
            return {}
        found = await rewrite({path: Wanted(text, names) for path, text in signed.items()})
        return {path: one.rules for path, one in sorted(found.items()) if one.rules}

    async def holds(self, plan: Plan) -> bool:
        """Whether the tests pass with what a plan makes."""
        self.tries += 1
        if await self.passes(await self._contents(plan)):
            return True
        self.refused.append(plan)
        return False

    async def least(self, plan: Plan) -> Plan:
        """The plan without what it can do without, as far as tries are left."""
        names = list(dict.fromkeys(name for rules in plan.values() for name in rules))
        for name in names if len(names) > 1 else ():
            less = {p: tuple(r for r in rules if r != name) for p, rules in plan.items()}
            plan = await self._less(plan, less)
        units = [(path, name) for path, rules in plan.items() for name in rules]
        for path, name in units if len(units) > 1 else ():
            less = {p: tuple(r for r in rs if (p, r) != (path, name)) for p, rs in plan.items()}
            plan = await self._less(plan, less)
        return plan

    async def _less(self, plan: Plan, less: Plan) -> Plan:
        less = {path: rules for path, rules in less.items() if rules}
        if not less or less in self.refused or self.tries >= MAX_TRIES:
            return plan
        return less if await self.holds(less) else plan

    async def _contents(self, plan: Plan) -> dict[str, bytes]:
        found = await rewrite({p: Wanted(self.texts[p], rules) for p, rules in plan.items()})
        return {path: one.text.encode() for path, one in found.items()}

    async def record(self, plan: Plan) -> list[Rewrite]:
        """What a record holds of a plan."""
        contents = await self._contents(plan)
        return [
            Rewrite(
                path=path,
                rules=list(rules),
                before_sha256=sha256(self.texts[path].encode()),
                after_sha256=sha256(contents[path]),
            )
            for path, rules in sorted(plan.items())
        ]


def restores(run: Run, wanted: frozenset[str]) -> bool:
    """Whether a run passes everything that it must."""
    return stable_ids(wanted) <= run.passed
