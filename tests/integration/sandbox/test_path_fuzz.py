"""Paths and archives that mean harm, against the service: no byte leaves or enters another root.

- Trees of links, `..`, pipes, sockets, sparse and huge files and odd names are read, written,
  listed, searched, compared, snapshotted, exported and imported, also while a process inside
  swaps every name.
- What is answered is what a program inside would read at that path, or an error that is not ours.
- A directory outside, with a secret, stays as it was, and its content is in no answer.
"""

import asyncio
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regreen.client.channel import connect
from regreen.client.image import ImageClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import InfraError, RegreenError
from regreen.sandbox import v1 as pb
from sandbox_svc.__main__ import serving
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.contract.abuse.walls import needs_python
from tests.integration.sandbox.hostile import LAY, SECRET, SWAP, TREES, members, packed, targets
from tests.integration.sandbox.overlay import OverlayBuilder, prepared

_T = TypeVar("_T")
_EACH_S = 30.0
_MORE = int(os.environ.get("REGREEN_FUZZ_TIMES", "1"))
"""More than 1: so many times the examples, other ones in each run."""
_QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@dataclass(slots=True)
class Stage:
    """A service, a directory that no sandbox may reach, and a loop to drive both."""

    loop: asyncio.AbstractEventLoop
    home: Path
    outside: Path
    states: StateClient
    sandboxes: SandboxClient
    images: ImageClient
    state: pb.State
    record: bytes = b""

    async def asked(self, call: Awaitable[_T]) -> _T | RegreenError:
        """An answer or a refusal, in time, that is not the service's own trouble."""
        answer: _T | RegreenError
        try:
            async with asyncio.timeout(_EACH_S):
                answer = await call
        except RegreenError as refused:
            answer = refused
        assert not isinstance(answer, InfraError), answer
        assert type(answer) is not RegreenError, answer
        assert SECRET not in str(answer)
        return answer

    def look_outside(self) -> None:
        """Nothing came in."""
        assert sorted(os.listdir(self.outside)) == ["secret"]
        assert (self.outside / "secret").read_text() == SECRET
        assert os.lstat(self.outside / "secret").st_nlink == 1


@pytest.fixture(scope="module")
def stage() -> "AsyncIterator[Stage]":
    home = Path(tempfile.mkdtemp(prefix="regreen-paths-"))
    home.chmod(0o711)
    (home / "outside").mkdir()
    (home / "outside").chmod(0o777)
    (home / "outside/secret").write_text(SECRET)
    (home / "outside/secret").chmod(0o666)
    loop = asyncio.new_event_loop()
    opened = _opened(loop, home)
    try:
        yield loop.run_until_complete(opened.__aenter__())
        loop.run_until_complete(opened.__aexit__(None, None, None))
    finally:
        loop.close()
        shutil.rmtree(home, ignore_errors=True)


@asynccontextmanager
async def _opened(loop: asyncio.AbstractEventLoop, home: Path) -> AsyncIterator[Stage]:
    configured = SandboxSettings(
        home=home / "home",
        listen=f"unix:{home}/s",
        metrics="127.0.0.1:0",
        import_bytes=8 << 20,
        drain_s=0.2,
        log_level="error",
    )
    runtime = EmbeddedRuntime(home / "home/sandbox", run_probes=False, warm_seats=1)
    host = SandboxHost(configured, runtime, [OverlayBuilder()])
    async with serving(configured, host) as server:
        channel = connect(server.address)
        states = StateClient(channel, patience_s=0.0)
        sandboxes, images = SandboxClient(channel, patience_s=0.0), ImageClient(channel)
        state = await prepared(states, base="1")
        yield Stage(loop, home, home / "outside", states, sandboxes, images, state)
        await channel.close()


def _sendable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _laid(stage: Stage, box: str, tree: list) -> dict[str, str | None]:
    """Lay out a tree; what a program inside reads at each of its paths."""
    given_tree = json.dumps([[astuple(entry) for entry in tree], targets(stage.outside)])
    argv = ["/usr/bin/python3", "-X", "utf8", "-c", LAY]
    done = await stage.sandboxes.run(box, argv, stdin=given_tree.encode(), cwd="/")
    assert done.exit_code == 0, done.stderr.head
    shown = json.loads(done.stdout.head)
    return {f"/work/repo/{path[2:]}": found for path, found in shown}


async def _read_all(stage: Stage, box: str, shown: dict[str, str | None], *, still: bool) -> None:
    for path, inside in shown.items():
        if not _sendable(path):
            continue
        answer = await stage.asked(stage.sandboxes.read_file(box, path, max_bytes=64))
        if still:
            found = answer.content.hex() if not isinstance(answer, RegreenError) else None
            assert found == inside, path
        secret = f"{stage.outside}/secret"
        for beyond in (f"{path}/{'../' * 12}{secret}", f"{path}/secret", f"{path}/..{secret}"):
            answer = await stage.asked(stage.sandboxes.read_file(box, beyond))
            if still:
                assert isinstance(answer, RegreenError) or answer.content.hex() in shown.values()
        await stage.asked(stage.sandboxes.list_files(box, root=path))
        found = await stage.asked(stage.sandboxes.find_text(box, SECRET[:14], root=path))
        assert isinstance(found, RegreenError) or not found.matches
    await stage.asked(stage.sandboxes.list_files(box, root="/work"))
    await stage.asked(stage.sandboxes.diff(box))


async def _write_all(stage: Stage, box: str, paths: list[str]) -> None:
    for path in filter(_sendable, paths):
        for target in (path, f"{path}/secret", f"{path}/../planted"):
            await stage.asked(stage.sandboxes.write_file(box, target, b"planted"))
    stage.look_outside()


async def _exported(stage: Stage, box: str) -> bytes:
    """The archive of a snapshot, as far as it goes; holes may make it long."""
    state = await stage.sandboxes.snapshot_sandbox(box)
    archive = bytearray()

    async def take() -> None:
        stream = stage.states.export_state(state.id)
        async for chunk in stream:
            archive.extend(chunk)
            if len(archive) > 16 << 20:
                break
        await stream.aclose()

    await stage.asked(take())
    assert SECRET.encode() not in archive
    await stage.asked(stage.states.delete_state(state.id))
    return bytes(archive)


@needs_python
@pytest.mark.parametrize("swapping", [False, True], ids=["still", "swapped meanwhile"])
def test_no_path_leads_out_of_a_sandbox(stage: Stage, swapping: bool) -> None:
    async def one(tree: list) -> None:
        box = (await stage.sandboxes.create_sandbox(stage.state.id)).id
        swapper = None
        try:
            shown = await _laid(stage, box, tree)
            if swapping and shown:
                names = [path for path in shown if _sendable(path)]
                argv = ["/usr/bin/python3", "-c", SWAP, f"{stage.outside}/secret", *names]
                swapper = asyncio.create_task(
                    stage.asked(stage.sandboxes.run(box, argv, cwd="/", timeout_s=20))
                )
            await _read_all(stage, box, shown, still=not swapping)
            await _write_all(stage, box, list(shown))
            archive = await _exported(stage, box)
            await stage.asked(stage.states.import_state([archive]))
        finally:
            await stage.sandboxes.delete_sandbox(box)
            if swapper is not None:
                await asyncio.gather(swapper, return_exceptions=True)
        stage.look_outside()

    @settings(_QUICK, max_examples=8 * _MORE, derandomize=_MORE == 1)
    @given(TREES)
    def check(tree: list) -> None:
        stage.loop.run_until_complete(one(tree))

    check()


async def _record(stage: Stage) -> bytes:
    """A State's record that fits one layer, under a name that is not known here."""
    archive = b"".join([chunk async for chunk in stage.states.export_state(stage.state.id)])
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        source = found.extractfile("state.json")
        assert source is not None
        record = json.loads(source.read())
    return json.dumps(record | {"spec_sha256": "", "parent_id": "st_" + "2" * 32}).encode()


def test_no_archive_leaves_its_layer(stage: Stage) -> None:
    stage.record = stage.loop.run_until_complete(_record(stage))
    layers = stage.home / "home/sandbox/layers"
    taken = {"state": 0, "image": 0}

    async def one(entries: list, cut: int, number: int) -> None:
        name = f"st_{number:032x}".encode()
        record = stage.record.replace(stage.state.id.encode(), name)
        archive = packed(entries, "layers/0/", record)
        for data in (archive, archive[: cut % len(archive)], _damaged(archive, cut)):
            answer = await stage.asked(stage.states.import_state([data]))
            if not isinstance(answer, RegreenError):
                taken["state"] += 1
                await stage.asked(stage.states.delete_state(answer.id))
        root = packed(entries)
        answer = await stage.asked(stage.images.import_image([root], format=pb.IMAGE_FORMAT_ROOT))
        if not isinstance(answer, RegreenError):
            taken["image"] += 1
            await stage.asked(stage.states.delete_state(answer.state.id))
        stage.look_outside()
        assert sorted(os.listdir(stage.home)) == ["home", "outside", "s"]
        for top in layers.iterdir():
            for directory, folders, names in os.walk(top):
                for entry in (*folders, *names):
                    info = os.lstat(os.path.join(directory, entry))
                    assert not info.st_mode & 0o6000, "no set-id bit is kept"

    @settings(_QUICK, max_examples=40 * _MORE, derandomize=_MORE == 1)
    @given(members(stage.outside), st.integers(0, 1 << 20), st.integers(1, 1 << 100))
    def check(entries: list, cut: int, number: int) -> None:
        stage.loop.run_until_complete(one(entries, cut, number))

    check()
    assert taken["state"]
    assert taken["image"]


def _damaged(archive: bytes, place: int) -> bytes:
    place %= len(archive)
    return archive[:place] + bytes([archive[place] ^ 0x55]) + archive[place + 1 :]
