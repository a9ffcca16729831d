"""The first process of a sandbox: runs commands, opens files, reaps orphans.

- It is pid 1 of the sandbox's pid namespace: when it ends, every process of the sandbox ends.
- It holds no capability, cannot be dumped or traced, and takes no signal but SIGCHLD.
- It ends when its socket ends, so no sandbox outlives its service.
- Who starts a command and waits for nothing but its end is told of its beginning only if there is
  none.
- One thread, no state on disk; commands start by posix_spawn and inherit its confinement.
- A terminal comes from the sandbox's own devpts; its other side is handed to the service.
- Paths are resolved by the kernel inside the sandbox's root; only regular files are handed out.
"""

import contextlib
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import termios
import time
from dataclasses import dataclass
from typing import NamedTuple

from sandbox_svc.backends import linux, wire

CHANNEL_FD = 3
_BACKLOG = 64
_KILL_ROUNDS = 25
"""Of new processes; who forks faster than that is ended with everything else."""
_KILL_S, _KILL_PAUSE_S = 1.0, 0.002
_TIOCGPTN, _TIOCSPTLCK = 0x80045430, 0x40045431
"""Number of a terminal, and the lock on its side inside; not in `termios`."""


@dataclass(slots=True)
class _Job:
    id: int
    pid: int
    terminal: int = -1
    """Held open while the command runs, so that its output ends with it and not before."""


class Pid1:
    """The event loop of a sandbox's first process."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._jobs: dict[int, _Job] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def serve(self) -> None:
        """Answer requests until the socket ends."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._reap()
            if self._sock.fileno() in ready:
                received = wire.receive(self._sock)
                if received is None:
                    return
                self._handle(*received)

    def _handle(self, request: wire.Message, fds: list[int]) -> None:
        out: int | None = None
        try:
            reply, out = self._dispatch(request, fds)
        except (OSError, ValueError) as error:
            reply = {"errno": getattr(error, "errno", None) or 22, "error": str(error)}
        finally:
            for fd in fds:
                os.close(fd)
        if request.get("told", True):
            wire.send(self._sock, {"id": request["id"], **reply}, () if out is None else (out,))
        elif "pid" not in reply:
            wire.send(self._sock, {"id": request["id"], "refused": True, **reply})
        if out is not None:
            os.close(out)

    def _dispatch(self, request: wire.Message, fds: list[int]) -> tuple[wire.Message, int | None]:
        match request["op"]:
            case "run":
                return self._run(request, fds)
            case "signal":
                return self._signal(request["job"], request["signal"]), None
            case "kill":
                return self._kill(request["job"]), None
            case "kill_all":
                return _kill_all(), None
            case "open":
                return _open_read(request["path"])
            case "create":
                return _open_write(request["path"], request["mode"])
            case "usage":
                return _usage(), None
            case "listen":
                return {}, _listen(request["port"])
            case other:
                raise ValueError(f"unknown request {other}")

    def _run(self, request: wire.Message, fds: list[int]) -> tuple[wire.Message, int | None]:
        env: dict[str, str] = request["env"]
        argv: list[str] = request["argv"]
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]]
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]
        terminal: _Terminal | None = None
        if request.get("terminal"):
            try:
                terminal = _open_terminal(*request["terminal"])
            except OSError as error:
                return {"errno": error.errno, "error": str(error), "no_terminal": True}, None
            actions = terminal.actions
        failed = "cwd"
        try:
            os.chdir(request["cwd"])
            failed = "spawn"
            pid = os.posix_spawn(
                _find(argv[0], env.get("PATH", "")),
                argv,
                env,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD),
            )
        except OSError as error:
            if terminal is not None:
                terminal.close()
            return {"errno": error.errno, "error": str(error), failed: True}, None
        finally:
            os.chdir("/")
        job = self._jobs[pid] = _Job(request["id"], pid)
        if terminal is None:
            return {"pid": pid}, None
        job.terminal = terminal.inside
        return {"pid": pid}, terminal.outside

    def _signal(self, job_id: int, number: int) -> wire.Message:
        """Signal a command's process group; its number is its own until it is reaped."""
        job = next((job for job in self._jobs.values() if job.id == job_id), None)
        if job is None:
            return {"delivered": False}
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, number)
            return {"delivered": True}
        return {"delivered": False}

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            job = self._jobs.pop(pid, None)
            if job is not None:
                if job.terminal >= 0:
                    os.close(job.terminal)
                message = {
                    "id": job.id,
                    "status": status,
                    "cpu_s": usage.ru_utime + usage.ru_stime,
                    "peak_bytes": usage.ru_maxrss * 1024,
                }
                wire.send(self._sock, message)

    def _kill(self, job_id: int) -> wire.Message:
        """Kill what a command started, and nothing that belongs to another running command.

        A process that detached itself is attributed by time: everything that appeared since the
        command began and descends from no other running command.
        """
        job = next((job for job in self._jobs.values() if job.id == job_id), None)
        if job is None:
            return {"killed": 0}
        others = {other.pid for other in self._jobs.values()} - {job.pid}
        seen: set[int] = set()
        rounds, until_s = 0, time.monotonic() + _KILL_S
        while rounds < _KILL_ROUNDS and time.monotonic() < until_s:
            doomed = _doomed(job, others)
            if not doomed:
                return {"killed": len(seen)}
            if seen.issuperset(doomed):
                time.sleep(_KILL_PAUSE_S)  # they have the signal and wait for a processor
                continue
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            seen.update(doomed)
            rounds += 1
        return _kill_all()


class _Terminal(NamedTuple):
    """Both sides of a terminal, and what makes it the controlling one of a new session."""

    outside: int
    inside: int
    path: str

    @property
    def actions(self) -> list[tuple[int, ...] | tuple[int, int, str, int, int]]:
        opened = (os.POSIX_SPAWN_OPEN, 0, self.path, os.O_RDWR, 0)
        return [opened, (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]

    def close(self) -> None:
        os.close(self.outside)
        os.close(self.inside)


def _open_terminal(rows: int, columns: int) -> _Terminal:
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    outside = os.open("/dev/ptmx", flags)
    try:
        number = struct.unpack("i", fcntl.ioctl(outside, _TIOCGPTN, bytes(4)))[0]
        fcntl.ioctl(outside, _TIOCSPTLCK, bytes(4))
        fcntl.ioctl(outside, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        path = f"/dev/pts/{number}"
        return _Terminal(outside, os.open(path, flags), path)
    except OSError:
        os.close(outside)
        raise


def _kill_all() -> wire.Message:
    """Kill every process of the sandbox but this one; a fork in progress fails by its signal."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    return {"all": True}


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]


class _Process(NamedTuple):
    parent: int
    state: str
    started: int
    """Clock ticks since boot."""
    threads: int

    @property
    def dead(self) -> bool:
        """Whether it only waits to be reaped; its first thread may end before the others."""
        return self.state in "ZX" and self.threads <= 1


def _look_at(pid: int) -> _Process:
    try:
        with open(f"/proc/{pid}/stat", "rb") as source:
            fields = source.read().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return _Process(0, "X", 0, 0)
    return _Process(int(fields[1]), fields[0].decode(), int(fields[19]), int(fields[17]))


def _doomed(job: _Job, others: set[int]) -> list[int]:
    info = {pid: _look_at(pid) for pid in _pids()}
    first = _look_at(job.pid).started

    def belongs_to_other(pid: int) -> bool:
        seen = 0
        while pid > 1 and seen <= len(info):
            if pid in others:
                return True
            pid, seen = info[pid].parent if pid in info else 0, seen + 1
        return False

    return [
        pid
        for pid, process in info.items()
        if not process.dead
        and (process.started, pid) >= (first, job.pid)
        and not belongs_to_other(pid)
    ]


def _find(program: str, path: str) -> str:
    if "/" in program:
        return program
    for directory in path.split(":"):
        candidate = os.path.join(directory or ".", program)
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise FileNotFoundError(2, f"{program}: command not found")


def _refuse_odd(fd: int, path: str) -> os.stat_result:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(21 if stat.S_ISDIR(info.st_mode) else 22, f"not a regular file: {path}")
    if info.st_dev == os.stat("/proc").st_dev:
        raise OSError(13, f"a file of /proc: {path}")
    return info


def _open_inside(path: str, flags: int, mode: int = 0) -> int:
    flags |= os.O_NONBLOCK | os.O_NOCTTY
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolve = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
        return linux.openat2(root, path, flags, resolve, mode)
    finally:
        os.close(root)


def _open_read(path: str) -> tuple[wire.Message, int]:
    fd = _open_inside(path, os.O_RDONLY)
    try:
        info = _refuse_odd(fd, path)
    except OSError:
        os.close(fd)
        raise
    return {"size": info.st_size, "mode": stat.S_IMODE(info.st_mode)}, fd


def _open_write(path: str, mode: int) -> tuple[wire.Message, int]:
    os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
    fd = _open_inside(path, os.O_WRONLY | os.O_CREAT, mode & 0o777)
    try:
        _refuse_odd(fd, path)
        os.fchmod(fd, mode & 0o777)
        os.ftruncate(fd, 0)
    except OSError:
        os.close(fd)
        raise
    return {}, fd


def _listen(port: int) -> int:
    """A socket that listens on loopback, for the service to accept on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", port))
        sock.listen(_BACKLOG)
        return sock.detach()


def _usage() -> wire.Message:
    """Resident memory, processes, and bytes of files that are open but unlinked."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = processes = 0
    unlinked: dict[tuple[int, int], int] = {}
    device = os.stat("/").st_dev
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/statm", "rb") as source:
                resident += int(source.read().split()[1]) * page
            processes += 1
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            with contextlib.suppress(OSError):
                info = os.stat(f"/proc/{pid}/fd/{name}")
                if info.st_nlink == 0 and info.st_dev == device:
                    unlinked[info.st_dev, info.st_ino] = info.st_blocks * 512
    return {"memory": resident, "processes": processes, "unlinked": sum(unlinked.values())}
