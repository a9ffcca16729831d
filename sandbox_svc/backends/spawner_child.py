"""From a freshly cloned process to the confined first process of a sandbox.

- It settles first (cgroup, private mounts, network) and waits there until it is needed, so that
  a service can keep a few seats warm; then it gets its file system and loses its privileges.
- Order: overlay root, read-only host programs, caller's mounts, /proc and /dev (mounted aside while
  it waited), pivot_root, identity, capabilities, no_new_privs, seccomp; then `Pid1.serve`.
- The mounts belong to a user namespace in which the sandbox has no capability: as root the
  initial one, otherwise an outer one that only this set-up code ever entered with privileges.
- Inside there is one user (1000), mapped to one unprivileged host id; the host's root is unmapped.
- Host sources are opened before any target is touched, and targets are resolved without links.
- No Python module can be loaded any more: the sandbox's files are hostile.
- Every failure is reported over the socket with the name of the step; nothing is half-confined.
"""

import contextlib
import encodings.ascii
import encodings.idna
import encodings.latin_1  # noqa: F401  (codecs load lazily, and inside there is nothing to load)
import importlib.machinery
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Iterable
from typing import NoReturn

from sandbox_svc.backends import linux, seccomp, wire
from sandbox_svc.backends.pid1 import Pid1

INSIDE_ID = 1000
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_PROC_READ_ONLY = ("sys", "irq", "bus", "fs", "sysrq-trigger")
_PROC_MASKED = ("kcore", "keys", "timer_list", "sched_debug", "kallsyms", "kmsg")
_HOST_PROGRAMS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
_FILTER = linux.SeccompFilter(seccomp.deny_list())
_LAST_CAPABILITY = linux.last_capability()
_BASE_FLAGS = linux.MS_NOSUID | linux.MS_NODEV
_ATTRIBUTES = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV


class _Setup:
    """The steps in order; `step` names the one that runs, for the error report."""

    def __init__(self, home: str, host_id: tuple[int, int] | None) -> None:
        self.home, self.host_id = home, host_id
        self.spec: wire.Message = {}
        self.step = "start"

    def settle(self, seat: wire.Message) -> None:
        """What can be done before it is known which layers the sandbox gets."""
        self.step = "outer identity"
        if self.host_id is None:
            _map_ids(0, seat["uid"], seat["gid"])
        self.step = "cgroup"
        directories, writes = seat["group"]
        for path in directories:
            os.mkdir(path)
        _write_all(writes)
        self.step = "directories"
        root = f"{self.home}/run/{seat['place']}"
        for path in (root, f"{root}/u", f"{root}/w"):
            os.mkdir(path, 0o755)
        if self.host_id is not None:
            os.chown(f"{root}/u", *self.host_id)
        self.step = "private mounts"
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE, None)
        self.step = "network"
        socket.sethostname("regreen")
        if not seat["network"]:
            linux.loopback_up()
        self._stage()

    def _stage(self) -> None:
        """Mount, beside the place of the root, what every sandbox has: /proc and /dev."""
        self.step = "stage"
        os.umask(0o022)
        os.chdir(f"{self.home}/stage")
        linux.mount("tmpfs", ".", "tmpfs", linux.MS_NOSUID, "mode=755,size=64k,nr_inodes=16")
        os.chdir(f"{self.home}/stage")
        for name in ("root", "proc", "dev"):
            os.mkdir(name)
        self._proc()
        self._devices()

    def finish(self, spec: wire.Message) -> None:
        """The file system, then the confinement."""
        self.spec = spec
        self.step = "group limits"
        _write_all(spec["limits"])
        # Not before: nobody may set the limits of the group that is its namespace's root.
        linux.unshare(linux.CLONE_NEWCGROUP)
        sources = self._open_sources()
        self._overlay()
        self._attach(sources)
        self._move("proc", "/proc")
        self._move("dev", "/dev")
        flags = _BASE_FLAGS
        shared = f"mode=1777,size={spec['shm_bytes']},nr_inodes=20k"
        self._mount_new("/dev/shm", flags, shared)
        temporary = f"mode=1777,size={spec['tmp_bytes']},nr_inodes={spec['tmp_inodes']}"
        self._mount_new("/tmp", flags, temporary)
        self.step = "pivot_root"
        linux.pivot_root(".", ".")
        linux.umount(".")
        os.chdir("/")
        self._confine()

    def _open_sources(self) -> list[tuple[int, str, bool]]:
        self.step = "open mounts"
        sources = []
        for name in _HOST_PROGRAMS if self.spec["programs"] else ():
            if os.path.isdir(f"/{name}") and not os.path.islink(f"/{name}"):
                sources.append((linux.open_tree(f"/{name}"), f"/{name}", True))
        for source, target, read_only in self.spec["mounts"]:
            self.step = f"open mount {source}"
            sources.append((linux.open_tree(source), target, read_only))
        return sources

    def _overlay(self) -> None:
        self.step = "overlay"
        os.chdir(self.home)
        lower = ":".join(reversed(self.spec["lower"]))
        root = f"run/{self.spec['place']}"
        options = f"lowerdir={lower},upperdir={root}/u,workdir={root}/w,userxattr"
        if self.spec["volatile"]:
            options += ",volatile"
        linux.mount("overlay", "stage/root", "overlay", _BASE_FLAGS, options)
        os.chdir("stage/root")

    def _target(self, path: str, directory: bool) -> int:
        """An O_PATH descriptor of a place inside the new root, created when it is missing."""
        root = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
        relative = path.strip("/")
        try:
            with contextlib.suppress(FileNotFoundError):
                return linux.openat2(root, relative, os.O_PATH, resolve)
            here = root
            parts = relative.split("/")
            for index, part in enumerate(parts):
                if directory or index < len(parts) - 1:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=here)
                else:
                    os.close(os.open(part, os.O_CREAT | os.O_EXCL, 0o644, dir_fd=here))
                following = linux.openat2(here, part, os.O_PATH, resolve)
                if here != root:
                    os.close(here)
                here = following
            return here
        finally:
            os.close(root)

    def _attach(self, sources: list[tuple[int, str, bool]]) -> None:
        for tree, target, read_only in sources:
            self.step = f"mount {target}"
            read = linux.MOUNT_ATTR_RDONLY if read_only else 0
            linux.mount_setattr(tree, _ATTRIBUTES | read)
            place = self._target(target, stat.S_ISDIR(os.fstat(tree).st_mode))
            linux.move_mount(tree, place)
            os.close(place)
            os.close(tree)

    def _move(self, staged: str, target: str) -> None:
        """Move a staged mount to its place in the new root."""
        self.step = f"mount {target}"
        place = self._target(target, directory=True)
        linux.mount(f"../{staged}", f"/proc/self/fd/{place}", None, linux.MS_MOVE, None)
        os.close(place)

    def _mount_new(self, target: str, flags: int, options: str) -> None:
        """A fresh file system in memory."""
        self.step = f"mount {target}"
        place = self._target(target, directory=True)
        linux.mount("tmpfs", f"/proc/self/fd/{place}", "tmpfs", flags, options)
        os.close(place)

    def _proc(self) -> None:
        linux.mount("proc", "proc", "proc", _BASE_FLAGS | linux.MS_NOEXEC, None)
        top = os.open("proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in _PROC_READ_ONLY:
            self.step = f"protect /proc/{name}"
            with contextlib.suppress(FileNotFoundError):
                _bind(linux.open_tree(name, top), top, name, read_only=True)
        for name in _PROC_MASKED:
            self.step = f"mask /proc/{name}"
            with contextlib.suppress(FileNotFoundError):
                _bind(linux.open_tree("/dev/null"), top, name, read_only=True)
        os.close(top)

    def _devices(self) -> None:
        self.step = "mount /dev"
        linux.mount("tmpfs", "dev", "tmpfs", linux.MS_NOSUID, "mode=755,size=64k,nr_inodes=64")
        top = os.open("dev", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in _DEVICES:
            self.step = f"mount /dev/{name}"
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=top))
            _bind(linux.open_tree(f"/dev/{name}"), top, name, read_only=False)
        for name, destination in _DEVICE_LINKS.items():
            os.symlink(destination, name, dir_fd=top)
        for name in ("shm", "pts"):
            os.mkdir(name, 0o755, dir_fd=top)
        with contextlib.suppress(OSError):
            terminals = "newinstance,ptmxmode=0666,mode=620,max=64"  # of a number all share
            no_programs = linux.MS_NOSUID | linux.MS_NOEXEC
            linux.mount("devpts", "dev/pts", "devpts", no_programs, terminals)
        self.step = "seal /dev"
        linux.mount_setattr(top, linux.MOUNT_ATTR_RDONLY, recursive=False)
        os.close(top)

    def _confine(self) -> None:
        self.step = "identity"
        outer_uid, outer_gid = self.host_id or (0, 0)
        if self.host_id is not None:
            os.setgroups([])
            os.setresgid(outer_gid, outer_gid, outer_gid)
            os.setresuid(outer_uid, outer_uid, outer_uid)
            linux.prctl(linux.PR_SET_DUMPABLE, 1)
        linux.unshare(linux.CLONE_NEWUSER)
        _map_ids(INSIDE_ID, outer_uid, outer_gid)
        self.step = "limits"
        for name, value in self.spec["rlimits"].items():
            _limit(getattr(resource, name), value)
        self.step = "capabilities"
        linux.drop_capabilities(_LAST_CAPABILITY)
        self.step = "no_new_privs"
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        self.step = "seccomp"
        _FILTER.install()
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)


def _bind(tree: int, directory: int, name: str, *, read_only: bool) -> None:
    """Attach a detached tree over an entry of a directory that only this set-up code can change."""
    try:
        if read_only:
            linux.mount_setattr(tree, linux.MOUNT_ATTR_RDONLY)
        linux.move_mount_at(tree, directory, name)
    finally:
        os.close(tree)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _map_ids(inside: int, outside_uid: int, outside_gid: int) -> None:
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/gid_map", f"{inside} {outside_gid} 1")
    _write("/proc/self/uid_map", f"{inside} {outside_uid} 1")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


def _write_all(writes: Iterable[tuple[str, str, bool]]) -> None:
    """Write values to files, of which those that are not needed may be refused."""
    for path, value, needed in writes:
        try:
            _write(path, value)
        except OSError:
            if needed:
                raise


def _keep_only(sock: socket.socket) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    fd = sock.fileno()
    os.closerange(3, fd)
    os.closerange(fd + 1, 1 << 16)


def forbid_imports() -> None:
    """Let no module be loaded from a file from now on; the spawner does it, before it clones."""
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter]


def become_first_process(
    seat: wire.Message, sock: socket.socket, home: str, host_id: tuple[int, int] | None
) -> NoReturn:
    """Settle, wait for the specification, confine this process, serve; never returns."""
    status = 1
    setup = _Setup(home, host_id)
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        _keep_only(sock)
        os.setsid()
        setup.settle(seat)
        received = wire.receive(sock)
        if received is not None:
            setup.finish(received[0])
            wire.send(sock, {"ready": True})
            Pid1(sock).serve()
        status = 0
    except Exception as error:  # noqa: BLE001  (last frame of this process: report, end)
        with contextlib.suppress(OSError):
            number = getattr(error, "errno", None)
            said = {"ready": False, "step": setup.step, "error": str(error), "errno": number}
            wire.send(sock, said)
    finally:
        os._exit(status)
