"""A real Postgres that `pg_ctl` starts, restarts and stops, for tests that take it away.

- Unlike the service's private one it is nobody's child: a restart is the real thing.
- It keeps `fsync` on unless told otherwise: what it answered must be there after an immediate stop.
- Nothing of it is left after `stop`, but for its directory, which is the caller's.
"""

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Self
from urllib.parse import quote

from dataset_svc import pgfind
from tests.load import processes

_ROLE = "regreen"
_WAIT_S = 60


class Postgres:
    """One server over `home`; use as a context manager."""

    def __init__(self, home: Path, *, fsync: bool = True, max_connections: int = 100) -> None:
        self._account = pgfind.account("")
        self.home = pgfind.reachable_home(home, self._account)
        found = pgfind.binaries(None, None)
        self._binaries = pgfind.runnable(found, self._account, self.home)
        self._data, self._socket = self.home / "data", self.home / "socket"
        self._password = secrets.token_urlsafe(16)
        self._options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._socket),
            "max_connections": str(max_connections),
            "fsync": "on" if fsync else "off",
            "max_wal_size": "2GB",
        }

    def __enter__(self) -> Self:
        self._initialise()
        self._ctl("start")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """URL of its one database."""
        host = quote(str(self._socket), safe="")
        return f"postgresql://{_ROLE}:{self._password}@/postgres?host={host}&port=5432"

    def url_of(self, database: str) -> str:
        """URL of another database of this server."""
        return self.url.replace("@/postgres?", f"@/{database}?")

    @property
    def pid(self) -> int:
        """Process id of the server; 0 while it does not run."""
        try:
            pid = int((self._data / "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return 0
        return pid if processes.state(pid) not in ("", "Z") else 0

    def start(self) -> None:
        """Start a server that was killed; it recovers by itself.

        Raises:
            RuntimeError: processes of the killed one are not gone yet.
        """
        if not self.pid:  # of one that nobody has reaped the server would think that it lives
            (self._data / "postmaster.pid").unlink(missing_ok=True)
        self._ctl("start")

    def restart(self) -> None:
        """Abort every session without a checkpoint and start again, through crash recovery."""
        self._ctl("restart", "-m", "immediate")

    def stop(self) -> None:
        """Stop the server; safe to call twice."""
        if self.pid:
            self._ctl("stop", "-m", "fast")

    def _initialise(self) -> None:
        for path in (self._data, self._socket):
            path.mkdir(mode=0o700)
        password_file = self.home / "initdb.password"
        password_file.write_text(self._password)
        if self._account is not None:
            for path in (self._data, self._socket, password_file, self.home):
                os.chown(path, self._account.uid, self._account.gid)
        self._run(
            str(self._binaries.initdb), "-D", str(self._data), "-U", _ROLE, "--no-sync",
            "--pwfile", str(password_file), "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C",
        )  # fmt: skip
        password_file.unlink()
        lines = [f"{name} = '{value}'\n" for name, value in self._options.items()]
        with (self._data / "postgresql.conf").open("a") as config:
            config.writelines(lines)

    def _ctl(self, *command: str) -> None:
        self._run(
            str(self._binaries.directory / "pg_ctl"), "-D", str(self._data), "-w",
            "-t", str(_WAIT_S), "-l", str(self.home / "server.log"), *command,
        )  # fmt: skip

    def _run(self, *command: str) -> None:
        # Output goes to a file: a server that `pg_ctl` leaves running would keep a pipe open.
        # `setpriv`, because `subprocess` forks to change the user, and a fork of a process that
        # has gRPC's threads may crash before it executes anything.
        if self._account is not None:
            ids = [f"--reuid={self._account.uid}", f"--regid={self._account.gid}"]
            command = ("setpriv", *ids, "--clear-groups", *command)
        with (self.home / "pg_ctl.log").open("ab") as log:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=2 * _WAIT_S,
                check=False,
                cwd="/",
                env={
                    "LC_ALL": "C",
                    "TZ": "UTC",
                    "PATH": f"{self._binaries.directory}:/usr/bin:/bin",
                },
            )
        if done.returncode != 0:
            told = (self.home / "pg_ctl.log").read_text(errors="replace")[-1000:]
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {told}")


def remove(home: Path) -> None:
    """Remove what a stopped server leaves."""
    shutil.rmtree(home, ignore_errors=True)
