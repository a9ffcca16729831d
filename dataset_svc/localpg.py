"""A private Postgres for one host: found, initialised, started and stopped without an installation.

- One owner at a time: a lock file says so, and the kernel drops the lock when its owner dies.
- The server never outlives its owner: it asks the kernel for a fast shutdown when the owner dies.
- It listens on a Unix socket alone, inside a directory that only its user can enter, with SCRAM.
- Run by root it runs as an existing unprivileged user; no mode outside its own directories changes.
- The data directory appears whole or not at all, whenever `initdb` is killed.
- `fsync` stays on unless a caller says otherwise: a committed rollout survives a power cut.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import psycopg
import structlog
from psycopg import sql

from dataset_svc import pgfind
from dataset_svc.pgfind import Account, Binaries
from regreen.rpc.errors import FailedPrecondition, InfraError, Unavailable

log = structlog.get_logger(__name__)

ROLE = "regreen"
SOCKET_PORT = 5432
"""Part of the socket's file name; no TCP port is opened."""

_SOCKET_DIR_MAX_BYTES = 80
"""The kernel's limit for a socket path is 107 bytes and the file name takes 15 of them."""
_LOG_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class LocalPostgresConfig:
    """Where a private Postgres lives and how it runs."""

    home: Path
    """Directory of this server: data, password, log and lock. Created with mode 0700."""
    pg_bin: Path | None = None
    """Directory that holds `initdb` and `postgres`; None looks for one."""
    run_as: str = ""
    """User that runs the server when root starts it; empty picks `postgres`, then `nobody`."""
    fsync: bool = True
    """Off only for throw-away data: a power cut may then lose commits."""
    start_timeout_s: float = 60.0
    """Longest wait for the first successful connection, crash recovery included."""
    stop_timeout_s: float = 30.0
    """Longest wait for a fast shutdown before an immediate one."""
    max_connections: int = 100


class LocalPostgres:
    """Owns one private Postgres between `start` and `stop`; a context manager does both."""

    def __init__(self, config: LocalPostgresConfig) -> None:
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None
        self._home = config.home.resolve()
        self._socket_dir = Path()
        self._password = ""

    def start(self) -> None:
        """Start the server and return when it answers; blocks for 0.2 s to a few seconds.

        Raises:
            FailedPrecondition: another process owns this directory, no Postgres was found, or the
                data was written by another major version.
            InfraError: `initdb` or the server failed; the message holds the end of its log.
            Unavailable: it did not answer within `start_timeout_s`.
        """
        account = pgfind.account(self.config.run_as)
        self._home = pgfind.reachable_home(self._home, account)
        self._lock = _take_lock(self._home)
        try:
            wanted = pgfind.data_version(self._home / "data")
            binaries = pgfind.binaries(self.config.pg_bin, wanted)
            binaries = pgfind.runnable(binaries, account, self._home)
            self._password = _password(self._home)
            self._socket_dir = _socket_dir(self._home, account)
            if wanted is None:
                self._initialise(binaries, account)
            _clear_predecessor(self._home / "data", self.config.stop_timeout_s)
            _clear_socket(self._socket_dir)
            self._spawn(binaries, account)
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server (fast, then immediate) and give up ownership; safe to call twice."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                process.send_signal(number)
                try:
                    process.wait(self.config.stop_timeout_s)
                    break
                except subprocess.TimeoutExpired:
                    log.warning("postgres_slow_to_stop", signal=number.name)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def home(self) -> Path:
        """The directory in use, which is not the configured one if that was out of reach."""
        return self._home

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise FailedPrecondition("the private Postgres is not running")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process is not None and self._process.poll() is None

    def url(self, database: str = ROLE) -> str:
        """SQLAlchemy URL of a database of this server (it holds the password: do not log it)."""
        return (
            f"postgresql+psycopg://{ROLE}:{quote(self._password)}@/{quote(database)}"
            f"?host={quote(str(self._socket_dir), safe='')}&port={SOCKET_PORT}"
        )

    def create_database(self, name: str, *, template: str = "template1") -> None:
        """Create a database, unless it is there, as a copy of `template`."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with self._connect("postgres") as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if found.fetchone() is None:
                connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self._socket_dir),
            port=SOCKET_PORT,
            user=ROLE,
            password=self._password,
            dbname=database,
            autocommit=True,
            connect_timeout=5,
        )

    def _initialise(self, binaries: Binaries, account: Account | None) -> None:
        """Make the data directory under another name, then rename it into place."""
        staging = self._home / "data.new"
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(mode=0o700)
        password_file = staging.with_name("initdb.password")
        password_file.write_text(self._password)
        password_file.chmod(0o600)
        if account is not None:
            os.chown(staging, account.uid, account.gid)
            os.chown(password_file, account.uid, account.gid)
        command = [
            str(binaries.initdb),
            "-D",
            str(staging),
            "-U",
            ROLE,
            "--pwfile",
            str(password_file),
        ]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
        command += [] if self.config.fsync else ["--no-sync"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.config.start_timeout_s,
                check=False,
                preexec_fn=pgfind.prepare_initdb,
                **pgfind.identity(account, binaries),
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"initdb took over {self.config.start_timeout_s} s") from error
        finally:
            password_file.unlink()
        if done.returncode != 0:
            raise InfraError(
                f"initdb failed: {(done.stderr or done.stdout).decode(errors='replace')[-2000:]}"
            )
        staging.rename(self._home / "data")

    def _spawn(self, binaries: Binaries, account: Account | None) -> None:
        """Start the server from a thread that lives as long as it does.

        The kernel ties the death signal to the thread that forked, not to the process (prctl(2)).
        """
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._socket_dir),
            "unix_socket_permissions": "0700",
            "port": str(SOCKET_PORT),
            "max_connections": str(self.config.max_connections),
            "fsync": "on" if self.config.fsync else "off",
            "synchronous_commit": "on" if self.config.fsync else "off",
            "full_page_writes": "on" if self.config.fsync else "off",
            "timezone": "UTC",
            "log_line_prefix": "%m [%p] ",
            # Fewer checkpoints, and less written for each.
            "max_wal_size": "2GB",
            "wal_compression": "on",
            "checkpoint_timeout": "15min",
            "shared_buffers": "256MB",
        }
        command = [str(binaries.postgres), "-D", str(self._home / "data")]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        log_path = self._home / "postgres.log"
        if log_path.exists() and log_path.stat().st_size > _LOG_MAX_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
        started = threading.Event()
        failures: list[OSError] = []

        def own() -> None:
            try:
                with log_path.open("ab") as sink:
                    self._process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=sink,
                        stderr=sink,
                        start_new_session=True,
                        preexec_fn=pgfind.die_with_parent,
                        **pgfind.identity(account, binaries),
                    )
            except OSError as error:
                failures.append(error)
            finally:
                process = self._process
                started.set()
            if process is not None:
                process.wait()

        threading.Thread(target=own, name="localpg", daemon=True).start()
        started.wait()
        if failures:
            raise InfraError(f"cannot run {binaries.postgres}: {failures[0]}")

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        while True:
            if self._process is None or self._process.poll() is not None:
                raise InfraError(f"Postgres did not start: {_tail(self._home / 'postgres.log')}")
            try:
                self._connect("postgres").close()
                break
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"Postgres did not answer within {self.config.start_timeout_s} s: {error}"
                    ) from error
                time.sleep(0.02)
        self.create_database(ROLE)


def _take_lock(home: Path) -> IO[bytes]:
    handle = (home / "lock").open("a+b")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read(20).decode(errors="replace").strip()
        handle.close()
        raise FailedPrecondition(
            f"{home} is in use by process {owner or '?'}; stop it, or choose another REGREEN_HOME"
        ) from error
    handle.truncate(0)
    handle.write(str(os.getpid()).encode())
    handle.flush()
    return handle


def _password(home: Path) -> str:
    """The stored password, made at first use; whole or absent."""
    path = home / "password"
    if not path.exists():
        staging = home / "password.new"
        staging.unlink(missing_ok=True)
        handle = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as target:
            target.write(secrets.token_urlsafe(32))
            target.flush()
            os.fsync(target.fileno())
        staging.rename(path)
    return path.read_text()


def _socket_dir(home: Path, account: Account | None) -> Path:
    """A directory for the socket: under home, or under /tmp if that path would be too long."""
    path = home / "socket"
    if len(os.fsencode(path)) > _SOCKET_DIR_MAX_BYTES:
        name = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
        path = Path("/tmp") / f"regreen-pg-{os.getuid()}-{name}"
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    owners = {os.getuid()} | ({account.uid} if account else set())
    if path.is_symlink() or info.st_uid not in owners:
        raise FailedPrecondition(
            f"{path} belongs to user {info.st_uid}; remove it or set REGREEN_HOME"
        )
    if account is not None:
        os.chown(path, account.uid, account.gid)
    path.chmod(0o700)
    return path


def _clear_predecessor(data: Path, timeout_s: float) -> None:
    """End servers that a dead owner left over this data, and drop a stale `postmaster.pid`.

    The lock is held, so whatever still runs there has no owner. A server's processes stand in its
    data directory; a reused process id does not, which is how the two are told apart.
    """
    deadline = time.monotonic() + timeout_s
    signals = {0.0: signal.SIGINT, timeout_s / 2: signal.SIGQUIT}
    started = time.monotonic()
    while leftovers := pgfind.processes_in(data):
        if time.monotonic() > deadline:
            raise Unavailable(f"processes {sorted(leftovers)} of an earlier server do not end")
        for after_s in [s for s in signals if time.monotonic() - started >= s]:
            number = signals.pop(after_s)
            for pid in leftovers:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        time.sleep(0.02)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _clear_socket(directory: Path) -> None:
    """Drop what a dead server left in our own socket directory.

    Postgres believes the process id in the socket's lock file, which another process may have now.
    """
    name = f".s.PGSQL.{SOCKET_PORT}"
    for path in (directory / name, directory / f"{name}.lock"):
        path.unlink(missing_ok=True)


def _tail(path: Path, size_bytes: int = 2000) -> str:
    try:
        return path.read_bytes()[-size_bytes:].decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
