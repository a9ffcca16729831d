"""The mining run: workers that take candidates, mine, complete, gate and keep.

- One bad candidate costs itself only: what it did is kept with its reason.
- A record is completed with hashes and a wheelhouse, then judged by the admission gate; the offer
  of further releases is left out of the judged State, since no check installs from it.
- While `pause_file` exists, nothing new is begun: no candidate, no State, no validation.
- A run ends when there is nothing left, at its limits, when the budget of requests is spent, or
  when one candidate after the other fails for trouble of the platform.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from regreen.client.sandbox import SandboxClient, StateClient
from regreen.lockfile import normalize
from regreen.mine.bugfix import KIND, BugfixMiner
from regreen.mine.candidate import Found, Past, Rejected
from regreen.mine.culprits import Candidate
from regreen.mine.debian import DebianRegistry
from regreen.mine.kinds import MORE_KINDS
from regreen.mine.lab import MiningClient
from regreen.mine.miner import MAX_BASE_S, Miner
from regreen.mine.registry import Registry
from regreen.mine.resolve import Resolver
from regreen.mine.store import Journal, Outcome
from regreen.mine.upgrade import UpgradeMiner
from regreen.pkgindex import find_uv, index_urls
from regreen.rpc.errors import ResourceExhausted
from regreen.tasks.evidence import evidence_of, fitting
from regreen.tasks.gate import Gate, judge_steadily
from regreen.tasks.jsonl import parse_lines, write_lines
from regreen.tasks.model import DistributionRecord, Evidence, TaskRecord
from regreen.tasks.pin import Pinner, complete
from regreen.tasks.verdict import Verdict, of_fields
from regreen.tasks.verify import refreshed

KEPT_IDS = 300
"""Longer lists of fail-to-pass ids are kept as their digest and the first of them."""
CACHE_BYTES = 6 << 30
_PAUSE_S = 5.0
_TROUBLES = 4
"""Candidates in a row that the platform may fail."""
Say = Callable[[str, str], None]
"""Called with a candidate's key and what is being done."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a run ends, and how much it does at a time."""

    limit: int = 0
    """Candidates; 0: no bound."""
    hours: float = 0.0
    """0: no bound."""
    workers: int = 1
    requests: int = 5_000
    repeats: int = 2
    """Runs of each check of the gate."""
    pause_file: Path | None = None
    suite_s: float = MAX_BASE_S
    """Releases whose tests take longer are not mined."""


class Mine:
    """One run over a journal; use `run` once."""

    def __init__(
        self,
        states: StateClient,
        sandboxes: SandboxClient,
        journal: Journal,
        folder: Path,
        bounds: Bounds,
        *,
        urls: Sequence[str] = (),
        names: Iterable[str] = (),
        breaks: Mapping[str, Iterable[str]] | None = None,
        shipped: Iterable[TaskRecord] = (),
        debian: bool = False,
        say: Say = lambda key, text: None,
    ) -> None:
        self._states, self._sandboxes, self._journal = states, sandboxes, journal
        self._folder, self._bounds, self._say = folder, bounds, say
        self._names = frozenset(names)
        self._breaks = {name: set(found) for name, found in (breaks or {}).items()}
        self._shipped: dict[str, set[tuple[str, str]]] = {}
        for task in shipped:
            if task.culprit:
                found = self._shipped.setdefault(normalize(task.package), set())
                found.add((task.culprit.name, task.culprit.bad))
        self._registry: type[Registry] = DebianRegistry if debian else Registry
        self._urls = tuple(urls) or index_urls()
        self._began, self._taken, self._busy_s = time.time(), 0, 0.0
        self._stop, self._troubles = "", 0
        self._cleaning = asyncio.Lock()

    async def run(self, kinds: Sequence[str], keys: Sequence[str] = ()) -> str:
        """Mine until there is nothing left or a bound is reached; why it ended."""
        self._journal.recover()
        os.environ["UV_CACHE_DIR"] = str(self._folder / "cache")
        found = (await self._sandboxes.get_capabilities()).interpreters
        folder = self._folder / "registry"
        registry = self._registry(self._urls, folder, budget=self._bounds.requests)
        async with registry:
            # All have ended before what they use is closed, also where one fails or all are
            # stopped: else a stop would be noted as a failure of what was in work.
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self._bounds.workers):
                        workers.create_task(self._worker(registry, sorted(found), kinds, keys))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from errors
        return self._stop or "nothing is left"

    async def _worker(
        self,
        registry: Registry,
        interpreters: Sequence[str],
        kinds: Sequence[str],
        keys: Sequence[str],
    ) -> None:
        uv = find_uv()
        resolver = Resolver(uv, self._urls[0], self._folder / "cache", registry)
        client = MiningClient(self._states, self._sandboxes, leave=self.paused)
        pinner = Pinner(registry, uv)
        given = (
            client, registry, resolver, pinner, interpreters, self._names, self._breaks,
            self._bounds.suite_s,
        )  # fmt: skip
        miners: dict[str, UpgradeMiner | BugfixMiner] = {
            "dependency-upgrade": UpgradeMiner(*given),
            KIND: BugfixMiner(*given),
            **{kind: miner(*given) for kind, miner in MORE_KINDS.items()},
        }
        while await self._may_go_on():
            candidate = self._journal.take(kinds, keys)
            if candidate is None:
                return
            self._taken += 1
            began = time.monotonic() - client.idle_s
            outcome = await self._one(miners[candidate.kind], candidate, registry)
            self._busy_s += time.monotonic() - client.idle_s - began
            self._journal.decide(candidate, outcome)
            self._heed(candidate, outcome)
            self._journal.note_spent(
                self._began, time.time() - self._began, self._busy_s, registry.asked
            )
            self._say(candidate.key, f"{outcome.status}: {outcome.reason} {outcome.detail}"[:300])
            await self._clean_cache()

    def _heed(self, candidate: Candidate, outcome: Outcome) -> None:
        self._troubles = self._troubles + 1 if outcome.status == "failed" else 0
        if self._troubles >= _TROUBLES:
            self._stop = f"{_TROUBLES} candidates in a row failed: {outcome.detail[:200]}"

    async def paused(self) -> None:
        """Wait while the file of pauses is there."""
        file = self._bounds.pause_file
        while file is not None and file.exists():  # noqa: ASYNC110
            await asyncio.sleep(_PAUSE_S)  # a file tells nobody that it went

    async def _may_go_on(self) -> bool:
        bounds = self._bounds
        await self.paused()
        if bounds.limit and self._taken >= bounds.limit:
            self._stop = f"{bounds.limit} candidates were taken"
        if bounds.hours and time.time() - self._began > bounds.hours * 3600:
            self._stop = f"{bounds.hours:g} hours are over"
        return not self._stop

    async def _one(
        self, miner: UpgradeMiner | BugfixMiner, candidate: Candidate, registry: Registry
    ) -> Outcome:
        try:
            known = self._journal.breaks_of(candidate)
            known |= self._shipped.get(normalize(candidate.package), set())
            past = Past(self._journal.versions_of(candidate), known)
            for name, found in self._journal.breaking().items():
                self._breaks.setdefault(name, set()).update(found)
            miner.begin(lambda stage: self._say(candidate.key, f"at {stage}"))
            breaks = await miner.mine(candidate, past)
            kept = [await self._gate(miner, candidate, one, registry) for one in breaks]
        except Rejected as error:
            return self._ended(miner, "rejected", error.reason, error.detail, error.stage)
        except ResourceExhausted as error:
            self._stop = error.message
            return self._ended(miner, "waiting", "budget", error.message)
        except Exception as error:  # noqa: BLE001 - a strange archive costs itself, not the run
            return self._ended(miner, "failed", type(error).__name__, str(error)[-600:])
        finally:
            await miner.client.clear()
        admitted = [task.id for task in kept if task.status == "admitted"]
        status = "mined" if admitted else "rejected"
        reason = f"{len(admitted)} of {len(kept)} admitted" if kept else "no break"
        detail = "; ".join([*(f"{t.id} {t.status} {t.reason}" for t in kept), *miner.notes])
        return self._ended(miner, status, reason, detail, "gate")

    def _ended(
        self, miner: Miner, status: str, reason: str, detail: str, stage: str = ""
    ) -> Outcome:
        clock = miner.clock
        place = stage or clock.stage
        return Outcome(status, place, reason, detail, miner.version, clock.seconds, clock.counts)

    async def _gate(
        self, miner: Miner, candidate: Candidate, found: Found, registry: Registry
    ) -> TaskRecord:
        """Complete a break to a task, judge it and keep both."""
        with miner.clock.at("complete"):
            pinner = Pinner(registry, miner.pinner.uv)
            task = await complete(found.mined, pinner)
            releases = await pinner.distributions()
        tests = task.tests.model_copy(update={"unstable": list(found.unstable)})
        task = task.model_copy(update={"tests": tests, "licence": found.licence})
        with miner.clock.at("gate"):
            gate = Gate(
                miner.client, {r.pin: r for r in releases}, registry, repeats=self._bounds.repeats
            )
            judged, verdict = await judge_steadily(gate, task.model_copy(update={"wheelhouse": []}))
        final = refreshed(judged, verdict).model_copy(update={"wheelhouse": task.wheelhouse})
        self._journal.keep(candidate, final, releases, fields_of(verdict))
        return final

    async def _clean_cache(self) -> None:
        """Begin uv's cache anew once it is too large."""
        async with self._cleaning:
            if self._bounds.workers > 1 or self._taken % 20:
                return
            cache = self._folder / "cache"
            if await asyncio.to_thread(_size, cache) > CACHE_BYTES:
                await asyncio.to_thread(shutil.rmtree, cache, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())


def fields_of(verdict: Verdict) -> dict[str, object]:
    """What a gate saw, as JSON can hold it; `verdict.of_fields` reads it."""
    return {**asdict(verdict), "error_log": verdict.error_log[-4000:]}


def export(journal: Journal, out: Path) -> tuple[int, int]:
    """Write `tasks.jsonl` and `distributions.jsonl` of what was admitted; how many of each.

    `evidence.jsonl` beside them holds what the gate saw of each.
    `decided.jsonl` beside them holds what need not be tried again, as `shipped_decisions` reads it.
    """
    tasks: list[TaskRecord] = []
    releases: dict[str, DistributionRecord] = {}
    seen: list[Evidence] = []
    for kept in journal.kept("admitted"):
        tasks.append(task := shortened(kept.task))
        if "repeats" in kept.evidence:  # an older version kept too little
            seen.append(evidence_of(of_fields(kept.evidence), task, kept.day))
        for record in parse_lines(kept.releases, DistributionRecord, f"{task.id} releases"):
            old = releases.get(record.pin)
            files = {f.filename: f for f in (*(old.files if old else ()), *record.files)}
            ordered = [files[name] for name in sorted(files)]
            releases[record.pin] = record.model_copy(update={"files": ordered})
    ordered = sorted(tasks, key=lambda task: (normalize(task.package), task.id))
    write_lines(out / "distributions.jsonl", [releases[pin] for pin in sorted(releases)])
    write_lines(out / "tasks.jsonl", ordered)
    write_lines(out / "evidence.jsonl", fitting(seen, tasks))
    write_lines(out / "decided.jsonl", journal.decisions())
    return len(tasks), len(releases)


def shortened(task: TaskRecord) -> TaskRecord:
    """The record with a long list of ids cut; count and digest stay those of all.

    Only where tests run does a State name them itself: they are all kept where a session does not
    start or a file is not collected.
    """
    ids = task.tests.fail_to_pass
    if len(ids) <= KEPT_IDS or task.stage != "test-run":
        return task
    tests = task.tests.model_copy(update={"fail_to_pass": ids[:KEPT_IDS]})
    return task.model_copy(update={"tests": tests})
