"""A state whose record could not be made durable at once: that is tried until it works."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import ResourceExhausted
from regreen.sandbox import v1 as pb
from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.states import StateStore
from tests.fixtures.small_disk import mounted
from tests.integration.sandbox.test_embedded_commands import only

_ROOT = Path(__file__).parents[3]
_START_S = 60.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _listens(path: Path) -> bool:
    """Whether calls are taken: a socket has its name before it listens."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def _service(home: Path, place: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A sandbox service as a process, and its address; it ends by SIGKILL."""
    address = f"unix:{place}/s"
    (place / "s").unlink(missing_ok=True)
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "sandbox_svc", "--home", str(home), "--listen", address),
            *("--metrics", "127.0.0.1:0", "--warm-seats", "1"),
        ],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + _START_S
    try:
        while not _listens(place / "s"):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield child, address
    finally:
        child.kill()
        child.wait()


def _free_pages(disk: Path) -> int:
    return os.statvfs(disk).f_bavail


@contextlib.contextmanager
def _filled(disk: Path, pages: int) -> Iterator[None]:
    """Only so many pages are free."""
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, (_free_pages(disk) - pages) * _PAGE)
    assert _free_pages(disk) == pages
    yield
    (disk / "filler").unlink()


def _durable(home: Path) -> dict[str, bool]:
    """By id, whether the record that is there says that the state is durable."""
    records = (home / "sandbox" / "states").glob("st_*.json")
    return {path.stem: json.loads(path.read_bytes())["durable"] for path in records}


async def _until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


async def test_a_record_that_a_full_disk_kept_from_being_durable_becomes_so(tmp_path, capfd):
    made = {}
    with mounted(64) as disk:
        home = disk / "home"
        with _service(home, tmp_path) as (child, address):
            async with connect(address) as channel:
                states, sandboxes = StateClient(channel), SandboxClient(channel)
                spec = pb.EnvironmentSpec(builder="system")
                *_, last = [event async for event in states.prepare_state(spec)]
                box = await sandboxes.create_sandbox(last.state.id)
                await _until(lambda: all(_durable(home).values()))
                # With room for one more record, and for no other in its place.
                for pages in range(6):
                    await sandboxes.write_file(box.id, "/work/repo/n", str(pages).encode())
                    with _filled(disk, pages):
                        with contextlib.suppress(ResourceExhausted):
                            state = await sandboxes.snapshot_sandbox(box.id)
                            made[state.id] = pages
                            await asyncio.sleep(0.6)  # it is tried more than once meanwhile
                        found = _durable(home)
                    assert found.keys() >= made.keys()
                    if not all(found.values()):
                        break
                assert not all(found.values()), "none was kept from being durable"
                await _until(lambda: all(_durable(home).values()))
            child.kill()
        assert "not durable yet" in capfd.readouterr().err
        with _service(home, tmp_path) as (child, address):
            async with connect(address) as channel:
                for id, pages in made.items():
                    box = await SandboxClient(channel).create_sandbox(id)
                    done = await SandboxClient(channel).run(box.id, ["cat", "/work/repo/n"])
                    assert done.stdout.head == str(pages).encode()


async def _opened(home: Path) -> tuple[EmbeddedRuntime, StateStore, str]:
    """A runtime, the states over it, and a layer that none of them has yet."""
    runtime = EmbeddedRuntime(home, run_probes=False, warm_seats=0)
    await runtime.start()
    states = StateStore(home, runtime)
    await states.open()
    box = await runtime.create([], limits=Limits())
    layer = await box.freeze()
    await box.delete()
    return runtime, states, layer


async def test_without_descriptors_it_is_tried_again_too(tmp_path):
    runtime, states, layer = await _opened(tmp_path / "home")
    await runtime.settle()
    states.record(states.stamp(await states.add([layer], action="one")))
    with only(0):
        await asyncio.sleep(0.5)
        assert not states.list()[0].durable
    await _until(lambda: states.list()[0].durable)
    await states.close()
    await runtime.close()
    again = StateStore(tmp_path / "home", runtime)
    again._boot = "another start of this host"
    runtime = again._runtime = EmbeddedRuntime(tmp_path / "home", run_probes=False, warm_seats=0)
    await runtime.start()
    await again.open()
    assert [state.layers for state in again.list()] == [(layer,)]
    await again.close()
    await runtime.close()


async def test_a_record_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path):
    runtime, states, layer = await _opened(tmp_path / "home")
    state = await states.add([layer], action="one")
    await states.close()
    again = StateStore(tmp_path / "home", runtime)
    record = tmp_path / "home" / "states" / f"{state.id}.json"
    aside = record.rename(tmp_path / "aside")
    record.symlink_to(record)
    with pytest.raises(OSError, match="symbolic links"):
        await again.open()
    aside.rename(record)
    await again.open()
    assert [found.id for found in again.list()] == [state.id]
    await again.close()
    await runtime.close()
