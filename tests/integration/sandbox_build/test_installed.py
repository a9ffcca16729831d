"""Specs that differ only in what leaves no trace in files begin on one installation."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from sandbox_svc.backends.base import Box, Command, Limits
from sandbox_svc.builders.base import (
    DistFile,
    EnvironmentSpec,
    Pin,
    Stage,
    TestSpec,
    nothing_installed,
)
from sandbox_svc.builders.interpreters import find_all
from sandbox_svc.builders.python import Inputs
from sandbox_svc.state_records import State
from sandbox_svc.validate import Outcome, Validator
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, PYTHON, tiny_spec, write_wheel
from tests.integration.sandbox_build.suite import FIX, GREET, Workshop, open_workshop

_WORDLIB = (f"/work/env/lib/python{PYTHON}/site-packages/wordlib.py",)
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Shop:
    """Prepares specs and remembers what was done for the last one."""

    def __init__(self, workshop: Workshop, spec: EnvironmentSpec) -> None:
        self.workshop, self.spec, self.stages = workshop, spec, list[Stage]()
        self.states = workshop.states

    async def prepared(self, spec: EnvironmentSpec, *, rebuild: bool = False) -> State:
        self.stages.clear()
        installed = nothing_installed if rebuild else self.states.installed
        return await self.states.prepare(
            spec.digest,
            lambda progress: self.workshop.builder.prepare(
                spec, self.workshop.runtime, Limits(), progress, installed=installed
            ),
            rebuild=rebuild,
            progress=self.stages.append,
        )

    @property
    def installed(self) -> bool:
        """Whether the last preparation installed and compiled."""
        return "compile" in {stage.stage for stage in self.stages}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop() -> AsyncIterator[Shop]:
    async with open_workshop() as workshop:
        made = workshop.home / "made"
        made.mkdir()
        yield Shop(workshop, tiny_spec(workshop.store, made))


@contextlib.asynccontextmanager
async def fork(shop: Shop, state: State) -> AsyncIterator[Box]:
    box = await shop.workshop.runtime.create(state.layers, limits=Limits(), mounts=state.mounts)
    try:
        yield box
    finally:
        await box.delete()


def less_on_offer(spec: EnvironmentSpec) -> EnvironmentSpec:
    assert spec.wheelhouse, "the tiny task offers nothing"
    return replace(spec, wheelhouse=())


async def test_another_offer_is_tested_on_the_same_layers(shop: Shop) -> None:
    one = await shop.prepared(shop.spec)
    assert shop.installed
    two = await shop.prepared(less_on_offer(shop.spec))
    assert not shop.installed
    assert "baseline" in {stage.stage for stage in shop.stages}
    assert (two.id != one.id, two.layers) == (True, one.layers)
    assert sorted(two.metadata["baseline"]["failing"]) == sorted(FAIL_TO_PASS)
    same = ("settings", "modules", "foreign", "protected", "lock")
    assert [two.metadata[name] for name in same] == [one.metadata[name] for name in same]
    assert two.metadata["wheelhouse"] != one.metadata["wheelhouse"]
    validator = Validator(shop.states, shop.workshop.runtime)
    try:
        for state in (one, two):
            verdict = await validator.validate(state.id, [FIX])
            assert verdict.outcome is Outcome.PASSED
    finally:
        await validator.close()


async def test_what_runs_is_no_part_of_it_and_what_is_installed_is(shop: Shop) -> None:
    one = await shop.prepared(shop.spec)
    other = replace(shop.spec, test=TestSpec(("tests",), timeout_s=50.0), egress=("a.example",))
    assert (await shop.prepared(other)).layers == one.layers
    fewer = replace(shop.spec, pins=shop.spec.pins[:-1], wheelhouse=shop.spec.pins[-1:])
    for changed in (
        fewer,
        replace(shop.spec, install_mode="none"),
        replace(shop.spec, overlay=(FIX,)),
        replace(shop.spec, version="1.0.1"),
    ):
        assert changed.installation != shop.spec.installation
    await shop.prepared(replace(shop.spec, overlay=(FIX,)))
    assert shop.installed


async def test_what_is_installed_is_the_file_that_the_pin_names(shop: Shop) -> None:
    """Else whoever offers another file under a pinned name would choose what others begin on."""
    (word,) = [pin for pin in shop.spec.pins if pin.name == "wordlib"]
    folder = shop.workshop.home / "hostile"
    folder.mkdir()
    text = {"wordlib.py": b"def hello():\n    return 'Hello'\n"}
    other = shop.workshop.store.adopt(write_wheel(folder, "wordlib", word.version, text))
    assert other.sha256 != word.files[0].sha256
    offer = (*shop.spec.wheelhouse, replace(word, files=(other,)))
    state = await shop.prepared(replace(shop.spec, wheelhouse=offer), rebuild=True)
    assert shop.installed
    async with fork(shop, state) as box:
        there = await box.run(Command(("cat", *_WORDLIB), cwd="/work"))
    assert "def salute" in there.stdout.text
    assert sorted(state.metadata["baseline"]["failing"]) == sorted(FAIL_TO_PASS)


async def test_a_wheel_that_is_built_is_known_by_the_files_of_its_tools(shop: Shop) -> None:
    builder, found = shop.workshop.builder, find_all()
    inputs = Inputs({shop.spec.python: found[shop.spec.python]}, ())
    file = DistFile("a-1.0.tar.gz", "a" * 64)

    def key(tool: str) -> str:
        pin = Pin("hatchling", "1.0", (DistFile("hatchling-1.0-py3-none-any.whl", tool * 64),))
        spec = replace(shop.spec, build_pins=(pin,))
        return builder._build_key(spec, file, inputs, shop.spec.python)

    assert key("b") == key("b") != key("c")


async def test_a_state_that_is_to_be_rebuilt_is_installed_anew(shop: Shop) -> None:
    one = await shop.prepared(shop.spec)
    again = await shop.prepared(shop.spec, rebuild=True)
    assert shop.installed
    assert (again.id, set(again.layers).isdisjoint(one.layers)) == (one.id, True)


async def test_what_both_use_stays_until_both_are_gone(shop: Shop) -> None:
    one = await shop.prepared(shop.spec)
    two = await shop.prepared(replace(less_on_offer(shop.spec), egress=("b.example",)))
    three = await shop.prepared(replace(shop.spec, egress=("c.example",)))
    assert one.layers == two.layers == three.layers
    await shop.states.delete(three.id)  # the newest; the others are still begun on
    four = await shop.prepared(replace(shop.spec, egress=("d.example",)))
    assert four.layers == one.layers
    for state in shop.states.every():
        if state.id not in (one.id, two.id):
            await shop.states.delete(state.id)
    await shop.states.delete(one.id)
    async with fork(shop, two) as box:
        assert b"greeting" in await box.read_file(f"/work/repo/{GREET}", 1 << 16)
    await shop.states.delete(two.id)
    assert set(two.layers).isdisjoint(await shop.workshop.runtime.layers())
    await shop.prepared(shop.spec)
    assert shop.installed
