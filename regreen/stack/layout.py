"""Where the local stack keeps its files, and what it runs.

- Everything lives under one home; two homes never share a file or a port.
- A service is a process of the same interpreter: `python -m <name>_svc`.
"""

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from regreen.rpc.certificates import CA, CERT, KEY
from regreen.rpc.errors import DiskFull, InvalidArgument, RegreenError


@dataclass(frozen=True, slots=True)
class Service:
    """One service of the stack."""

    name: str
    port: int
    """Preferred gRPC port."""
    metrics_port: int
    """Preferred port of `/metrics` and `/healthz`."""
    health: str
    """Full name of the service that health is asked for."""
    http_port: int = 0
    """Preferred port of a further HTTP endpoint; 0 for none."""

    @property
    def module(self) -> str:
        """Module that runs it."""
        return f"{self.name}_svc"


# The one that the others need comes first; it is the last to be stopped.
SERVICES = (
    Service("dataset", 50051, 9051, "regreen.dataset.v1.TaskService"),
    Service("sandbox", 50052, 9052, "regreen.sandbox.v1.SandboxService"),
    Service("policy", 50053, 9053, "regreen.policy.v1.PolicyService", http_port=50063),
    Service("judge", 50054, 9054, "regreen.judge.v1.JudgeService"),
    Service("learner", 50055, 9055, "regreen.learner.v1.LearnerService"),
)


ELSEWHERE = "elsewhere"
"""Key of a description: what runs services that this home's commands use and do not run."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one home."""

    home: Path

    @property
    def run(self) -> Path:
        """Pid files, sockets and the description of the running stack."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        """One log file per service."""
        return self.home / "logs"

    @property
    def description(self) -> Path:
        """JSON that says which services run where."""
        return self.run / "stack.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor as long as it lives; holds its process id once it takes orders."""
        return self.run / "supervisor.lock"

    @property
    def certs(self) -> Path:
        """Certificates of the services and of their client, for a stack with TLS."""
        return self.home / "certs"

    @property
    def client_certs(self) -> Path:
        """What this machine's commands show to a stack with TLS."""
        return self.certs / "client"

    @property
    def tokens(self) -> Path:
        """Hashes of the tokens that the services of a stack with tokens take."""
        return self.home / "tokens.json"

    @property
    def client_token(self) -> Path:
        """The token of this machine's commands, where the stack asks for one."""
        return self.home / "client.token"

    @property
    def judge_token(self) -> Path:
        """The token by which the judge calls the policy."""
        return self.home / "judge.token"

    def audit(self, name: str) -> Path:
        """Who changed what in one service of a stack with tokens."""
        return self.home / "audit" / f"{name}.jsonl"

    @property
    def borrowed(self) -> Path:
        """There while the stack runs for a command that stops it at its end."""
        return self.run / "borrowed"

    @property
    def borrowers(self) -> Path:
        """Shared by the commands that use a borrowed stack; held by the one that stops it."""
        return self.run / "borrowers.lock"

    def log(self, name: str) -> Path:
        """Log file of one service, or of the supervisor."""
        return self.logs / f"{name}.log"

    def supervised(self) -> bool:
        """Whether a supervisor lives: process ids may be reused, its lock is never left behind.

        Raises:
            InvalidArgument: the home cannot be read.
        """
        try:
            handle = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self.unusable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def make(self) -> None:
        """Create the directories.

        Raises:
            InvalidArgument: they cannot be made here.
        """
        try:
            for path in (self.home, self.run, self.logs):
                # What is logged is for who runs the stack alone.
                path.mkdir(mode=0o700 if path == self.logs else 0o777, parents=True, exist_ok=True)
                if not os.access(path, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            raise self.unusable(error) from error

    def open(self, path: Path) -> IO[str]:
        """A file of this home, made if it is not there, to append to and to lock.

        Raises:
            InvalidArgument, DiskFull: it cannot be opened.
        """
        try:
            return path.open("a")
        except OSError as error:
            raise self.unusable(error) from error

    def unusable(self, error: OSError) -> RegreenError:
        """What to say when a file of this home cannot be used."""
        problem = f"{self.home} cannot be used ({error.strerror}: {error.filename})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(f"home: {problem}; free some space, or give another directory")
        return InvalidArgument("home", problem, "give a directory of your own")


def tls_words(folder: Path) -> list[str]:
    """Flags by which a service takes the certificates of a folder."""
    named = (("--tls-ca", CA), ("--tls-cert", CERT), ("--tls-key", KEY))
    return [word for flag, file in named for word in (flag, str(folder / file))]
