"""What `regreen fix` remembers of an index: a local one, asked by the real resolver."""

import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.blobs import digest_of
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
from regreen.tasks.local import detect
from regreen.tasks.pin import TOOLS
from regreen.tasks.pinned import pinned_environment
from tests.fixtures.index import wheel_index
from tests.fixtures.policy.http import serving
from tests.fixtures.tasks.tiny_task import write_wheel

OFFERED = [(name, "1.0") for name in TOOLS] + [("wordlib", v) for v in ("1.0", "2.0", "2.1")]


class Counted:
    """An application and how often it was asked."""

    def __init__(self, app) -> None:
        self.app, self.asked = app, 0

    async def __call__(self, scope, receive, send) -> None:
        self.asked += 1
        await self.app(scope, receive, send)


@pytest_asyncio.fixture
async def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Counted]:
    """The index of this test alone."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version in (*OFFERED, ("pytest", "8.0")):
        write_wheel(wheels, re.split(r"\[", name)[0].replace("-", "_"), version, {})
    counted = Counted(wheel_index(wheels))
    async with serving(counted) as url:
        monkeypatch.setenv("REGREEN_INDEX_URL", f"{url}/simple/")
        monkeypatch.setenv("UV_NO_CACHE", "1")
        yield counted


async def pinned(root: Path, pins: str, text: str = "x = 1\n") -> pb.EnvironmentSpec:
    project = root / "project"
    project.mkdir(exist_ok=True)
    (project / "requirements.txt").write_text(pins)
    (project / "words.py").write_text(text)
    found = detect(project, ["3.11"])
    return await pinned_environment(found, digest_of(text.encode()), root / "pins")


async def test_equal_requirements_ask_the_index_once_a_day(index: Counted, tmp_path: Path) -> None:
    first = await pinned(tmp_path, "wordlib==2.0\npytest==8.0\n")
    assert {f"{pin.name}=={pin.version}" for pin in first.pins} == {"wordlib==2.0", "pytest==8.0"}
    assert {pin.version for pin in first.wheelhouse if pin.name == "wordlib"} == {"1.0", "2.1"}
    asked = index.asked
    assert asked > 0
    text = "x = 2\n"
    again = await pinned(tmp_path, "wordlib==2.0\npytest==8.0\n", text)
    assert index.asked == asked
    assert again.source_tree.sha256 == hashlib.sha256(text.encode()).hexdigest()
    again.source_tree.CopyFrom(first.source_tree)
    assert again == first
    other = await pinned(tmp_path, "wordlib==1.0\npytest==8.0\n")
    assert index.asked > asked
    assert {f"{pin.name}=={pin.version}" for pin in other.pins} == {"wordlib==1.0", "pytest==8.0"}


async def test_damaged_and_former_entries_are_not_believed(index: Counted, tmp_path: Path) -> None:
    first = await pinned(tmp_path, "wordlib==2.0\npytest==8.0\n")
    (entry,) = (tmp_path / "pins").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    asked = index.asked
    assert await pinned(tmp_path, "wordlib==2.0\npytest==8.0\n") == first
    assert index.asked > asked
    (entry,) = (tmp_path / "pins").iterdir()
    entry.rename(entry.with_name(f"2020-01-01{entry.name[10:]}"))
    asked = index.asked
    assert await pinned(tmp_path, "wordlib==2.0\npytest==8.0\n") == first
    assert index.asked > asked
    assert [path.name for path in (tmp_path / "pins").iterdir()] == [entry.name]


async def test_a_failed_resolution_is_not_remembered(index: Counted, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nowhere"):
        await pinned(tmp_path, "nowhere==1.0\n")
    assert not (tmp_path / "pins").exists()
