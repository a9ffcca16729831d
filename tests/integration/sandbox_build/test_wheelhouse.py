"""The wheelhouse of a State with several interpreters, of releases that have source archives."""

import json
import os
import tarfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.pkgindex import interpreter_tags, wheel_fits
from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.builders.base import EnvironmentSpec, Pin
from sandbox_svc.builders.interpreters import find_all, find_interpreter
from tests.fixtures.tasks.tiny_task import PYTHON, tiny_spec, write_wheel
from tests.integration.sandbox_build.suite import Workshop, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
PURE = "py3-none-any"
COMPILED = f"{{0}}-{{0}}-linux_{os.uname().machine}"
STABLE = f"cp37-abi3-linux_{os.uname().machine}"
OTHERS = [version for version in find_all() if version != PYTHON]
BOTH = (*OTHERS[-1:], PYTHON)
OTHER = BOTH[0]
needs_two = pytest.mark.skipif(not OTHERS, reason="one interpreter on this host")
BACKEND = """
import sys, time, zipfile
short = "cp%d%d" % sys.version_info[:2]
def build_wheel(folder, config=None, metadata=None):
    if short in {refused!r}:
        raise RuntimeError("not on this one")
    {first}
    tag = {tag!r}.format(short)
    file = "{name}-1.0-" + tag + ".whl"
    info = "{name}-1.0.dist-info"
    with zipfile.ZipFile(folder + "/" + file, "w") as wheel:
        wheel.writestr("{name}.py", "BUILT = %r, %r" % (short, time.time()))
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nTag: " + tag + "\\n")
        wheel.writestr(info + "/RECORD", "")
    return file
"""


def cp(python: str) -> str:
    return "cp" + python.replace(".", "")


class Shop:
    """Makes source archives, and wheelhouses of them."""

    def __init__(self, workshop: Workshop, spec: EnvironmentSpec) -> None:
        self.workshop, self.spec = workshop, replace(spec, pythons=BOTH)

    def pin(
        self, name: str, tag: str, refused: Sequence[str] = (), requires: str = "", first: str = ""
    ) -> Pin:
        """A release that has only a source archive; no two builds of it are alike."""
        root = self.workshop.home / f"{name}-1.0"
        root.mkdir()
        refused = [cp(python) for python in refused]
        text = BACKEND.format(name=name, tag=tag, refused=refused, first=first)
        (root / "backend.py").write_text(text)
        (root / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (root / "pyproject.toml").write_text(
            f"[build-system]\nrequires = {[requires] * bool(requires)}\n"
            'build-backend = "backend"\nbackend-path = ["."]\n'
            f'[project]\nname = "{name}"\nversion = "1.0"\n'
        )
        path = self.workshop.home / f"{name}-1.0.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(root, arcname=root.name)
        return Pin(name, "1.0", (self.workshop.store.adopt(path),))

    def with_pins(self, *pins: Pin, offered: Sequence[Pin] = ()) -> EnvironmentSpec:
        spec = self.spec
        return replace(spec, pins=(*spec.pins, *pins), wheelhouse=(*spec.wheelhouse, *offered))

    async def house(self, spec: EnvironmentSpec) -> Path:
        builder, told = self.workshop.builder, lambda stage: None
        found = {version: find_interpreter(version) for version in spec.allowed_pythons}
        inputs = await builder._fetch(spec, found, told, None)
        house, _ = await builder._wheelhouse(spec, inputs, self.workshop.runtime, Limits(), told)
        return house


def wheels(house: Path, pin: Pin) -> list[str]:
    """Names of the wheels of a release, which are there and nothing else is said to be."""
    index = json.loads((house / "index.json").read_text("utf-8"))
    names = [file["filename"] for file in index.get(pin.name, {}).get(pin.version, [])]
    assert set(names) == {path.name for path in house.glob(f"{pin.name}-*.whl")}
    return names


def fitting(names: Sequence[str], python: str) -> list[str]:
    return [name for name in names if wheel_fits(name, interpreter_tags(python))]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop() -> AsyncIterator[Shop]:
    async with open_workshop() as workshop:
        made = workshop.home / "made"
        made.mkdir()
        yield Shop(workshop, tiny_spec(workshop.store, made))


@needs_two
@pytest.mark.parametrize(
    ("name", "tag", "count"),
    [("pure", PURE, 1), ("stable", STABLE, 1), ("compiled", COMPILED, 2)],
)
@pytest.mark.parametrize("offered", [False, True], ids=["installed", "offered"])
async def test_each_interpreter_has_one_that_fits(
    shop: Shop, name: str, tag: str, count: int, offered: bool
) -> None:
    pin = shop.pin(f"{name}{offered:d}", tag)
    spec = shop.with_pins(offered=[pin]) if offered else shop.with_pins(pin)
    names = wheels(await shop.house(spec), pin)
    assert len(names) == count
    assert [len(fitting(names, python)) for python in BOTH] == [1, 1]


@needs_two
async def test_what_was_built_before_changes_nothing(shop: Shop) -> None:
    pin = shop.pin("before", PURE)
    spec = shop.with_pins(pin)
    first = await shop.house(spec)
    alone = await shop.house(replace(spec, python=OTHER, pythons=()))
    assert alone != first
    assert await shop.house(spec) == first
    assert await shop.house(replace(spec, pythons=BOTH[::-1])) == first


@needs_two
async def test_who_cannot_build_one_does_without(shop: Shop) -> None:
    half, none = shop.pin("half", COMPILED, refused=[OTHER]), shop.pin("none", PURE, refused=BOTH)
    offered = shop.pin("offer", COMPILED, refused=[PYTHON])
    house = await shop.house(shop.with_pins(half, offered=[offered, none]))
    assert fitting(wheels(house, half), PYTHON) == wheels(house, half) != []
    assert fitting(wheels(house, offered), OTHER) == wheels(house, offered) != []
    assert wheels(house, none) == []
    with pytest.raises(MissingDependency, match=rf"no wheel of none==1\.0 for Python {PYTHON}"):
        await shop.house(shop.with_pins(half, none))
    with pytest.raises(MissingDependency, match=rf"no wheel of offer==1\.0 for Python {PYTHON}"):
        await shop.house(shop.with_pins(offered))  # what another can build cannot be installed


@needs_two
async def test_one_that_only_another_can_build_serves_where_it_fits(shop: Shop) -> None:
    pin = shop.pin("elsewhere", PURE, refused=[PYTHON])
    assert wheels(await shop.house(shop.with_pins(pin)), pin) == ["elsewhere-1.0-py3-none-any.whl"]


async def test_one_that_fits_no_interpreter_here_is_none(shop: Shop) -> None:
    odd = shop.pin("odd", "cp27-cp27m-win32")
    assert wheels(await shop.house(shop.with_pins(offered=[odd])), odd) == []
    with pytest.raises(MissingDependency, match=r"no wheel of other==1\.0"):
        await shop.house(shop.with_pins(shop.pin("other", "cp27-cp27m-win32")))


@needs_two
async def test_each_interpreter_builds_with_tools_of_its_own(shop: Shop) -> None:
    folder = shop.workshop.home / "makers"
    folder.mkdir()
    files = []
    for python in BOTH:
        text = f"FOR = {cp(python)!r}\n".encode()
        made = write_wheel(folder, "maker", "1.0", {"maker.py": text})
        files.append(shop.workshop.store.adopt(made.rename(folder / _named("maker", python))))
    pin = shop.pin(
        "made", COMPILED, requires="maker", first="import maker; assert maker.FOR == short"
    )
    spec = replace(shop.with_pins(pin), build_pins=(Pin("maker", "1.0", tuple(files)),))
    names = wheels(await shop.house(spec), pin)
    assert [len(fitting(names, python)) for python in BOTH] == [1, 1]


def _named(name: str, python: str) -> str:
    return f"{name}-1.0-{COMPILED.format(cp(python))}.whl"


@needs_two
async def test_a_fix_may_go_to_the_other_interpreter(shop: Shop) -> None:
    pins = shop.pin("light", PURE), shop.pin("heavy", COMPILED)
    spec, workshop = shop.with_pins(*pins), shop.workshop
    state = await workshop.states.prepare(
        spec.digest, lambda p: workshop.builder.prepare(spec, workshop.runtime, Limits(), p)
    )
    runtime, limits = workshop.runtime, Limits()
    box = await runtime.create(state.layers, limits=limits, mounts=state.mounts, env=state.env)
    show = "python -c 'import light, heavy; print(light.BUILT[0], heavy.BUILT[0])'"
    move = f"sed -i 's/python=={PYTHON}/python=={OTHER}/' requirements.lock && sync-env"
    try:
        for script, built in ((show, f"{cp(PYTHON)} {cp(PYTHON)}"), (
            f"{move} && {show}", f"{cp(PYTHON)} {cp(OTHER)}"
        )):  # fmt: skip
            done = await box.run(Command(("sh", "-c", script), cwd="/work/repo"))
            assert done.ok, done.stdout.text + done.stderr.text
            assert done.stdout.text.split("\n")[-2] == built
    finally:
        await box.delete()
