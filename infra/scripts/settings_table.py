"""Writes the settings tables of docs/services from the settings modules: `--check` only compares.

- Read from the source: name, default and the docstring under each field.
"""

import ast
import sys
from pathlib import Path

from made import keep

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("sandbox", "dataset", "policy", "judge", "learner")
START, END = (
    "<!-- settings: made by infra/scripts/settings_table.py -->",
    "<!-- end of settings -->",
)


def rows(path: Path) -> dict[str, tuple[str, str]]:
    """Default and meaning of each field of the settings class in a module."""
    found: dict[str, tuple[str, str]] = {}
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    for node in classes:
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if text and field.value is not None and "ClassVar" not in ast.unparse(field.annotation):
                meaning = " ".join(str(below.value.value).split()).replace("|", "\\|")
                found[field.target.id] = (default_of(field.value), meaning)
    return found


def default_of(value: ast.expr) -> str:
    """The default as a reader would write it."""
    if isinstance(value, ast.Call):
        named = {keyword.arg: keyword.value for keyword in value.keywords}
        if ast.unparse(value.func) == "SecretStr":
            return default_of(value.args[0])
        if "default" in named:
            return default_of(named["default"])
        return "`REGREEN_HOME`" if "default_home" in ast.unparse(value) else "computed"
    text = ast.unparse(value).strip("'\"")
    return f"`{text}`" if text and text != "None" else "none"


def table(service: str) -> str:
    """The table of one service, shared settings last."""
    own = rows(ROOT / f"{service}_svc" / "settings.py")
    shared = rows(ROOT / "regreen" / "settings.py")
    listed = {**own, **{name: row for name, row in shared.items() if name not in own}}
    lines = [f"| `{name}` | {default} | {text} |" for name, (default, text) in listed.items()]
    return "\n".join([START, "| setting | default | meaning |", "| --- | --- | --- |", *lines, END])


def main() -> int:
    """Write or check every page; the exit code."""
    pages = {}
    for service in SERVICES:
        page = ROOT / "docs" / "services" / f"{service}.md"
        head, _, rest = page.read_text().partition(START)
        pages[page] = head + table(service) + rest.partition(END)[2]
    return keep(pages, "settings_table")


if __name__ == "__main__":
    sys.exit(main())
