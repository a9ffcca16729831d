"""What we export, read by those it is for: the parsers of Harbor and SWE-bench.

- They come from the package registry into an environment of their own.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from regreen.dataset import v1 as pb
from regreen.pkgindex import find_uv
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.formats.items import Item
from regreen.tasks.formats.registry import FORMATS, read
from sandbox_svc.builders.interpreters import find_all
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS
from tests.unit.tasks.test_formats import SAMPLES, item

__all__ = ["item"]
pytestmark = pytest.mark.registry
ROOT = Path(__file__).resolve().parents[2]
NEWEST = ("3.14", "3.13", "3.12")


@pytest.fixture(scope="module")
def consumers(registry: None) -> Iterator[Path]:
    """A Python that has the parsers."""
    found = find_all()
    version = next((v for v in NEWEST if v in found), None)
    if version is None:
        pytest.skip("Harbor needs Python 3.12 or newer, which is not here")
    home = Path(tempfile.mkdtemp(prefix="regreen-consumers-"))
    python = home / "bin/python"
    try:
        make = [find_uv(), "venv", "--quiet", "--python", str(found[version].executable), str(home)]
        subprocess.run([*make, "--clear"], check=True, timeout=120)
        argv = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        argv += ["--python", str(python), "-r", str(ROOT / "requirements" / "formats.txt")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        yield python
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def told(consumers: Path, item: Item, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the parsers say of what we export, and of our samples."""
    home = tmp_path_factory.mktemp("exported")
    paths = {}
    for name in ("harbor", "swe-bench", "parquet"):
        (home / name).mkdir()
        paths[name] = FORMATS[name].write([item], home / name).paths[0]
    shutil.copytree(SAMPLES / "harbor", home / "harbor", dirs_exist_ok=True)
    lines = (SAMPLES / "swe-bench/instances.jsonl").read_text().splitlines()
    sample = home / "sample.jsonl"
    sample.write_text(lines[1] + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(home)}
    argv = [consumers, ROOT / "tests/fixtures/format_consumers.py", home / "harbor"]
    argv += [paths["swe-bench"], paths["parquet"], sample]
    done = subprocess.run(
        list(map(str, argv)), env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_harbor_reads_what_we_write(told: dict, item: Item) -> None:
    found = dict(told["harbor"])
    ours = found.pop(item.task.id)
    assert ours["valid"]
    assert ours["name"] == f"regreen/{item.task.id}"
    assert "2 tests fail" in ours["instruction"]
    assert (ours["verifier_timeout_s"], ours["network"]) == (120.0, "no-network")
    assert ours["metadata"]["regreen"]["id"] == item.task.id
    # Our samples are what Harbor takes for tasks, or they would show nothing.
    assert {name: row["valid"] for name, row in found.items()} == {
        "count-rays": True,
        "in-steps": True,
        "with-image": True,
    }


def test_swe_bench_reads_what_we_write(told: dict, item: Item) -> None:
    *ours, sample = told["instances"]
    assert len(ours) == 2
    for (row,) in ours:
        assert row["id"] == item.task.id
        assert sorted(row["fail_to_pass"]) == sorted(FAIL_TO_PASS)
        assert row["pass_to_pass"] == list(item.pass_to_pass)
        assert row["image"] == f"regreen/{item.task.id}:latest"
        assert "SWEBENCH_TEST_EXIT_CODE=$?" in row["script"]
        assert "+from wordlib import salute" in row["patch"]
    assert [row["fail_to_pass"] for row in sample] == [["tests/test_beam.py::test_generator"]]


def test_the_directory_that_harbor_begins_a_task_with_is_read(told: dict, tmp_path: Path) -> None:
    template = Path(told["template"])
    (foreign,) = read(template, "harbor").foreign
    assert foreign.needs == ("image built from its environment/Dockerfile",)
    assert foreign.message().status == pb.TASK_STATUS_UNSPECIFIED
    copy = tmp_path / "copy"
    shutil.copytree(template, copy)
    (copy / "tests/Dockerfile").unlink()
    (copy / "tests/test.sh").unlink()
    with pytest.raises(InvalidArgument, match=r"copy/tests/test.sh: is missing"):
        read(copy, "harbor")
