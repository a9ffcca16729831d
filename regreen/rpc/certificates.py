"""Certificates as files that are read anew when they change, for servers and clients.

- A set of files is used whole or not at all: what is being replaced is left until it fits together,
  and what was read before goes on meanwhile.
- Connections that are open outlive the certificates that they began with; no call is ended.
"""

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

from regreen.rpc.errors import FailedPrecondition
from regreen.rpc.logging import get

CA, CERT, KEY = "ca.crt", "tls.crt", "tls.key"
"""Names in a folder of certificates, as in a Kubernetes Secret of type `kubernetes.io/tls`."""
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of one end of a connection (PEM)."""

    ca: Path | None
    """Authorities of the other end's certificate."""
    cert: Path | None = None
    """This end's own certificate chain."""
    key: Path | None = None
    """Its private key."""
    server_name: str = ""
    """Name that the server's certificate must have, where it is not that of the address."""

    @classmethod
    def of(cls, folder: Path) -> "Tls":
        """The files of a folder that `regreen certs`, or Kubernetes, has made."""
        return cls(folder / CA, folder / CERT, folder / KEY)


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files of a `Tls` held at one moment."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


class Watched:
    """The newest whole content of a `Tls`.

    Raises:
        FailedPrecondition: a file cannot be read, or certificate and key are no pair.
    """

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()  # handshakes come from gRPC's own threads
        self._seen, self.pem = self._read()
        self._refused: object = None

    def renewed(self) -> Pem | None:
        """The content, where it is another one than at the last look and fits together."""
        with self._lock:
            if self._stamp() == self._seen:
                return None
            try:
                self._seen, pem = self._read()
            except FailedPrecondition as error:
                if self._refused != (refused := self._stamp()):
                    self._refused = refused
                    get().warning("the former certificates stay in use", problem=error.message)
                return None
            if pem == self.pem:
                return None
            self.pem = pem
            return pem

    def _read(self) -> tuple[object, Pem]:
        problem = ""
        for _ in range(_TRIES):
            before = self._stamp()
            try:
                parts = [path.read_bytes() if path else None for path in self._paths()]
                self._check_pair()
            except (OSError, ssl.SSLError) as error:
                problem = str(error)
                continue
            if self._stamp() == before:
                return before, Pem(*parts)
            problem = "they change all the time"
        named = ", ".join(str(path) for path in self._paths() if path)
        raise FailedPrecondition(
            f"the certificates {named} cannot be used ({problem}); give PEM files that fit together"
        )

    def _check_pair(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self._tls.cert and self._tls.key:
            context.load_cert_chain(self._tls.cert, self._tls.key, password=lambda: "")
        if self._tls.ca:
            context.load_verify_locations(self._tls.ca)

    def _paths(self) -> tuple[Path | None, Path | None, Path | None]:
        return self._tls.ca, self._tls.cert, self._tls.key

    def _stamp(self) -> object:
        """Changes when any of the files does."""
        found = []
        for path in self._paths():
            try:
                status = path.stat() if path else None
            except OSError:
                status = None
            found.append(status and (status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)
