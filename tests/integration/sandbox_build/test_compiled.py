"""Byte code of wheels is made once, apart from any task, and taken by every State after."""

import marshal
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.builders.base import EnvironmentSpec
from sandbox_svc.state_records import State
from tests.fixtures.tasks.tiny_task import PYTHON, tiny_spec
from tests.integration.sandbox_build.suite import Workshop, open_workshop

SITE = f"/work/env/lib/python{PYTHON}/site-packages"
MISSING = f"""
import importlib.util, os, sys
for folder, _, names in os.walk({SITE!r}):
    for name in names:
        source = os.path.join(folder, name)
        if name.endswith(".py") and "/test" not in folder:
            if not os.path.exists(importlib.util.cache_from_source(source)):
                print(source)
"""
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workshop() -> AsyncIterator[Workshop]:
    async with open_workshop() as found:
        yield found


@pytest.fixture(scope="module")
def spec(workshop: Workshop) -> EnvironmentSpec:
    made = workshop.home / "made"
    made.mkdir()
    return tiny_spec(workshop.store, made)


async def prepared(workshop: Workshop, spec: EnvironmentSpec) -> State:
    return await workshop.states.prepare(
        spec.digest,
        lambda progress: workshop.builder.prepare(spec, workshop.runtime, Limits(), progress),
        rebuild=True,
    )


async def said(workshop: Workshop, state: State, code: str) -> str:
    box = await workshop.runtime.create(state.layers, limits=Limits(), mounts=state.mounts)
    try:
        done = await box.run(Command((f"{SITE}/../../../bin/python", "-c", code), env=state.env))
    finally:
        await box.delete()
    assert done.ok, done.stderr.text
    return done.stdout.text


def kept(workshop: Workshop) -> dict[Path, dict[str, Any]]:
    """What is kept of each wheel, by file."""
    files = (workshop.store.root / "compiled").glob("*/*")
    return {path: marshal.loads(path.read_bytes()) for path in files}


async def test_every_wheel_is_compiled_once(workshop: Workshop, spec: EnvironmentSpec) -> None:
    state = await prepared(workshop, spec)
    first = kept(workshop)
    assert len(first) == len(spec.pins)
    assert f"{SITE}/wordlib.py" in {path for one in first.values() for path in one}
    assert not (await said(workshop, state, MISSING)).splitlines()
    made = {path: os.stat(path).st_mtime_ns for path in first}
    await prepared(workshop, spec)
    assert {path: os.stat(path).st_mtime_ns for path in kept(workshop)} == made


async def test_a_state_takes_what_is_kept_and_only_for_that_source(
    workshop: Workshop, spec: EnvironmentSpec
) -> None:
    """Seen by code that stands there for a source, and for none."""
    await prepared(workshop, spec)
    place, name = next(
        (path, name) for path, one in kept(workshop).items() for name in one if "wordlib" in name
    )
    before = place.read_bytes()
    digest, _ = marshal.loads(before)[name]
    other = marshal.dumps(compile("def salute():\n    return 'kept'\n", name, "exec"))
    salute = "import wordlib; print(wordlib.salute())"
    try:
        for of, taken in ((digest, True), (b"\0" * 32, False)):
            place.write_bytes(marshal.dumps({name: (of, other)}))
            state = await prepared(workshop, spec)
            assert (await said(workshop, state, salute) == "kept\n") is taken
    finally:
        place.write_bytes(before)


async def test_where_nothing_can_be_kept_a_state_compiles_all_of_it(
    workshop: Workshop, spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk."""
    for path in kept(workshop):
        path.unlink()

    def full(key: str, data: bytes) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(workshop.store, "keep_compiled", full)
    state = await prepared(workshop, spec)
    assert not kept(workshop)
    assert not (await said(workshop, state, MISSING)).splitlines()
