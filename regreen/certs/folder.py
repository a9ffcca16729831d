"""A folder with an authority and the certificates that it has made.

    authority/        its certificate and key, and the former one's certificate while both hold
    NAME/             `ca.crt`, `tls.crt`, `tls.key` of a service or a client

- Each is a link to a hidden folder that is complete: whoever reads or crashes meanwhile finds the
  former or the new one whole, or nothing.
- Keys and the authority's folder are their owner's alone (0600, 0700).
- A new authority is trusted before anything is signed by it, and the former one until `retire`:
  authorities can be changed while services run, in any number of steps and in any order of hosts.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from regreen.blobs import sync_path
from regreen.certs import authority as x
from regreen.rpc.certificates import CA, CERT, KEY
from regreen.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

AUTHORITY = "authority"
FORMER = "former.crt"
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Hosts that every service serves, beside its name."""
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")
_RENEW_AT = 1 / 3
"""Share of a life that is left when a certificate is due."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A certificate of the folder."""

    name: str
    cert: x509.Certificate
    current: bool
    """Whether the present authority has signed it."""

    @property
    def hosts(self) -> list[str]:
        """What it serves; nothing for a client."""
        return x.hosts_of(self.cert)

    @property
    def end(self) -> datetime:
        """When it ends."""
        return self.cert.not_valid_after_utc

    def due(self, now: datetime) -> bool:
        """Whether it should be renewed by now."""
        life = self.cert.not_valid_after_utc - self.cert.not_valid_before_utc
        return not self.current or self.end - now < life * _RENEW_AT


class CertFolder:
    """The certificates of one authority; changes are made by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether there is an authority."""
        return (self.path / AUTHORITY).is_dir()

    def init(self, life: timedelta, now: datetime) -> None:
        """Make the authority.

        Raises:
            AlreadyExists: there is one.
        """
        with self._locked(make=True):
            if self.exists():
                raise AlreadyExists(
                    f"{self.path} has an authority; `regreen certs renew --ca` makes the next one"
                )
            self._put_authority(x.make_authority(life, now), None)

    def issue(self, name: str, hosts: Sequence[str], life: timedelta, now: datetime) -> Entry:
        """Make a certificate, in the place of a former one of this name; without hosts a client's.

        Raises:
            InvalidArgument: the name or a host is none.
            NotFound: there is no authority.
        """
        if not _NAME.fullmatch(name) or name == AUTHORITY:
            raise InvalidArgument(
                "name", f"{name!r} is none", "give letters, digits, '.' and '-', at most 63"
            )
        with self._locked():
            return self._issue(name, hosts, life, now)

    def renew(self, names: Sequence[str], life: timedelta, now: datetime) -> list[Entry]:
        """New certificates and keys for these, or for all that are due; their hosts stay.

        Raises:
            NotFound: there is none of a name, or no authority.
        """
        with self._locked():
            known = {entry.name: entry for entry in self.entries()}
            for name in names:
                if name not in known:
                    raise NotFound(f"no certificate {name!r}; there are {', '.join(sorted(known))}")
            chosen = [known[name] for name in names] or [e for e in known.values() if e.due(now)]
            return [self._issue(one.name, one.hosts, life, now) for one in chosen]

    def renew_authority(self, life: timedelta, now: datetime) -> None:
        """A new authority, which all trust beside the present one; certificates stay until renewed.

        Raises:
            FailedPrecondition: the one before it is still trusted.
        """
        with self._locked():
            present = self._authority()
            if self._former() is not None:
                raise FailedPrecondition(
                    "two authorities are trusted already; renew what the former one has signed "
                    "(`regreen certs renew`), then `regreen certs retire`"
                )
            self._put_authority(x.make_authority(life, now), present.cert)
            self._spread()

    def retire(self) -> None:
        """Trust the former authority no more.

        Raises:
            FailedPrecondition: there is none, or a certificate is still of it.
        """
        with self._locked():
            if self._former() is None:
                raise FailedPrecondition("only one authority is trusted; there is none to retire")
            left = [entry.name for entry in self.entries() if not entry.current]
            if left:
                raise FailedPrecondition(
                    f"still of the former authority: {', '.join(left)}; `regreen certs renew` first"
                )
            self._put_authority(self._authority(), None)
            self._spread()

    def entries(self) -> list[Entry]:
        """Every certificate, by name.

        Raises:
            NotFound: there is no authority.
        """
        present = self._authority().cert
        found = []
        for link in sorted(self.path.iterdir()):
            if link.name.startswith(".") or link.name == AUTHORITY or not link.is_symlink():
                continue
            cert = x509.load_pem_x509_certificate((link / CERT).read_bytes())
            found.append(Entry(link.name, cert, x.is_of(cert, present)))
        return found

    def authorities(self) -> list[x509.Certificate]:
        """Those that are trusted, the present one first."""
        former = self._former()
        return [self._authority().cert, *([former] if former is not None else [])]

    def _issue(self, name: str, hosts: Sequence[str], life: timedelta, now: datetime) -> Entry:
        pair = x.issue(self._authority(), name, hosts, life, now)
        self._put(name, {CA: self._trusted(), CERT: pair.cert_pem, KEY: pair.key_pem})
        return Entry(name, pair.cert, True)

    def _spread(self) -> None:
        """Give every certificate the authorities that are trusted now."""
        trusted = self._trusted()
        for entry in self.entries():
            place = self.path / entry.name
            kept = {name: (place / name).read_bytes() for name in (CERT, KEY)}
            self._put(entry.name, {CA: trusted, **kept})

    def _trusted(self) -> bytes:
        place = self.path / AUTHORITY
        parts = [place / CERT, place / FORMER]
        return b"".join(path.read_bytes() for path in parts if path.exists())

    def _authority(self) -> x.Pair:
        place = self.path / AUTHORITY
        try:
            return x.read_pair((place / CERT).read_bytes(), (place / KEY).read_bytes())
        except FileNotFoundError as error:
            raise NotFound(
                f"no authority in {self.path}; `regreen certs init` makes one"
            ) from error

    def _former(self) -> x509.Certificate | None:
        path = self.path / AUTHORITY / FORMER
        return x509.load_pem_x509_certificate(path.read_bytes()) if path.exists() else None

    def _put_authority(self, pair: x.Pair, former: x509.Certificate | None) -> None:
        files = {CERT: pair.cert_pem, KEY: pair.key_pem}
        if former is not None:
            files[FORMER] = former.public_bytes(Encoding.PEM)
        self._put(AUTHORITY, files, mode=0o700)

    def _put(self, name: str, files: Mapping[str, bytes], mode: int = 0o755) -> None:
        """Put a complete folder in the place of the former one."""
        whole = self.path / f".{name}.{secrets.token_hex(6)}"
        whole.mkdir(mode=0o700)
        for file, content in files.items():
            rights = 0o600 if file == KEY else 0o644
            handle = os.open(whole / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights)
            with os.fdopen(handle, "wb") as target:
                target.write(content)
                target.flush()
                os.fsync(target.fileno())
        whole.chmod(mode)
        sync_path(whole)
        link = self.path / f".{name}.link"
        link.unlink(missing_ok=True)
        link.symlink_to(whole.name)
        link.replace(self.path / name)
        sync_path(self.path)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what was replaced, or never finished."""
        kept = {".lock"}
        for path in self.path.iterdir():
            if path.is_symlink() and not path.name.startswith("."):
                kept.add(path.readlink().name)
        for path in self.path.iterdir():
            if not path.name.startswith(".") or path.name in kept:
                continue
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)

    @contextlib.contextmanager
    def _locked(self, *, make: bool = False) -> Iterator[None]:
        if make:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not self.exists():
            raise NotFound(f"no authority in {self.path}; `regreen certs init` makes one")
        with (self.path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep()
            yield
