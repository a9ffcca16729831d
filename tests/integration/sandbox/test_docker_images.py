"""Images that a Docker engine is left with; the contract suite shows the rest of that runtime."""

import json
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition
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


async def test_layers_in_which_commands_have_no_names_are_prepared_anew(tmp_path: Path) -> None:
    async with started("docker", tmp_path) as runtime:
        box = await runtime.create([], limits=Limits())
        kept, old = await box.freeze(), await box.freeze()
        record = tmp_path / "docker-layers" / old
        record.write_text(json.dumps({"below": [kept], "size_bytes": 1}))  # as of earlier versions
        again = make("docker", tmp_path)
        await again.start()
        try:
            assert await again.layers() == [kept]
            assert labelled(again) == {f"regreen-layer:{kept}"}
        finally:
            await again.close()


async def test_a_snapshot_too_many_is_refused_and_the_sandbox_goes_on(tmp_path, monkeypatch):
    from sandbox_svc.backends import docker

    monkeypatch.setattr(docker, "_DEEPEST", 1)
    async with started("docker", tmp_path) as runtime:
        box = await runtime.create([], limits=Limits())
        await box.freeze()
        await sh(box, "echo kept > /tmp/kept")
        with pytest.raises(FailedPrecondition, match="as many as the engine takes"):
            await box.freeze()
        assert (await sh(box, "cat /tmp/kept")).stdout.text == "kept\n"
