"""The embedded runtime: namespaces, overlayfs and cgroups, without a daemon, root or not.

- Sandboxes are cloned by a spawner process with one thread, never by this process.
- One service per home: a second one is refused by a file lock.
- A crash leaves nothing alive: the spawner and every sandbox end with their sockets; `start`
  sweeps directories and groups that are left.
- Inside there is one user (1000) without capabilities; on the host it is `layers.HOST_ID` when
  the service is root, else the service's own user. All sandboxes share it, so layers are shared
  too; pid, mount, network and ipc namespaces keep sandboxes apart.
- `start` refuses with the reason and the remedy when this host cannot isolate, or when sandboxes
  would be its root.
"""

import asyncio
import fcntl
import hashlib
import os
import resource
import secrets
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog

from regreen.rpc.errors import FailedPrecondition, InfraError, InvalidArgument, MissingDependency
from sandbox_svc.backends import (
    cgroups,
    identity,
    leftovers,
    linux,
    probe,
    program,
    seccomp,
    uppers,
    wire,
)
from sandbox_svc.backends.base import HOST_BASE, NO_ENV, Capability, Door, Limits, Mount
from sandbox_svc.backends.embedded_box import EmbeddedBox
from sandbox_svc.backends.fds import writing
from sandbox_svc.backends.layers import HOST_ID, WHOLE_TARGETS, Layout, is_full
from sandbox_svc.backends.seats import AT_ONCE, Left, Part, Seat, Seats

log = structlog.get_logger(__name__)

DEFAULT_LIMITS = Limits(
    memory_bytes=4 << 30,
    pids=512,
    cpus=2.0,
    disk_bytes=8 << 30,
    inodes=500_000,
    output_bytes=1 << 30,
    wall_s=3600.0,
)
_P = ParamSpec("_P")
_T = TypeVar("_T")
_DESCRIPTORS, _SPARE_DESCRIPTORS = 65_536, 1024
"""Of a command; and how many more its first process may have, and the service than that."""
_TAKEN = ("proc", "sys", "dev", "tmp")
_REMEDY = (
    "run the service as root or allow unprivileged user namespaces "
    "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
    "kernel.apparmor_restrict_unprivileged_userns), or use --backend docker"
)


class EmbeddedRuntime:
    """See `backends.base.Runtime`."""

    name = "embedded"

    def __init__(
        self,
        home: Path,
        *,
        defaults: Limits = DEFAULT_LIMITS,
        run_probes: bool = True,
        warm_seats: int = 4,
    ) -> None:
        self._warm = warm_seats
        self._home, self._defaults, self._run_probes = home.absolute(), defaults, run_probes
        self._root_mode = os.geteuid() == 0
        self.instance = hashlib.sha256(os.fsencode(self._home)).hexdigest()[:8]
        self._lock_fd = -1
        self._descriptors = _DESCRIPTORS
        self._built = ""
        """Digest of the spawner's program."""
        self._seats: Seats | None = None
        self._base = ""
        self._boxes: dict[str, EmbeddedBox] = {}
        self._mounts: dict[str, tuple[Mount, ...]] = {}
        self._whole: set[str] = set()
        """Boxes whose layers are a whole system."""
        self._capabilities: tuple[Capability, ...] = ()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="sandbox-files")
        self._volatile = True
        self._trash: set[asyncio.Task[None]] = set()
        self._left: list[Left] = []
        self._stuck: list[str] = []
        """Groups that something in the kernel held; tried again with the next."""
        self._putting_away = self._untidy = False
        self.cgroups: cgroups.CgroupV1 | cgroups.CgroupV2 | cgroups.NoCgroup = cgroups.NoCgroup()

    async def start(self) -> None:
        """Probe the host, sweep what a crashed predecessor left, get ready.

        Raises:
            MissingDependency: this host cannot isolate; the message names the remedy.
            FailedPrecondition: another service uses the same home.
        """
        if sys.platform != "linux" or not linux.supported_machine():
            raise MissingDependency(f"the embedded runtime does not know {linux.ARCH}; {_REMEDY}")
        owner = HOST_ID if self._root_mode else None
        identity.check(owner)
        self._home.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock()
        self._descriptors = _raise_descriptor_limit()
        self.layout = Layout(self._home, owner)
        built = await self.blocking(program.spawner)
        self._built = hashlib.sha256(await self.blocking(built.read_bytes)).hexdigest()[:16]
        self.cgroups = cgroups.choose(self.instance)
        try:
            await self.blocking(self._sweep)
            self._base = await self.blocking(self.layout.ensure_base)
            self._seats = Seats(self.cgroups, self._defaults, warm=self._warm, clear=self._clear)
            self._seats.start(self._home, owner, built)
            await self._prove()
        except BaseException as error:
            await self.close()
            if isinstance(error, InfraError):
                remedy = f"sandboxes do not work here: {error}; {_REMEDY}"
                raise MissingDependency(remedy) from error
            raise

    def _lock(self) -> None:
        self._lock_fd = os.open(self._home / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise FailedPrecondition(
                f"another sandbox service uses {self._home}; stop it or choose another home"
            ) from error

    def _sweep(self) -> None:
        self.cgroups.sweep()
        self.layout.sweep()

    async def _prove(self) -> None:
        """Find out whether `volatile` works, then what this host enforces.

        Each is tried again: a process of ours that was killed meanwhile says nothing of the host.
        """
        for self._volatile, left in ((True, 3), (True, 2), (False, 1), (False, 0)):
            try:
                box = await self.create([], limits=Limits())
                await box.delete()
                break
            except InfraError:
                if not left:
                    raise
        for left in (2, 1, 0) if self._run_probes else ():
            try:
                self._capabilities = tuple(await probe.prove(self))
                break
            except InfraError:
                if not left:
                    raise
        await self.settle()

    async def close(self) -> None:
        """Delete every box and stop helpers."""
        await asyncio.gather(*(box.delete() for box in list(self._boxes.values())))
        if self._seats is not None:
            await self._seats.close()
        await self.settle()
        await self.blocking(self.cgroups.close)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        self._threads.shutdown()

    async def create(
        self,
        layers: Sequence[str],
        *,
        limits: Limits,
        mounts: Sequence[Mount] = (),
        env: Mapping[str, str] = NO_ENV,
        door: Door | None = None,
        base: str = HOST_BASE,
    ) -> EmbeddedBox:
        """Start a box over `layers` (lowest first); an empty sequence is the bare base.

        Raises:
            FailedPrecondition: a layer is not on this host.
        """
        _check_mounts(mounts)
        box = EmbeddedBox(self, secrets.token_hex(6), layers, self._complete(limits), env, door)
        self._mounts[box.id] = tuple(mounts)
        if base != HOST_BASE:
            self._whole.add(box.id)
        self._boxes[box.id] = box
        try:
            await box.launch()
        except BaseException as error:
            await asyncio.shield(box.delete())
            if isinstance(error, InfraError):
                self.layout.require(layers)
            raise
        return box

    def _complete(self, limits: Limits) -> Limits:
        default = self._defaults
        whole = replace(
            limits,
            memory_bytes=limits.memory_bytes or default.memory_bytes,
            pids=limits.pids or default.pids,
            cpus=limits.cpus or default.cpus,
            disk_bytes=limits.disk_bytes or default.disk_bytes,
            inodes=limits.inodes or default.inodes,
            output_bytes=limits.output_bytes or default.output_bytes,
            wall_s=limits.wall_s or default.wall_s,
        )
        return cgroups.in_force(whole)

    async def seat_for(self, box: EmbeddedBox) -> Seat:
        """A seat for a box."""
        if self._seats is None:
            raise InfraError("the runtime was not started")
        return await self._seats.take()

    def specification(self, box: EmbeddedBox, seat: Seat) -> Sequence[wire.Field]:
        """What a seat needs to become the first process of a box, as `spawner/seat.c` reads it."""
        other = box.limits != seat.limits
        mounts = self._mounts[box.id]
        whole = box.id in self._whole
        places = [(m.target, m.source.is_dir()) for m in mounts]
        if whole:
            skeleton = self.layout.ensure_base(whole=True)
            above = self.layout.ensure_targets([*WHOLE_TARGETS, *places])
            lower = self.layout.lower_names([skeleton], box.layers, [above])
        else:
            below = [self._base, self.layout.ensure_targets(places)]
            lower = self.layout.lower_names(below, box.layers)
        memory, inodes = box.limits.memory_bytes, box.limits.inodes
        fields: list[wire.Field] = [0, "become"]
        fields += cgroups.fields(self.cgroups.writes(seat.name, box.limits) if other else ())
        fields += [seat.name, ":".join(reversed(lower)), int(self._volatile), int(not whole)]
        fields += [memory // 2, memory // 4, self._descriptors, inodes, len(mounts)]
        for mount in mounts:
            fields += [str(mount.source), mount.target, int(mount.read_only)]
        rlimits = self._rlimits(box.limits)
        fields.append(len(rlimits))
        for which, value in rlimits.items():
            fields += [which, value]
        return fields

    def give_up(self, seat: Seat) -> None:
        """End, in the background, a seat that no box took."""
        if self._seats is not None:
            self._seats.give_up(seat)

    async def ended_itself(self, seat: Seat) -> bool:
        """Whether the first process of a box has ended, and not from outside, as far as known."""
        return self._seats is not None and await self._seats.ended_itself(seat)

    async def leave(self, seat: Seat, part: Part, network: int) -> None:
        """End a seat's processes; a part of what it had goes in the background.

        `network` is a descriptor of its network namespace, or -1; it is closed.
        """
        try:
            if self._seats is not None:
                await self._seats.leave(seat)
        finally:
            self._put_away(seat.name, part, network)

    def _put_away(self, name: str, part: Part, network: int = -1) -> None:
        """Remove in the background, together with what waits for it already, what a seat had."""
        self._left += [
            Left(name, part, network),
            *(Left(stuck, Part.GROUP) for stuck in self._stuck),
        ]
        self._stuck.clear()
        if not self._putting_away:
            self._putting_away = True
            self._in_background(self._put_all_away())

    async def _put_all_away(self) -> None:
        try:
            while self._left:
                left: Sequence[Left] = self._left[:AT_ONCE]
                del self._left[:AT_ONCE]
                if self._seats is not None:
                    left = await self._seats.cleared(left)
                for name in await self.blocking(self._put_quickly_away, left) if left else ():
                    self._in_background(self.blocking(self._discard, name))
        finally:
            self._putting_away = False
        if self._untidy:
            self._untidy = False
            self.tidy()

    def _put_quickly_away(self, left: Sequence[Left]) -> Sequence[str]:
        """Remove empty uppers and control groups; names of those uppers that hold files."""
        for name in (each.name for each in left if each.part is not Part.UPPER):
            if not self.cgroups.destroy(name):
                self._stuck.append(name)
        uppers = (each.name for each in left if each.part is not Part.GROUP)
        return [name for name in uppers if not self.layout.removed(name)]

    def _clear(self, name: str) -> None:
        """Remove what a seat has that no box ever took."""
        self.cgroups.destroy(name)
        self._discard(name)

    def _discard(self, name: str) -> None:
        try:
            self.layout.discard(self.layout.box(name))
        except OSError as error:  # no descriptors, perhaps; it is out of sight, and tried again
            self._untidy = True
            log.warning("directories not removed", seat=name, error=str(error))

    def tidy(self) -> None:
        """Remove in the background what a freeze put aside."""
        self._in_background(self.blocking(self.layout.empty_trash))

    async def settle(self) -> None:
        """Wait until what was deleted has gone."""
        while self._trash:
            await asyncio.gather(*self._trash, return_exceptions=True)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._trash.add(task)
        task.add_done_callback(self._trash.discard)

    def _rlimits(self, limits: Limits) -> dict[int, int]:
        values = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: self._descriptors + _SPARE_DESCRIPTORS,
            resource.RLIMIT_FSIZE: limits.disk_bytes,
        }
        if isinstance(self.cgroups, cgroups.NoCgroup):
            values[resource.RLIMIT_NPROC] = limits.pids + 1
            values[resource.RLIMIT_DATA] = limits.memory_bytes
        return values

    async def forget(self, box: EmbeddedBox) -> None:
        """Release what the runtime holds for a box whose processes are dead."""
        self._boxes.pop(box.id, None)
        self._mounts.pop(box.id, None)
        self._whole.discard(box.id)
        if box.place:
            self._put_away(box.place, Part.UPPER)

    async def blocking(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a blocking call in the runtime's own threads.

        Raises:
            ResourceExhausted: the service has no descriptors, or its disk no space.
        """
        loop = asyncio.get_running_loop()
        with writing():
            return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))

    async def layers(self) -> Sequence[str]:
        """Ids of all layers that this host holds."""
        return sorted(os.listdir(self._home / "layers"))

    async def layer_size(self, layer: str) -> int:
        """Bytes of one layer; files that it shares with others count in part."""
        place = self.layout.layer(layer)
        return (await self.blocking(uppers.usage, place, shared=True)).size_bytes

    async def merge_layers(
        self,
        below: Sequence[str],
        layers: Sequence[str],
        mounts: Sequence[Mount] = (),
        base: str = HOST_BASE,
    ) -> str:
        """One durable layer that shows over `below` what `layers` show there (lowest first).

        Raises:
            OSError: they cannot be read by this service; nothing was made.
        """
        if base == HOST_BASE:
            targets = self.layout.ensure_targets((m.target, m.source.is_dir()) for m in mounts)
            lowest = [self._base, targets]
        else:  # mount points lie above the layers of an image
            lowest = [self.layout.ensure_base(whole=True)]
        self.layout.require((*below, *layers))
        names = self.layout.lower_names(lowest, below)
        beneath = [self._home / name for name in names]
        tops = [self.layout.layer(layer) for layer in layers]
        merged: str = await self.blocking(self.layout.merge, tops, beneath)
        await self.make_durable()
        return merged

    async def orphans(self) -> Mapping[str, frozenset[str]]:
        """Processes, groups, directories and mounts that belong to no live box and no warm seat."""
        found = await self.blocking(
            leftovers.look,
            self._home,
            groups=self.cgroups.members,
            spawner=self._seats.spawner if self._seats is not None else 0,
        )
        boxes = list(self._boxes.values())
        warm = tuple(self._seats.warm) if self._seats is not None else ()
        kept = tuple(self._seats.kept) if self._seats is not None else ()
        seats = [*warm, *(box.seat for box in boxes if box.seat is not None)]
        places = [*(seat.name for seat in warm), *(box.place for box in boxes), *kept]
        known = {
            "process": {str(seat.pid) for seat in seats},
            "cgroup": {*(seat.name for seat in seats), *kept},
            "directory": {f"run/{name}" for name in places},
        }
        return {kind: names - known.get(kind, set()) for kind, names in found.items()}

    async def make_durable(self) -> None:
        """Write all frozen layers to the disk."""
        await self.blocking(self.layout.sync)

    def disk_is_full(self) -> bool:
        """Whether the file system of layers and uppers is as good as full."""
        return is_full(self._home)

    def layer_files(self) -> Layout:
        """The layers as directories, for export and import."""
        return self.layout

    async def drop_layer(self, layer: str) -> None:
        """Remove a layer that no state uses; unknown ids are ignored."""
        if not layer.isalnum():
            raise InvalidArgument(
                "layer", f"is not a layer id: {layer!r}", "give one that this runtime made"
            )
        await self.blocking(self.layout.discard, self.layout.layer(layer))

    def capabilities(self) -> Sequence[Capability]:
        """What this host was proven to enforce."""
        return self._capabilities

    def unkept(self) -> Mapping[str, str]:
        """Names of `Limits` that nothing here keeps, each with what the operator can do."""
        return self.cgroups.unkept

    def identity(self) -> str:
        """The spawner's program and the call filter that it is given, by digest."""
        rules = hashlib.sha256(seccomp.deny_list()).hexdigest()[:16]
        return f"{self.name} {self._built} {rules}"


def _raise_descriptor_limit() -> int:
    """Make room here, where a command takes up to six; how many a command may have itself.

    Fewer than its first process and this service: see `spawner/pid1.c`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS + 2 * _SPARE_DESCRIPTORS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted - 2 * _SPARE_DESCRIPTORS, wanted // 2)


def _check_mounts(mounts: Sequence[Mount]) -> None:
    for mount in mounts:
        parts = mount.target.strip("/").split("/")
        if not mount.target.startswith("/") or not parts[0] or ".." in parts or "." in parts:
            raise InvalidArgument(
                "mounts",
                f"target is not a plain absolute path: {mount.target}",
                "mount it below another directory",
            )
        if parts[0] in _TAKEN:
            raise InvalidArgument(
                "mounts",
                f"/{parts[0]} is the sandbox's own: {mount.target}",
                "mount it below another directory",
            )
        if not mount.source.is_absolute() or not mount.source.exists():
            raise MissingDependency(f"mount source does not exist: {mount.source}")
