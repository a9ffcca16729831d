"""From a freshly cloned process to the confined first process of a sandbox.

- It settles first (cgroup, private mounts, network) and waits there until it is needed, so that
  a service can keep a few seats warm; then it gets its file system and loses its privileges.
- Order: overlay root, read-only host programs, caller's mounts, /proc, /dev,
  pivot_root, identity, capabilities, no_new_privs, seccomp; then `Pid1.serve`.
- The mounts belong to a user namespace in which the sandbox has no capability: as root the
  initial one, otherwise an outer one that only this set-up code ever entered with privileges.
- Inside there is one user (1000), mapped to one unprivileged host id; the host's root is unmapped.
- Host sources are opened before any target is touched, and targets are resolved without links.
- After set-up no Python module can be loaded: the sandbox's files are hostile.
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
_FILTER = seccomp.deny_list()
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
        for path in seat["cgroups"]:
            _write(path, "0")
        linux.unshare(linux.CLONE_NEWCGROUP)
        self.step = "private mounts"
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE, None)
        self.step = "network"
        socket.sethostname("regreen")
        if not seat["network"]:
            linux.loopback_up()

    def finish(self, spec: wire.Message) -> None:
        """The file system, then the confinement."""
        self.spec = spec
        sources = self._open_sources()
        self._overlay()
        self._attach(sources)
        self._proc()
        self._devices()
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
        box = f"run/{self.spec['box']}"
        options = f"lowerdir={lower},upperdir={box}/u,workdir={box}/w,userxattr"
        if self.spec["volatile"]:
            options += ",volatile"
        linux.mount("overlay", f"{box}/m", "overlay", _BASE_FLAGS, options)
        os.chdir(f"{box}/m")
        os.umask(0o022)

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

    def _mount_new(self, kind: str, target: str, flags: int, data: str | None) -> None:
        self.step = f"mount {target}"
        place = self._target(target, directory=True)
        linux.mount(kind, f"/proc/self/fd/{place}", kind, flags, data)
        os.close(place)

    def _proc(self) -> None:
        self._mount_new("proc", "/proc", _BASE_FLAGS | linux.MS_NOEXEC, None)
        for name in _PROC_READ_ONLY:
            self.step = f"protect /proc/{name}"
            if os.path.lexists(f"proc/{name}"):
                self._bind_over(f"proc/{name}", f"/proc/{name}", read_only=True)
        for name in _PROC_MASKED:
            self.step = f"mask /proc/{name}"
            if os.path.lexists(f"proc/{name}"):
                self._bind_over("/dev/null", f"/proc/{name}", read_only=True)

    def _bind_over(self, source: str, target: str, *, read_only: bool) -> None:
        tree = linux.open_tree(source)
        if read_only:
            linux.mount_setattr(tree, linux.MOUNT_ATTR_RDONLY)
        place = self._target(target, directory=False)
        linux.move_mount(tree, place)
        os.close(place)
        os.close(tree)

    def _devices(self) -> None:
        self._mount_new("tmpfs", "/dev", linux.MS_NOSUID, "mode=755,size=64k,nr_inodes=64")
        for name in _DEVICES:
            self.step = f"mount /dev/{name}"
            self._bind_over(f"/dev/{name}", f"/dev/{name}", read_only=False)
        for name, destination in _DEVICE_LINKS.items():
            os.symlink(destination, f"dev/{name}")
        for name in ("shm", "pts"):
            os.mkdir(f"dev/{name}", 0o755)
        flags = _BASE_FLAGS
        shared = f"mode=1777,size={self.spec['shm_bytes']},nr_inodes=20k"
        self._mount_new("tmpfs", "/dev/shm", flags, shared)
        with contextlib.suppress(OSError):
            terminals = "newinstance,ptmxmode=0666,mode=620,max=64"  # of a number all share
            self._mount_new("devpts", "/dev/pts", linux.MS_NOSUID | linux.MS_NOEXEC, terminals)
        self.step = "seal /dev"
        device_root = self._target("/dev", directory=True)
        linux.mount_setattr(device_root, linux.MOUNT_ATTR_RDONLY, recursive=False)
        os.close(device_root)
        temporary = f"mode=1777,size={self.spec['tmp_bytes']},nr_inodes={self.spec['tmp_inodes']}"
        self._mount_new("tmpfs", "/tmp", flags, temporary)

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
        linux.drop_capabilities()
        self.step = "no_new_privs"
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        self.step = "seccomp"
        linux.install_seccomp(_FILTER)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)


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


def _keep_only(sock: socket.socket) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    fd = sock.fileno()
    os.closerange(3, fd)
    os.closerange(fd + 1, 1 << 16)


def _forbid_imports() -> None:
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
        _keep_only(sock)
        os.setsid()
        _forbid_imports()
        setup.settle(seat)
        received = wire.receive(sock)
        if received is not None:
            setup.finish(received[0])
            wire.send(sock, {"ready": True})
            Pid1(sock).serve()
        status = 0
    except Exception as error:  # noqa: BLE001  (last frame of this process: report, end)
        with contextlib.suppress(OSError):
            wire.send(sock, {"ready": False, "step": setup.step, "error": str(error)})
    finally:
        os._exit(status)
