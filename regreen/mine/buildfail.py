"""Mines build failures: a project that a newer release of its build tools cannot build.

- A source archive is looked at only if it bears the sign of a known break; what breaks is run.
- The project is on the path and not installed. Its tests pass before and after; the check that
  builds, installs and tests it away from its tree fails with the newer tools and passes with the
  release before: the pair is adjacent and both were run.
- A mend that the release notes ask for is the fix of both modes, and then no older tool is on
  offer. Else the older one is, and the fix asks for it in `pyproject.toml`.
"""

import asyncio
import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

from regreen.lockfile import normalize
from regreen.mine.bounds import own_bounds
from regreen.mine.candidate import Found, Ground, Past, Rejected, Tried
from regreen.mine.checks import FOLDER, build_check
from regreen.mine.culprits import Candidate
from regreen.mine.facts import Damage, Run, stable_ids
from regreen.mine.lab import Laboratory, Unusable
from regreen.mine.record import record_of
from regreen.mine.signs import BuildBreak, mended, signed
from regreen.mine.upgrade import UpgradeMiner
from regreen.tasks import environment as env
from regreen.tasks.model import Added, Edit

KIND = "build-failure"
_LEGACY = '[build-system]\nrequires = ["{pin}", "wheel"]\nbuild-backend = "{backend}"\n'
_BACKEND = "setuptools.build_meta:__legacy__"


@dataclass(frozen=True, slots=True)
class _Mended:
    """A fix that was seen to work, and the tools that are on offer with it."""

    fixes: list[dict[str, object]]
    tools: tuple[str, ...]


class BuildMiner(UpgradeMiner):
    """Mines build failures."""

    async def mine(self, candidate: Candidate, past: Past) -> list[Found]:
        """The build failures of the release of that day; raises as `UpgradeMiner.mine`."""
        release, needs, licence = await self._screen(candidate, past.releases)
        sdist = release.sdist
        archive = await self.registry.sdist(release.package, sdist.filename, sdist.sha256)
        texts = await asyncio.to_thread(_texts, archive)
        breaks = signed(texts)
        if not breaks:
            raise Rejected("screen", "no sign of a build that breaks")
        modules = await asyncio.to_thread(_modules, archive)
        name = normalize(release.package)
        check = build_check(name, release.version, modules, release.roots)
        release = replace(release, mode="path", added=(check,), roots=(*release.roots, check.path))
        found: list[Found] = []
        last = Rejected("screen", "same break as on another day")
        for one in breaks:
            if (one.tool, one.bad) in past.breaks:
                continue
            try:
                good = replace(release, tools=_with(release.tools, one.tool, one.good))
                async with Laboratory(self.client, self.registry, good) as lab:
                    ground = await self._base(candidate, lab, needs, licence)
                    passing = _checked(lab.passing)
                    if not passing:
                        raise Rejected("base", "cannot be built before", _said(ground.run))
                    found.append(await self._break(lab, ground, one, texts))
            except Rejected as error:
                self.notes.append(f"{one.tool} {one.bad}: {error} {error.detail[-300:]}")
                last = error
        if not found:
            raise Rejected(last.stage, last.reason, "; ".join(self.notes)[-900:])
        return found

    async def _break(
        self, lab: Laboratory, ground: Ground, one: BuildBreak, texts: dict[str, str]
    ) -> Found:
        """The record of one break."""
        tools = _with(ground.release.tools, one.tool, one.bad)
        newer = Laboratory(self.client, self.registry, replace(ground.release, tools=tools))
        with self.clock.at("single"):
            try:
                broken = await newer.base(ground.pins)
            except Unusable as error:
                raise Rejected("break", "cannot be prepared", str(error)[-300:]) from error
        lost = _checked(lab.passing) & broken.failed
        if not lost:
            raise Rejected("break", "builds with the newer tools", f"{one.tool} {one.bad}")
        if stable_ids(lab.passing) - lost - broken.passed:
            raise Rejected("break", "other tests differ")
        with self.clock.at("confirm"):  # a State's own run tells no messages
            told = await newer.attempt_files({"regreen-noop.txt": b""})
        with self.clock.at("fix"):
            found = await self._fixed(newer, ground, one, texts, lab.passing)
        good, bad = Tried(one.good, ground.pins, ground.run), Tried(one.bad, ground.pins, told)
        record = record_of(ground, lab, one.tool, good, bad, Damage(lost, frozenset()))
        release = ground.release
        mined = {
            **record.mined,
            "kind": KIND,
            "id": f"{release.package}-{release.version}__{one.tool}-{one.bad}__build",
            "build": {**record.mined["build"], "mode": "path", "tools": list(found.tools)},
            "changed": {one.tool: [one.good, one.bad]},
            "category": "build-failure",
            "stage": "build",
            "blame_top": "source",
            "error_lines": _errors("\n".join([*told.messages.values(), told.log])),
            "fixes_verified": found.fixes,
            "added": [added.model_dump() for added in release.added],
        }
        return replace(record, mined=mined)

    async def _fixed(
        self,
        newer: Laboratory,
        ground: Ground,
        one: BuildBreak,
        texts: dict[str, str],
        passing: frozenset[str],
    ) -> _Mended:
        edits = mended(one, texts)
        if edits:
            run = await _attempt(newer, env.edited_texts(edits, texts))
            if run is not None and stable_ids(passing) <= run.passed:
                fixes = [_wire(mode, edits, []) for mode in ("any_fix", "keep_new")]
                return _Mended(fixes, newer.release.tools)
            self.notes.append(f"the mend for {one.tool} {one.bad} is not enough")
        pin = f"{one.tool}=={one.good}"
        tools = tuple(sorted({*newer.release.tools, pin}))
        async with Laboratory(
            self.client, self.registry, replace(newer.release, tools=tools)
        ) as both:
            try:
                await both.base(ground.pins)
            except Unusable as error:
                raise Rejected("fix", "cannot be prepared", str(error)[-300:]) from error
            fix = _pinned(texts.get("pyproject.toml"), one.tool, pin)
            changed = {a.path: a.content for a in fix[1]} | env.edited_texts(fix[0], texts)
            run = await _attempt(both, changed)
        if run is None or not stable_ids(passing) <= run.passed:
            raise Rejected("fix", "no fix is known", one.note)
        return _Mended([_wire("any_fix", *fix)], tools)


def _wire(mode: str, edits: Sequence[Edit], added: Sequence[Added]) -> dict[str, object]:
    return {
        "mode": mode,
        "origin": "source-edit",
        "edits": [edit.model_dump() for edit in edits],
        "changes": [{"path": one.path, "text": one.content} for one in added],
    }


async def _attempt(lab: Laboratory, texts: dict[str, str]) -> Run | None:
    try:
        return await lab.attempt_files({path: text.encode() for path, text in texts.items()})
    except Unusable:
        return None


def _pinned(text: str | None, tool: str, pin: str) -> tuple[list[Edit], list[Added]]:
    """What makes a project ask for one release of a tool."""
    if text is None:
        made = _LEGACY.format(pin=pin, backend=_BACKEND)
        return [], [Added(path="pyproject.toml", content=made)]
    match = re.search(rf"""(["']){tool}\b[^"'\n]*\1""", text)
    if match is None:
        made = _LEGACY.format(pin=pin, backend=_BACKEND)
        return [], [Added(path="pyproject.toml", content=f"{made}\n{text}")]
    edit = Edit(path="pyproject.toml", old=match[0], new=f'"{pin}"', count=text.count(match[0]))
    return [edit], []


def _with(tools: Sequence[str], tool: str, version: str) -> tuple[str, ...]:
    others = [pin for pin in tools if pin.partition("==")[0] != tool]
    return tuple(sorted([*others, f"{tool}=={version}"]))


def _checked(ids: frozenset[str]) -> frozenset[str]:
    return frozenset(i for i in ids if i.startswith(f"{FOLDER}/"))


def _said(run: Run) -> str:
    texts = [text for test, text in run.messages.items() if test.startswith(FOLDER)]
    return (texts or [run.log])[0][-600:]


def _errors(text: str) -> list[str]:
    lines = [re.sub(r"^E\s+", "", line).strip() for line in text.splitlines()]
    found = [line[:300] for line in lines if re.match(r"[\w.]*(?:Error|Exception|error)\b", line)]
    return list(dict.fromkeys(found))[:6]


def _texts(archive: bytes) -> dict[str, str]:
    """Texts that builds read, and the archive's metadata."""
    found = own_bounds(archive)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and member.name.partition("/")[2] == "PKG-INFO":
                stream = tar.extractfile(member)
                if stream is not None:
                    found["PKG-INFO"] = stream.read(1 << 20).decode("utf-8", "replace")
    return found


def _modules(archive: bytes) -> list[str]:
    """Top-level modules, as an earlier build wrote them down."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".egg-info/top_level.txt"):
                stream = tar.extractfile(member)
                text = stream.read(1 << 16).decode("utf-8", "replace") if stream else ""
                return [line for line in text.split() if line.isidentifier()][:8]
    return []
