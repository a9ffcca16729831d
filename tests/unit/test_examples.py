"""The examples as texts: every call of the sandbox service has one; all are short, listed, run.

- However one is called, it ends with what it is for, or with one line and the exit code for it.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import regreen.sandbox.v1

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.stem: path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))}
PAGES = {"mini_swe_agent_env": "adapters.md", "swe_rex_deployment": "adapters.md"}


def methods() -> list[str]:
    """Names of all RPCs of the sandbox service, of services to come too."""
    found = []
    for module in pkgutil.iter_modules(regreen.sandbox.v1.__path__):
        if module.name.endswith("_pb2"):
            stubs = importlib.import_module(f"regreen.sandbox.v1.{module.name}")
            for service in stubs.DESCRIPTOR.services_by_name.values():
                found += [method.name for method in service.methods]
    return found


def uncalled(texts: Iterable[str]) -> set[str]:
    called = {name for text in texts for name in re.findall(r"\.(\w+)\(", text)}
    return set(methods()) - called


def test_every_call_of_the_sandbox_service_has_an_example() -> None:
    assert not uncalled(EXAMPLES.values())
    assert len(methods()) >= 35
    assert uncalled(text for name, text in EXAMPLES.items() if name != "sandbox_files") == {
        *("WriteFile", "ReadFile", "ListFiles", "FindText", "Exec")
    }


def test_examples_are_short() -> None:
    for name, text in EXAMPLES.items():
        lines = text.splitlines()
        if "_" not in name:  # of a whole service, where blank lines do not count
            lines = [line for line in lines if line.strip()]
        assert len(lines) <= (30 if "_" in name else 20), name
        assert max(map(len, text.splitlines())) <= 100, name


def test_examples_are_in_the_docs() -> None:
    listed = (ROOT / "examples/README.md").read_text()
    for name, text in EXAMPLES.items():
        assert f"| `{name}.py` |" in listed
        page = PAGES.get(name, f"services/{name.partition('_')[0]}.md")
        told = (ROOT / "docs" / page).read_text()
        assert text in told or f"`examples/{name}.py`" in told, name
    assert set(re.findall(r"^\| `(\w+)\.py` \|", listed, re.MULTILINE)) == set(EXAMPLES)


@pytest.mark.parametrize(
    "page",
    [page for page in sorted((ROOT / "docs/services").glob("*.md")) if page.stem in EXAMPLES],
    ids=lambda page: page.stem,
)
def test_a_page_of_a_service_begins_with_a_client_that_runs(page: Path) -> None:
    lines = page.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line == "```python")
    assert first < 30
    assert "\n".join(lines[first + 1 :]).startswith(EXAMPLES[page.stem])


def test_every_example_is_run_by_a_test() -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    texts = "\n".join(path.read_text() for path in tests)
    for name in EXAMPLES:
        ways = (f"examples/{name}.py", f'"examples" / "{name}.py"', f'"{name}": ', f'("{name}", ')
        assert any(way in texts for way in ways), name


def ended(name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, f"examples/{name}.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - PAGES.keys() - {"sandbox_image"}))
def test_an_example_without_its_service_ends_with_one_line(name: str) -> None:
    done = ended(name, *["127.0.0.1:1"] * (2 if name == "sandbox_validate" else 1))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: no service answers at 127.0.0.1:1 (Connection refused)\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("judge", "a", "b"), 2, "2 words given, 0 to 1 are taken. Ask the judge about a diff"),
        (("sandbox_image",), 2, "0 words given, 3 to 3 are taken. ADDRESS SOURCE TARGET:"),
        (("sandbox_image", "127.0.0.1:1", "/no/such", "x"), 2, "/no/such: No such file"),
        (("policy", "no-such-host.invalid:1"), 3, "no service answers at no-such-host.invalid:1"),
    ],
)
def test_a_wrongly_called_example_says_so(words: tuple[str, ...], code: int, said: str) -> None:
    done = ended(*words)
    assert done.returncode == code
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


def test_a_bug_is_still_a_traceback(tmp_path: Path) -> None:
    program = tmp_path / "bug.py"
    program.write_text("from regreen.client.script import words\nwords()\nprint(1 / 0)\n")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr
