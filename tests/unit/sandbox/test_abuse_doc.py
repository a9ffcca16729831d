"""The table of attacks in the docs: whole, and true about the tests that it names."""

import ast
import re
from pathlib import Path

_ROOT = Path(__file__).parents[3]
_DOC = _ROOT / "docs/services/abuse.md"
_ABUSE, _SANDBOX = "tests/contract/abuse", "tests/integration/sandbox"
_FILES = {
    "a": f"{_ABUSE}/test_a_resources.py",
    "b": f"{_ABUSE}/test_b_privileges.py",
    "who": f"{_ABUSE}/test_b_users.py",
    "c": f"{_ABUSE}/test_c_network.py",
    "d": f"{_ABUSE}/test_d_files.py",
    "e": f"{_ABUSE}/test_e_states.py",
    "kept": f"{_ABUSE}/test_e_kept.py",
    "locks": f"{_ABUSE}/test_e_locks.py",
    "f": f"{_ABUSE}/test_f_leaks.py",
    "actions": f"{_SANDBOX}/test_actions.py",
    "crash": f"{_SANDBOX}/test_crash.py",
    "transfer": f"{_SANDBOX}/test_transfer.py",
    "images": f"{_SANDBOX}/test_images.py",
    "hostile": f"{_SANDBOX}/test_hostile_images.py",
    "paths": f"{_SANDBOX}/test_path_fuzz.py",
    "runtime": "tests/contract/test_runtime.py",
    "cheats": "tests/integration/sandbox_build/test_cheats.py",
    "validate": "tests/integration/sandbox_build/test_validate.py",
    "beside": "tests/integration/sandbox_build/test_beside.py",
    "written": "tests/integration/sandbox_build/test_written.py",
    "compose": "tests/e2e/test_compose.py",
}
_ROWS = {"A": 7, "B": 10, "C": 3, "D": 3, "E": 4, "F": 2, "G": 3}


def _tests(path: str) -> set[str]:
    tree = ast.parse((_ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {n.name for n in tree.body if isinstance(n, kinds) and n.name.startswith("test_")}


def _rows() -> list[list[str]]:
    lines = _DOC.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if re.fullmatch(r"[A-G]\d+", row[0])]


def test_every_row_is_there_with_all_its_cells() -> None:
    rows = _rows()
    wanted = [f"{letter}{n}" for letter, count in _ROWS.items() for n in range(1, count + 1)]
    assert list(dict.fromkeys(row[0] for row in rows)) == wanted
    for row in rows:
        assert len(row) == 6, row[0]
        assert all(row), row[0]
        assert "::test_" in row[3], f"{row[0]} names no test"


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(\w+)::(test_\w+)`", _DOC.read_text(encoding="utf-8"))
    missing = [f"{file}::{test}" for file, test in named if test not in _tests(_FILES[file])]
    assert len(named) > 80
    assert missing == []


def test_every_abuse_test_is_named() -> None:
    text = _DOC.read_text(encoding="utf-8")
    found = {test for path in _FILES.values() if path.startswith(_ABUSE) for test in _tests(path)}
    assert sorted(test for test in found if test not in text) == []
    assert {path.name for path in (_ROOT / _ABUSE).glob("test_*.py")} == {
        Path(path).name for path in _FILES.values() if path.startswith(_ABUSE)
    }
