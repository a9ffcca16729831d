"""Images that a Docker engine is left with; the contract suite shows the rest of that runtime."""

from pathlib import Path

import pytest

from sandbox_svc.backends.base import Limits
from tests.contract.runtimes import make, sh, started

pytestmark = pytest.mark.asyncio(loop_scope="function")


def labelled(runtime) -> set[str]:
    """Tags of the layers' images of a runtime, and ids of those without a tag."""
    found: set[str] = set()
    for image in runtime.api.images(filters={"label": f"regreen.instance={runtime._instance}"}):
        found |= set(image["RepoTags"] or [image["Id"]])
    return {name for name in found if not name.startswith("regreen-base:")}


async def test_a_start_removes_images_that_a_crash_or_a_drop_left(tmp_path: Path) -> None:
    async with started("docker", tmp_path) as runtime:
        box = await runtime.create([], limits=Limits())
        await sh(box, "echo one > /work/one")
        kept = await box.freeze()
        await sh(box, "echo two > /work/two")
        cut = await box.freeze()
        other = await runtime.create([kept, cut], limits=Limits())
        await sh(other, "echo three > /work/three")
        used = await other.freeze()
        tags = {f"regreen-layer:{layer}" for layer in (kept, cut, used)}
        assert labelled(runtime) == tags
        await runtime.drop_layer(used)  # while a container stands on it
        (tmp_path / "docker-layers" / cut).unlink()  # as if killed before the record
        again = make("docker", tmp_path)
        await again.start()
        try:
            assert labelled(again) == {f"regreen-layer:{kept}"}
            box = await again.create([kept], limits=Limits())
            assert (await sh(box, "cat /work/one")).stdout.text == "one\n"
        finally:
            await again.close()
