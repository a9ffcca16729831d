"""The service without its Postgres: it waits for one that comes, not for one that refuses."""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.load.postgres import Postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    home = Path(tempfile.mkdtemp(prefix="regreen-test-start-"))
    home.chmod(0o711)
    try:
        with Postgres(home / "pg", fsync=False) as server:
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


async def _start(url: str, home: Path, *flags: str) -> asyncio.subprocess.Process:
    addresses = (f"--listen=unix:{home}/s", "--metrics=127.0.0.1:0", f"--home={home}")
    words = ("-m", "dataset_svc", *addresses, f"--database-url={url}", *flags)
    return await asyncio.create_subprocess_exec(
        sys.executable, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def _read_until(process: asyncio.subprocess.Process, word: str) -> str:
    assert process.stdout is not None
    said = ""
    async with asyncio.timeout(60):
        while word not in said:
            line = await process.stdout.readline()
            assert line, said
            said += line.decode()
    return said


async def test_a_server_that_comes_is_waited_for(postgres: Postgres, tmp_path: Path) -> None:
    await asyncio.to_thread(postgres.stop)
    process = await _start(postgres.url, tmp_path, "--database-wait-s=120")
    try:
        await _read_until(process, "waiting_for_database")
        assert process.returncode is None
        await asyncio.to_thread(postgres.start)
        await _read_until(process, "serving")
    finally:
        process.terminate()
        await process.communicate()


@pytest.mark.parametrize(
    ("flags", "wrong", "says"),
    [
        (("--database-wait-s=0",), ("pg%2Fsocket", "pg%2Fnowhere"), "nowhere"),
        (("--database-wait-s=1",), ("pg%2Fsocket", "pg%2Fnowhere"), "nowhere"),
        (("--database-wait-s=600",), ("/postgres?", "/absent?"), '"absent" does not exist'),
        (("--database-wait-s=600",), ("regreen:", "regreen:x"), "authentication failed"),
    ],
)
async def test_one_that_refuses_or_is_late_ends_the_service(
    postgres: Postgres, tmp_path: Path, flags: tuple[str, ...], wrong: tuple[str, str], says: str
) -> None:
    process = await _start(postgres.url.replace(*wrong), tmp_path, *flags)
    async with asyncio.timeout(60):
        said = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert said.rstrip().splitlines()[-1].startswith("dataset_svc: database: ")
    assert says in said
    assert ("waiting_for_database" in said) == ("=1" in flags[0])


@pytest.mark.parametrize(
    ("place", "warned"),
    [
        ("db.invalid/name", True),
        ("db.invalid/name?sslmode=prefer", True),
        ("/name?host=127.0.0.1:1&host=db.invalid:2", True),
        ("/name?host=db.invalid&sslmode=allow", True),
        ("db.invalid/name?sslmode=require", False),
        ("db.invalid/name?sslmode=verify-full&sslrootcert=system", False),
        ("localhost:1/name", False),
        ("[::1]:1/name", False),
        ("/name?host=/nowhere", False),
    ],
)
async def test_what_may_cross_a_network_in_plain_text_is_told_once(
    tmp_path: Path, place: str, warned: bool
) -> None:
    process = await _start(f"postgresql://user:secret@{place}", tmp_path, "--database-wait-s=0")
    async with asyncio.timeout(60):
        said = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert said.count("database_in_plain_text") == warned
    assert "secret" not in said
