"""The dependency actions: edit `requirements.lock`, then bring the environment to it.

- The lock file and the environment agree after every action; a failed action puts both back.
- Only what must move moves: the named package, and what its own requirements force.
- What the platform cut short is trouble of the platform, never a conflict.
- Nothing is fetched: versions come from the offline wheelhouse alone.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from regreen.client.sandbox import succeeded
from regreen.lockfile import Lock, format_lock, lock_change, normalize, parse_lock
from regreen.rollout.facts import LOCK, PYTHON, Facts
from regreen.rpc.errors import InvalidArgument, NoSuchFile, SandboxLost
from regreen.sandbox import v1 as sandbox_pb

if TYPE_CHECKING:
    from regreen.client.stack import Stack

UV = "/opt/regreen/bin/uv"
SYNC = "/opt/regreen/bin/sync-env"
WHEELHOUSE = "/wheelhouse"
_LISTED = 12
_TRIED = 4
"""Versions tried when a request leaves a choice and the best does not go with the rest."""
_GRADLE = "gradle/wrapper/gradle-wrapper.properties"


class ToolError(Exception):
    """An action that could not be done; the message is the observation."""


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Dependency actions on one sandbox."""

    stack: "Stack"
    sandbox_id: str
    facts: Facts
    held: Mapping[str, str]
    """Packages that must stay at exactly this version."""
    timeout_s: float

    async def upgrade(self, name: str, version: str | None) -> str:
        """Move one package, or list its versions when `version` is None.

        Raises:
            ToolError: unknown package or version, a conflict, or a held package.
        """
        name = normalize(name.strip())
        if name == "python":
            return await self._interpreter(version)
        lock = await self.lock()
        offered = self.facts.offered.get(name, ())
        if not offered:
            raise ToolError(self._unknown(name, lock))
        now = lock.pins.get(name, "")
        if version is None or not version.strip():
            return _listing(name, now, offered)
        fitting = choices(name, version.strip(), now, offered)
        if fitting[0] == now:
            return f"{name} is already at {now}. {_listing(name, now, offered)}"
        self._check_held(name, fitting[0])
        better = fitting[: fitting.index(now)] if now in fitting else fitting
        after = await self._first_that_resolves(lock, name, better)
        return await self._apply(lock, after, name)

    async def remove(self, name: str) -> str:
        """Uninstall one package.

        Raises:
            ToolError: it is not installed, or held.
        """
        name = normalize(name.strip())
        lock = await self.lock()
        if name not in lock.pins:
            raise ToolError(self._unknown(name, lock))
        self._check_held(name, "removed")
        return await self._apply(lock, lock.without(name), name)

    async def upgrade_gradle(self, version: str) -> str:
        """Set the version in the Gradle wrapper.

        Raises:
            ToolError: the repository has no wrapper, or the version is malformed.
        """
        path = f"/work/repo/{_GRADLE}"
        if not re.fullmatch(r"\d+(\.\d+){1,2}", version.strip()):
            raise ToolError("version must look like 8.5")
        try:
            content = (await self.stack.sandbox.read_file(self.sandbox_id, path)).content.decode()
        except (NoSuchFile, InvalidArgument, UnicodeDecodeError) as error:
            raise ToolError(f"this project has no Gradle wrapper ({_GRADLE})") from error
        changed, count = re.subn(r"gradle-[\d.]+-", f"gradle-{version.strip()}-", content)
        if not count:
            raise ToolError(f"{_GRADLE} names no distribution")
        await self.stack.sandbox.write_file(self.sandbox_id, path, changed.encode())
        return f"Gradle is {version.strip()} now"

    async def lock(self) -> Lock:
        """The lock file as it is in the sandbox.

        Raises:
            ToolError: it is gone or malformed.
        """
        try:
            found = await self.stack.sandbox.read_file(self.sandbox_id, LOCK)
            return parse_lock(found.content)
        except NoSuchFile as error:
            raise ToolError("requirements.lock is gone; restore it first") from error
        except InvalidArgument as error:
            raise ToolError(str(error)) from error

    async def _interpreter(self, version: str | None) -> str:
        lock = await self.lock()
        now = lock.python or self.facts.python
        choice = ", ".join(self.facts.pythons)
        if version is None or not version.strip():
            return f"python {now} in use; on offer: {choice}"
        wanted = choices("python", version.strip(), now, self.facts.pythons)[0]
        if wanted == now:
            return f"python is already {now}; on offer: {choice}"
        self._check_held("python", wanted)
        return await self._apply(lock, lock.with_pin("python", wanted), "python")

    async def _first_that_resolves(self, lock: Lock, name: str, fitting: tuple[str, ...]) -> Lock:
        """The lock after moving `name` to the first version that goes with the rest.

        Raises:
            ToolError: none of the first few does; tells why the first does not.
        """
        refused: ToolError | None = None
        for wanted in fitting[:_TRIED]:
            try:
                return await self._resolve(lock, name, wanted)
            except ToolError as error:
                refused = refused or error
        raise refused or ToolError(f"no version of {name} fits")

    async def _resolve(self, lock: Lock, name: str, wanted: str) -> Lock:
        """The lock after moving `name`; what else moves is up to the resolver."""
        result = await self._run(
            [
                UV,
                "pip",
                "install",
                "--dry-run",
                "--offline",
                "--no-index",
                "--no-progress",
                "--color",
                "never",
                "--no-build",
                "--find-links",
                WHEELHOUSE,
                "--python",
                PYTHON,
                f"{name}=={wanted}",
            ]
        )
        text = _text(result)
        if not succeeded(result):
            raise ToolError(f"conflict: {_reason(text)}")
        after = lock
        moves = re.findall(r"^\s*([-+~]) ([\w.-]+)==(\S+)", text, re.MULTILINE)
        added = {normalize(move[1]) for move in moves if move[0] == "+"}
        for sign, package, version in moves:
            if sign == "+":
                self._check_held(normalize(package), version)
                after = after.with_pin(package, version)
            elif sign == "-" and normalize(package) not in added:
                after = after.without(package)
        return after.with_pin(name, wanted)

    async def _apply(self, before: Lock, after: Lock, name: str) -> str:
        await self._write(after)
        result = await self._run([SYNC])
        if not succeeded(result):
            await self._write(before)
            await self._run([SYNC])
            raise ToolError(f"could not install: {_reason(_text(result))}")
        return "; ".join(filter(None, [_moved(before, after, name), await self._warnings()]))

    async def _warnings(self) -> str:
        """Requirements of other packages that the environment does not meet now."""
        result = await self._run(
            [UV, "pip", "check", "--offline", "--color", "never", "--python", PYTHON]
        )
        found = re.findall(
            r"The package `([^`]+)` requires `([^`;]+)[^`]*`, but `?([^`\n]+?)`? is installed",
            _text(result),
        )
        shown = [f"{package} wants {' '.join(wanted.split())}" for package, wanted, _ in found[:2]]
        return "note: " + ", ".join(shown) if shown else ""

    async def _write(self, lock: Lock) -> None:
        await self.stack.sandbox.write_file(self.sandbox_id, LOCK, format_lock(lock).encode())

    async def _run(self, argv: list[str]) -> sandbox_pb.CommandResult:
        result = await self.stack.sandbox.run(
            self.sandbox_id, argv, timeout_s=self.timeout_s, output_bytes=64 << 10
        )
        if result.reason == sandbox_pb.END_REASON_INFRA:
            raise SandboxLost("the sandbox could not run the command")
        return result

    def _check_held(self, name: str, wanted: str) -> None:
        if name in self.held and wanted != self.held[name]:
            raise ToolError(
                f"{name} must stay at {self.held[name]} here; change the source instead"
            )

    def _unknown(self, name: str, lock: Lock) -> str:
        known = sorted({*lock.pins, *self.facts.offered})
        close = difflib.get_close_matches(name, known, 3, 0.6)
        shown = self.facts.to_look_at(self.facts.error)
        near = f"; did you mean {', '.join(close)}?" if close else ""
        if not close and shown:
            near = f"; look at {', '.join(shown)}"
        where = "installed, but no other version is on offer" if name in lock.pins else "unknown"
        return f"{name[:60]}: {where}{near}"


def choices(name: str, wanted: str, now: str, offered: tuple[str, ...]) -> tuple[str, ...]:
    """The offered versions that `wanted` may mean, the best first; at least one.

    `wanted` is exact, a specifier, `previous` (the series before the installed one: another major
    version, or another minor of 0.x; where there is none, the release before) or `latest`; all but
    the first leave a choice.

    Raises:
        ToolError: no version on offer fits.
    """
    if wanted == "latest":
        return offered[::-1]
    if wanted == "previous":
        older = [v for v in offered if now and _version(v) < _version(now)]
        if not older:
            raise ToolError(
                f"nothing older than {now or 'nothing'}. {_listing(name, now, offered)}"
            )
        below = [v for v in older if _series(v) < _series(now)]
        return tuple((below or older)[::-1])
    text = wanted if wanted[:1] in "<>=!~" else f"=={wanted}"
    try:
        specifier = SpecifierSet(text, prereleases=True)
    except InvalidSpecifier as error:
        raise ToolError(
            f"{wanted[:40]!r} is no version; give one of {', '.join(offered[-_LISTED:])}"
        ) from error
    fitting = [v for v in offered if v in specifier]
    if not fitting:
        raise ToolError(f"{wanted[:40]} is not on offer. {_listing(name, now, offered)}")
    return tuple(fitting[::-1])


def _series(text: str) -> tuple[int, int]:
    """What semantic versioning lets break: the major version, before 1.0 the minor."""
    version = _version(text)
    return version.major, 0 if version.major else version.minor


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")


def _listing(name: str, now: str, offered: tuple[str, ...]) -> str:
    shown = offered[-_LISTED:]
    if now and now in offered and now not in shown:
        shown = (now, *shown[1:])
    cut = "... " if len(offered) > len(shown) else ""
    return f"{name}: installed {now or 'not'}; on offer: {cut}{' '.join(shown)}"


def _moved(before: Lock, after: Lock, name: str) -> str:
    change = lock_change(before, after)
    parts = [
        f"{package} {before.pins.get(package, 'new')} -> {version}"
        for package, version in sorted(change.installed.items(), key=lambda kv: (kv[0] != name, kv))
    ]
    if change.python:
        parts.insert(0, f"python {before.python} -> {change.python}")
    parts += [f"{package} removed" for package in change.removed]
    return ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")


def _text(result: sandbox_pb.CommandResult) -> str:
    parts = (result.stdout.head, result.stdout.tail, result.stderr.head, result.stderr.tail)
    return "\n".join(part.decode("utf-8", "replace") for part in parts if part)


def _reason(text: str) -> str:
    """The sentence of a resolver's output that says why."""
    flat = " ".join(text.replace("│", " ").replace("╰─▶", " ").split())
    match = re.search(r"(Because .*|error: .*|ERROR: .*)", flat)
    return (match[1] if match else flat or "no output")[:300]
