"""The examples as texts: every call of the sandbox service has one; all are short, listed, run."""

import importlib
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path

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


def test_every_example_is_run_by_a_test() -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    texts = "\n".join(path.read_text() for path in tests)
    for name in EXAMPLES:
        ways = (f"examples/{name}.py", f'"examples" / "{name}.py"', f'"{name}": ', f'("{name}", ')
        assert any(way in texts for way in ways), name
