"""Every refusal of a field, in every service, says what to do instead."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_SERVICES = ("sandbox", "policy", "judge", "learner", "dataset")


def _bare(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InvalidArgument"):
            named = {keyword.arg for keyword in node.keywords}
            if len(node.args) < 3 and "remedy" not in named:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_every_refusal_names_a_remedy():
    places = [ROOT / "regreen/rpc", *(ROOT / f"{name}_svc" for name in _SERVICES)]
    files = [file for place in places for file in place.rglob("*.py")]
    assert len(files) > 150
    assert [found for file in files for found in _bare(file)] == []
