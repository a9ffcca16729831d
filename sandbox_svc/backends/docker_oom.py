"""Whether the kernel killed something of a container for want of memory while a command ran.

- The engine tells only that it ever happened; the kernel counts. What was counted before a command
  began, or is another's by now, is not that command's.
- Where the engine is on this host the count is read from the kernel. Elsewhere root reads it inside
  the container, and only where it matters: before a command in a container of which the engine
  told such a kill, and after one that ended by signal 9. The engine may tell of one late; a command
  that begins, and is killed otherwise, in that moment counts as killed for memory there.
- Where the count cannot be read, what the engine tells is all there is.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from regreen.rpc.errors import InfraError
from sandbox_svc.backends.docker_engine import Engine, EngineSilent
from sandbox_svc.backends.docker_exec import ROOT, ask

_COUNT = """
for f in /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; do
  while read -r key value; do
    [ "$key" = oom_kill ] && echo "$value" && exit 0
  done 2>/dev/null < "$f"
done
exit 1
"""
_COUNT_S = 20.0
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Before:
    """What was known when a command began."""

    kills: int | None
    """None where they cannot be counted."""
    claimed: int


class OomKills:
    """The kills of one container, and whose they were."""

    def __init__(self, engine: Engine, container: str) -> None:
        self._engine, self._container = engine, container
        self._claimed = 0
        self._seen = False
        self._looked = False
        self._file: Path | None = None
        """Where this host's kernel counts."""

    async def before(self) -> Before:
        """What to compare with when a command has ended that is about to begin.

        Raises:
            EngineSilent: the engine does not answer.
        """
        if not self._looked:
            pid = int((await self._engine.state(self._container)).get("Pid") or 0)
            self._file, self._looked = _counter(pid, self._container), True
        if self._file is None:
            self._seen = self._seen or await self._told()
        else:
            self._seen = True
        return Before(await self._count() if self._seen else 0, self._claimed)

    @property
    def counted(self) -> bool:
        """Whether the kernel of this host counts, so that looking costs next to nothing."""
        return self._file is not None

    async def since(self, before: Before) -> bool:
        """Whether there was a kill since, which is no other command's; it then is this one's.

        Raises:
            EngineSilent: the engine does not answer.
        """
        now = await self._count()
        if now is None or before.kills is None:
            return await self._told()
        kills = now - before.kills - (self._claimed - before.claimed)
        if kills <= 0:
            return False
        self._claimed += kills
        return True

    async def _told(self) -> bool:
        """Whether the engine tells of a kill, ever."""
        return bool((await self._engine.state(self._container)).get("OOMKilled"))

    async def _count(self) -> int | None:
        if self._file is not None:
            return _counted(self._file)
        argv = ("/bin/sh", "-c", _COUNT)
        try:
            answer = await ask(self._engine, self._container, argv, user=ROOT, timeout_s=_COUNT_S)
        except EngineSilent:
            raise
        except InfraError:  # it does not run any more
            return None
        told = answer.out.text.strip()
        return int(told) if told.isdigit() else None


def _counter(pid: int, container: str) -> Path | None:
    """The file in which this host's kernel counts the kills of a container, if it is here."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if container not in path:
                continue
            group = path.lstrip("/")
            for file in (
                _CGROUPS / controllers / group / "memory.oom_control",
                _CGROUPS / group / "memory.events",
            ):
                if _counted(file) is not None:
                    return file
    return None


def _counted(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text("ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return None
