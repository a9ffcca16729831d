"""A polite client: from disk first, and within a budget."""

from pathlib import Path

import pytest

from regreen.mine.registry import Registry
from regreen.rpc.errors import NotFound, ResourceExhausted
from tests.fixtures.index import wheel_index
from tests.fixtures.policy.http import serving
from tests.fixtures.tasks.tiny_task import write_wheel


async def test_pages_and_files_are_asked_for_once(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        write_wheel(wheels, "wordlib", version, {"wordlib.py": version.encode()})
    day = {"wordlib-2.0-py3-none-any.whl": "2023-05-06"}
    async with (
        serving(wheel_index(wheels, day)) as url,
        Registry([f"{url}/simple/"], tmp_path / "kept", budget=3) as first,
    ):
        page = await first.files("wordlib")
        assert [entry.uploaded[:10] for entry in page] == ["2020-01-01", "2023-05-06"]
        with pytest.raises(NotFound):
            await first.files("nothing")
        one = page[0]
        path = await first.download("wordlib", one.filename, one.sha256, tmp_path / "a")
        assert path.read_bytes() == (wheels / one.filename).read_bytes()
        assert first.asked == 3
        two = page[1]
        with pytest.raises(ResourceExhausted, match="budget of 3 requests"):
            await first.sdist("wordlib", two.filename, two.sha256)
    async with Registry([f"{url}/simple/"], tmp_path / "kept", budget=0) as second:
        assert await second.files("wordlib") == page
        with pytest.raises(NotFound):
            await second.files("nothing")
        assert await second.sdist("wordlib", one.filename, one.sha256) == path.read_bytes()
        second.drop(one.sha256)
        with pytest.raises(ResourceExhausted):
            await second.sdist("wordlib", one.filename, one.sha256)
