"""The spawner: a process with one thread that clones sandboxes for a threaded service.

- Started before or beside a gRPC server, it never shares memory or threads with it.
- It ends when its control socket ends, and every sandbox ends with it.
- A sandbox process inherits its own socket and nothing else.
- Requests are answered in order; setting a sandbox up happens in the clone, not here.
"""

import contextlib
import gc
import os
import select
import signal
import socket

from sandbox_svc.backends import linux, wire
from sandbox_svc.backends.spawner_child import become_first_process, forbid_imports

_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWPID


class Spawner:
    """Serves `create` requests on a control socket."""

    def __init__(self, control: socket.socket, home: str, host_id: tuple[int, int] | None) -> None:
        self._control, self._home, self._host_id = control, home, host_id
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._alive: set[int] = set()

    def serve(self) -> None:
        """Answer requests until the service closes its end."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        forbid_imports()
        gc.freeze()
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._reap()
            if self._control.fileno() in ready:
                received = wire.receive(self._control)
                if received is None:
                    break
                self._create(received[0])
        for pid in self._alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._alive.discard(pid)

    def _create(self, seat: wire.Message) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = _NAMESPACES
        if not seat["network"]:
            flags |= linux.CLONE_NEWNET
        if self._host_id is None:
            flags |= linux.CLONE_NEWUSER
            seat |= {"uid": os.geteuid(), "gid": os.getegid()}
        with ours, theirs:
            try:
                pid = linux.clone(flags)
            except OSError as error:
                wire.send(self._control, {"id": seat["id"], "error": str(error)})
                return
            if pid == 0:
                signal.set_wakeup_fd(-1)
                become_first_process(seat, theirs, self._home, self._host_id)
            self._alive.add(pid)
            pidfd = os.pidfd_open(pid)
            try:
                fds = (ours.fileno(), pidfd)
                wire.send(self._control, {"id": seat["id"], "pid": pid}, fds)
            finally:
                os.close(pidfd)


def main() -> None:
    """Serve; control descriptor, home and host id (`-`: not root) are in the environment."""
    control = socket.socket(fileno=int(os.environ["REGREEN_CONTROL"]))
    control.set_inheritable(False)
    number = os.environ["REGREEN_SPAWN_ID"]
    host_id = None if number == "-" else (int(number), int(number))
    Spawner(control, os.environ["REGREEN_SPAWN_HOME"], host_id).serve()
