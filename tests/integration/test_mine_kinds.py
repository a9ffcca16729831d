"""The further kinds of mining on tiny packages: a local index, real sandboxes, the real gate."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.mine.culprits import Candidate
from regreen.mine.store import Journal
from regreen.mine.work import Bounds, Mine, export
from regreen.tasks.jsonl import load_tasks
from regreen.tasks.model import TaskRecord
from regreen.tasks.pin import TOOLS
from sandbox_svc.builders.interpreters import find_all
from tests.fixtures.mining import Place, mining_place, write_sdist
from tests.fixtures.tasks.tiny_task import RUNNER, repack, write_wheel

pytestmark = pytest.mark.asyncio(loop_scope="module")
DAY = date(2023, 1, 1)
BACKEND = """
import base64, hashlib, pathlib, re, zipfile

VERSION = "@"

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    settings = pathlib.Path("setup.cfg").read_text() if pathlib.Path("setup.cfg").exists() else ""
    if VERSION == "78.0.1" and re.search(r"^[a-z]+-[a-z]+ *=", settings, re.M):
        raise RuntimeError("InvalidConfigError: Invalid dash-separated key in setup.cfg")
    facts = dict(re.findall(r"^(name|version|requires|module) = (.*)$", settings, re.M))
    name, version = facts["name"], facts["version"]
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {n.strip()}\\n" for n in facts["requires"].split(";"))
    head = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n{needs}"
    tag = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files = {f"{info}/METADATA": head.encode(), f"{info}/WHEEL": tag.encode()}
    for path in sorted(pathlib.Path(facts["module"]).glob("*.py")):
        files[str(path)] = path.read_bytes()
    rows = []
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(data)}")
    filename = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / filename, "w") as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)
        wheel.writestr(f"{info}/RECORD", "\\n".join([*rows, f"{info}/RECORD,,", ""]))
    return filename
"""
"""A build backend of a few lines under the name that every project has: no release is fetched."""
PYPROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
TESTS = (
    "import {0}\n\n\ndef test_word():\n    assert {0}.word() == 'hello'\n"
    "\n\ndef test_sum():\n    assert 1 + 1 == 2\n"
    "\n\ndef test_difference():\n    assert 2 - 1 == 1\n"
    "\n\ndef test_product():\n    assert 2 * 2 == 4\n"
)
SOURCE = "from wordlib import hello\n\n\ndef word():\n    return hello()\n"
QUOTING = "from pipes import quote\n\n\ndef word():\n    return quote('hello')\n"
UNHARMED = f"{SOURCE}\n\ndef old():\n    import pipes\n\n    return pipes\n"
PYTHONS = ("3.12", "3.13")
WORDS = {"wordlib.py": b"def hello():\n    return 'hello'\n"}


def released(
    folder: Path, name: str, settings: str, requires: str, tests: str = "", source: str = SOURCE
) -> None:
    requires = ";".join([*RUNNER, requires])
    lines = [f"Requires-Dist: {line}\n" for line in requires.split(";")]
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: MIT\n{''.join(lines)}"
    facts = f"[metadata]\nname = {name}\nversion = 1.0\nmodule = {name}\nrequires = {requires}\n"
    files = {
        "PKG-INFO": head,
        "pyproject.toml": PYPROJECT,
        "setup.cfg": facts + settings,
        f"{name}/__init__.py": source,
        f"tests/test_{name}.py": tests or TESTS.format(name),
        f"{name}.egg-info/top_level.txt": f"{name}\n",
    }
    write_sdist(folder, name, files)


def requiring(folder: Path, name: str, version: str, requires: str) -> Path:
    """A wheel that requires something."""
    return write_wheel(folder, name, version, {f"{name}.py": b"loud = True\n"}, requires)


def fill(folder: Path) -> dict[str, str]:
    """The releases of this test's world; the days of those that are not of 2020."""
    for name in TOOLS:
        if not name.startswith("setuptools"):
            write_wheel(folder, re.split(r"\[", name)[0].replace("-", "_"), "1.0", {})
    write_wheel(folder, "setuptools_scm", "1.0", {})
    for version in ("60.0.0", "77.0.3", "78.0.1"):
        text = BACKEND.replace("@", version).encode()
        files = {"setuptools/__init__.py": b"", "setuptools/build_meta.py": text}
        write_wheel(folder, "setuptools", version, files)
    for name in RUNNER:
        repack(folder, name)
    late = [write_wheel(folder, "wordlib", version, WORDS).name for version in ("2.0", "2.1")]
    write_wheel(folder, "wordlib", "1.0", WORDS)
    requiring(folder, "loudlib", "1.0", "wordlib")
    late += [requiring(folder, "loudlib", version, "wordlib>=2").name for version in ("1.1", "1.2")]
    late += [f"setuptools-{version}-py3-none-any.whl" for version in ("77.0.3", "78.0.1")]
    released(folder, "bounded", "", "wordlib<2")
    released(folder, "indirect", "", "wordlib>=1,<2;loudlib")
    released(folder, "unbounded", "", "wordlib")
    for version, fixture in (("1.0", "mark"), ("1.1", "mark"), ("2.0", "sign")):
        text = f"import pytest\n\n\n@pytest.fixture\ndef {fixture}():\n    return 1\n"
        entry = b"[pytest11]\nmarklib = marklib\n"
        info = f"marklib-{version}.dist-info/entry_points.txt"
        files = {"marklib.py": text.encode(), info: entry}
        path = write_wheel(folder, "marklib", version, files)
        late += [path.name] if version != "1.0" else []
    more = "\n\ndef test_marked(mark):\n    assert mark == 1\n"
    released(folder, "marked", "", "wordlib;marklib", tests=TESTS.format("marked") + more)
    released(folder, "dashed", "description-file = README\n", "wordlib")
    released(folder, "quoting", "", "wordlib", source=QUOTING)
    released(folder, "unharmed", "", "wordlib", source=UNHARMED)
    return dict.fromkeys(late, "2024-06-01")


@dataclass(frozen=True)
class World(Place):
    async def mine(
        self, kind: str, *packages: str, hints: tuple[tuple[str, str], ...] = ()
    ) -> Journal:
        journal = Journal(self.folder / "journal.db")
        journal.enqueue(Candidate(kind, name, DAY, hints) for name in packages)
        channel = connect(self.address)
        try:
            states, boxes = StateClient(channel), SandboxClient(channel)
            run = Mine(states, boxes, journal, self.folder, Bounds(), urls=[self.index])
            assert await run.run([kind]) == "nothing is left"
            assert not (await states.list_states()).states, "states are left"
        finally:
            await channel.close()
        return journal


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with mining_place(fill) as place:
        yield World(place.address, place.index, place.folder)


def ends(journal: Journal, kind: str) -> dict[str, str]:
    rows = [row for row in journal.rows("candidate") if row["kind"] == kind]
    return {row["package"]: f"{row['status']} {row['reason']} | {row['detail']}" for row in rows}


def tasks(journal: Journal, folder: Path, kind: str) -> dict[str, TaskRecord]:
    export(journal, folder)
    found = load_tasks(folder / "tasks.jsonl")
    return {task.package: task for task in found if task.kind == kind}


@pytest.mark.timeout(900)
async def test_bounds_that_rule_a_release_out_are_conflicts(world: World, tmp_path: Path) -> None:
    journal = await world.mine("conflict", "bounded", "indirect", "unbounded")
    found = ends(journal, "conflict")
    assert found["bounded"].startswith("mined 1 of 1 admitted"), found
    assert found["indirect"].startswith("mined 2 of 2 admitted"), found
    assert found["unbounded"].startswith("rejected no bound is declared"), found
    made = {t.id: t for t, _ in journal.records("admitted") if t.kind == "conflict"}
    task = made["bounded-1.0__wordlib-2.0__conflict"]
    assert (task.category, task.stage, task.blame) == ("resolver-conflict", "resolve", "source")
    check = ".regreen/checks/test_regreen_requirements.py::test_requirements_resolve"
    assert task.tests.fail_to_pass == [check]
    assert task.tests.pass_to_pass_count == 4
    assert sorted(task.modes) == ["any_fix", "keep_new"]
    assert "wordlib" in " ".join(task.error_lines)
    other = made["indirect-1.0__loudlib-1.1__conflict"]  # two releases whose bounds are disjoint
    assert other.changed == {"loudlib": "1.0 1.1", "wordlib": "1.0 2.1"}
    assert other.culprit is not None
    assert (other.culprit.good, other.culprit.bad) == ("1.0", "1.1")
    edits = next(fix for fix in other.fixes if fix.mode == "keep_new").edits
    assert [(edit.old, edit.new) for edit in edits] == [("wordlib>=1,<2", "wordlib>=1")]
    journal.close()


@pytest.mark.timeout(900)
async def test_a_key_that_newer_tools_refuse_is_a_build_failure(
    world: World, tmp_path: Path
) -> None:
    journal = await world.mine("build-failure", "dashed", "bounded")
    found = ends(journal, "build-failure")
    assert found["dashed"].startswith("mined 1 of 1 admitted"), found
    assert found["bounded"].startswith("rejected no sign of a build that breaks"), found
    task = tasks(journal, tmp_path, "build-failure")["dashed"]
    assert task.id == "dashed-1.0__setuptools-78.0.1__build"
    assert (task.category, task.stage) == ("build-failure", "build")
    assert {i.partition("::")[2] for i in task.tests.fail_to_pass} == {
        "test_it_builds", "test_it_can_be_imported", "test_its_tests_pass_installed"
    }  # fmt: skip
    assert "setuptools==78.0.1" in task.build.tools
    assert "setuptools==77.0.3" not in task.build.tools  # a mend is known: nothing else is offered
    assert sorted(task.modes) == ["any_fix", "keep_new"]
    assert [(e.old, e.new) for e in task.fixes[0].edits] == [
        ("description-file = README", "description_file = README")
    ]
    assert any("dash-separated" in line for line in task.error_lines)
    journal.close()


@pytest.mark.timeout(900)
async def test_a_runner_that_takes_something_away_is_a_break(world: World, tmp_path: Path) -> None:
    hints = (("marklib", "2.0"),)
    journal = await world.mine("test-runner", "marked", "dashed", hints=hints)
    found = ends(journal, "test-runner")
    assert found["marked"].startswith("mined 1 of 1 admitted"), found
    assert found["dashed"].startswith("rejected no break"), found
    task = tasks(journal, tmp_path, "test-runner")["marked"]
    assert task.id == "marked-1.0__marklib-2.0"
    assert task.culprit is not None
    assert (task.culprit.good, task.culprit.bad) == ("1.1", "2.0")
    assert task.modes == ["any_fix"]
    assert task.tests.fail_to_pass == ["tests/test_marked.py::test_marked"]
    journal.close()


@pytest.mark.timeout(900)
async def test_what_a_newer_python_took_away_is_a_break(world: World, tmp_path: Path) -> None:
    if not set(PYTHONS) <= set(find_all()):
        pytest.skip(f"needs Python {' and '.join(PYTHONS)}")
    journal = await world.mine("interpreter-upgrade", "quoting", "unharmed", "bounded")
    found = ends(journal, "interpreter-upgrade")
    assert found["quoting"].startswith("mined 1 of 1 admitted"), found
    assert found["unharmed"].startswith("rejected everything passes"), found
    assert found["bounded"].startswith("rejected no sign of what a Python took away"), found
    task = tasks(journal, tmp_path, "interpreter-upgrade")["quoting"]
    assert task.id == "quoting-1.0__python-3.13"
    assert (task.good_python, task.python, task.choices) == (*PYTHONS, list(PYTHONS))
    assert task.pins_pass == task.pins_fail
    assert task.culprit is not None
    assert (task.culprit.name, task.culprit.good, task.culprit.bad) == ("python", *PYTHONS)
    assert (task.category, task.stage, task.blame) == ("import-error", "collection", "source")
    assert task.error_lines == ["ModuleNotFoundError: No module named 'pipes'"]
    fixes = [(fix.mode, fix.origin) for fix in task.fixes]
    assert fixes == [("any_fix", "pins-restored"), ("keep_new", "rules")]
    assert [one.rules for one in task.fixes[1].rewrites] == [["python-quote"]]
    journal.close()
