"""What the chart tells the client of an operator's Postgres, beside its URL, is kept."""

import os
import shutil
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from sqlalchemy import text

from dataset_svc.database import Database, normal_url
from regreen.rpc.errors import RegreenError
from regreen.stack.ports import Ports
from tests.fixtures.certs import Certs
from tests.load.postgres import Postgres, remove

_TLS = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


class Encrypted(Postgres):
    """A server on loopback whose certificate is of the name `localhost` alone."""

    def __init__(self, home: Path, certs: Certs) -> None:
        super().__init__(home, fsync=False)
        self.port = Ports().pick()
        folder = self.home / "tls"
        folder.mkdir()
        for name in ("tls.crt", "tls.key"):
            shutil.copy(certs.folder.path / "postgres" / name, folder / name)
            (folder / name).chmod(0o600)
            if self._account is not None:
                os.chown(folder / name, self._account.uid, self._account.gid)
        folder.chmod(0o755)
        self._options |= {
            "listen_addresses": "localhost",
            "port": str(self.port),
            "ssl": "on",
            "ssl_cert_file": str(folder / "tls.crt"),
            "ssl_key_file": str(folder / "tls.key"),
        }

    def at(self, host: str) -> str:
        """Its URL as CloudNativePG writes one: nothing in it is of certificates."""
        password = urlsplit(self.url).password
        return f"postgresql://regreen:{quote(password or '')}@{host}:{self.port}/postgres"


async def encrypted(url: str) -> bool:
    """Whether the service's connection to this URL is encrypted."""
    database = Database(normal_url(url), pool_size=1)
    try:
        return bool(await database.run(lambda session: session.scalar(text(_TLS))))
    finally:
        await database.close()


@pytest.fixture
def certs(tmp_path: Path) -> Certs:
    made = Certs.make(tmp_path / "certs")
    made.service("postgres", "localhost")
    return made


async def test_a_certificate_of_another_authority_or_name_is_refused(
    certs: Certs, tmp_path: Path, tmp_path_factory, monkeypatch
) -> None:
    home = tmp_path_factory.mktemp("encrypted")
    other = Certs.make(tmp_path / "other").folder.path / "server" / "ca.crt"
    try:
        with Encrypted(home, certs) as server:
            monkeypatch.setenv("PGSSLMODE", "verify-full")
            monkeypatch.setenv("PGSSLROOTCERT", str(certs.folder.path / "postgres" / "ca.crt"))
            assert await encrypted(server.at("localhost"))
            with pytest.raises(RegreenError, match="does not match host name"):
                await encrypted(server.at("127.0.0.1"))
            monkeypatch.setenv("PGSSLROOTCERT", str(other))
            with pytest.raises(RegreenError, match="certificate verify failed"):
                await encrypted(server.at("localhost"))
            monkeypatch.setenv("PGSSLROOTCERT", str(tmp_path / "none.crt"))
            with pytest.raises(RegreenError, match="does not exist"):
                await encrypted(server.at("localhost"))
    finally:
        remove(home)
