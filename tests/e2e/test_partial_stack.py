"""`regreen up` where not all is installed: it says at once what is missing, and leaves nothing.

- Packages are hidden from every process of a home as if they were not installed.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from regreen.stack.layout import Layout
from tests.e2e.conftest import Local

HIDDEN = ("sqlalchemy", "psycopg", "alembic", "tokenizers", "starlette", "uvicorn", "torch")


def without(local: Local, folder: Path, home: Path, *names: str) -> Local:
    """An environment of its own in which these packages are not there."""
    folder.mkdir(exist_ok=True)
    text = f"import sys\nfor name in {names!r}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(text)
    return replace(local, home=home, env={**local.env, "PYTHONPATH": str(folder)})


@pytest.fixture
def home() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="regreen-parts-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_up_names_what_is_not_installed(local: Local, tmp_path: Path, home: Path) -> None:
    alone = without(local, tmp_path / "path", home / "new", *HIDDEN)
    began_s = time.monotonic()
    assert alone.cli("status").returncode == 3
    asked_s = time.monotonic()
    done = alone.cli("up", "--ports", "any")
    assert time.monotonic() - asked_s < 3 * (asked_s - began_s) + 5, "nothing was started"
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "dataset (sqlalchemy, psycopg, alembic), policy (tokenizers" in said
    assert "pip install 'PATH/TO/CHECKOUT[dataset,localpg,policy,learner]'" in said
    assert "`regreen up --only sandbox --only judge`" in said
    assert "Traceback" not in done.stderr
    assert not Layout(home / "new").home.exists()


def test_what_is_installed_runs_alone(local: Local, tmp_path: Path, home: Path) -> None:
    alone = without(local, tmp_path / "path", home, *HIDDEN)
    words = ("up", "--ports", "any", "--only", "sandbox", "--only", "judge")
    try:
        done = alone.cli(*words, "--json")
        assert done.returncode == 0, done.stderr
        assert [row["name"] for row in json.loads(done.stdout)] == ["sandbox", "judge"]
        assert "waiting for" in done.stderr
        assert "dataset" not in done.stderr
        assert alone.cli(*words).returncode == 0
        assert list(alone.rows()) == ["sandbox", "judge"]
        assert alone.cli("status").returncode == 0
        assert alone.cli("sandbox", "list").returncode == 0
        listing = alone.cli("tasks", "list")
        assert listing.returncode == 3
        assert "this stack runs no dataset service" in " ".join(listing.stderr.split())
        other = alone.cli("up", "--ports", "any", "--only", "sandbox")
        assert other.returncode == 1
        assert "the stack runs sandbox, judge alone" in " ".join(other.stderr.split())
    finally:
        assert alone.cli("down").returncode == 0
    assert {row["state"] for row in alone.rows().values()} == {"down"}


def test_a_service_that_ends_again_and_again_fails_up(
    local: Local, tmp_path: Path, home: Path
) -> None:
    """Of what a service imports some is found, so that only its start shows that it cannot run."""
    broken = without(local, tmp_path / "path", home, "jinja2")
    began_s = time.monotonic()
    done = broken.cli("up", "--ports", "any", "--only", "judge")
    assert time.monotonic() - began_s < 60
    assert done.returncode == 3
    said = " ".join(done.stderr.split())
    assert "judge: not serving; judge said last: ModuleNotFoundError" in said
    assert "Traceback" not in done.stderr
    assert not Layout(home).supervised()
    assert {row["state"] for row in broken.rows().values()} == {"down"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "sandboxes"), "only: 'sandboxes' is unknown; give dataset, sandbox"),
        (("--only", "judge", "--engine", "scripted"), "only: has no policy"),
    ],
)
def test_wrong_names_start_nothing(
    local: Local, home: Path, words: tuple[str, ...], said: str
) -> None:
    done = replace(local, home=home / "new").cli("up", *words)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert not (home / "new").exists()
