"""The search for a fix by rules: what is tried, in which order, and what is left of it."""

import io
import tarfile
from collections.abc import Mapping

import pytest

from regreen.common.v1 import common_pb2
from regreen.mine.mending import MAX_TRIES, mended, moved_of, source_texts
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.jsonl import shipped_tasks
from regreen.tasks.model import Fix, Rewrite
from regreen.tasks.rewrites import rewritten_files, sha256

MOVED = {"jinja2": ("3.0.3", "3.1.2"), "markupsafe": ("2.0.1", "2.1.1")}
TEXTS = {
    "a.py": "from jinja2 import Markup\nfrom markupsafe import soft_unicode\n",
    "b.py": "from jinja2 import contextfilter\n",
    "c.py": "from jinja2 import Environment\n",
}


class Needing:
    """Tests that pass once every one of some lines is in its file."""

    def __init__(self, **needs: str) -> None:
        self.needs = {f"{name}.py": line for name, line in needs.items()}
        self.asked: list[set[str]] = []

    async def __call__(self, files: Mapping[str, bytes]) -> bool:
        self.asked.append(set(files))
        texts = {**TEXTS, **{path: content.decode() for path, content in files.items()}}
        return all(line in texts[path] for path, line in self.needs.items())


async def test_the_least_that_passes_is_the_fix() -> None:
    tests = Needing(a="from markupsafe import Markup")
    found = await mended(TEXTS, MOVED, tests)
    assert tests.asked[0] == {"a.py", "b.py"}  # all at once, and no file that no rule changes
    assert found.fix is not None
    (rewrite,) = found.fix.rewrites
    assert (rewrite.path, rewrite.rules) == ("a.py", ["jinja2-markup"])
    assert (found.fix.mode, found.fix.origin) == ("keep_new", "rules")
    assert found.tries == len(tests.asked) < MAX_TRIES


async def test_what_is_needed_stays() -> None:
    tests = Needing(a="soft_str as soft_unicode", b="pass_context")
    found = await mended(TEXTS, MOVED, tests)
    assert found.fix is not None
    kept = {(one.path, *one.rules) for one in found.fix.rewrites}
    assert kept == {("a.py", "markupsafe-soft-str"), ("b.py", "jinja2-pass-context")}


async def test_nothing_is_run_where_no_rule_fits_or_changes_anything() -> None:
    tests = Needing()
    nothing = await mended(TEXTS, {"unknown": ("1", "2")}, tests)
    assert (nothing.fix, nothing.said) == (None, "no rule fits what moved")
    nothing = await mended({"c.py": TEXTS["c.py"]}, MOVED, tests)
    assert (nothing.fix, nothing.said) == (None, "no rule changes a file")
    assert tests.asked == []


async def test_what_is_not_the_source_is_tried_only_if_the_log_speaks_of_a_rule() -> None:
    tests = Needing(a="from markupsafe import Markup")
    found = await mended(TEXTS, MOVED, tests, blame="third-party", log="no module 'x'")
    assert (found.fix, found.said, tests.asked) == (None, "blame is third-party", [])
    log = "ImportError: cannot import name 'Markup' from 'jinja2'"
    assert (await mended(TEXTS, MOVED, tests, blame="third-party", log=log)).fix is not None


async def test_what_does_not_pass_is_named() -> None:
    found = await mended(TEXTS, MOVED, Needing(c="never"))
    assert found.fix is None
    assert found.said.startswith("not enough: jinja2-markup, jinja2-pass-context")
    assert found.tries == 1


async def test_a_rule_for_whole_files_gives_way_to_a_narrow_one() -> None:
    texts = {"a.py": "from pydantic.typing import Annotated\nfrom pydantic import BaseModel\n"}
    seen: list[str] = []

    async def passes(files: Mapping[str, bytes]) -> bool:
        seen.append(files["a.py"].decode())
        return seen[-1] == "from typing import Annotated\nfrom pydantic import BaseModel\n"

    found = await mended(texts, {"pydantic": ("1.10.2", "2.1")}, passes)
    assert found.fix is not None
    assert found.fix.rewrites[0].rules == ["pydantic-typing"]
    assert "pydantic.v1" in seen[0]


async def test_a_fix_is_made_anew_from_the_files_it_names() -> None:
    found = await mended(TEXTS, MOVED, Needing(b="pass_context"))
    assert found.fix is not None
    read = {path: text.encode() for path, text in TEXTS.items()}
    (change,) = await rewritten_files(found.fix, read)
    assert change.content == b"from jinja2 import pass_context as contextfilter\n"
    assert (change.path, change.kind) == ("b.py", common_pb2.CHANGE_KIND_MODIFY)


@pytest.mark.parametrize(
    ("changes", "read", "says"),
    [
        ({"rules": ["no-such"]}, TEXTS["b.py"].encode(), "there is no rule 'no-such'"),
        ({}, b"from jinja2 import contextfilter", "b.py is not the file of the record"),
        ({}, None, "b.py is not in the State"),
        ({"before_sha256": sha256(b"\xff\n")}, b"\xff\n", "b.py is no text"),
        ({"after_sha256": "0" * 64}, TEXTS["b.py"].encode(), "make another file of b.py"),
        ({"rules": ["jinja2-markup"]}, TEXTS["b.py"].encode(), "make another file of b.py"),
    ],
)
async def test_a_fix_that_does_not_fit_is_refused(
    changes: dict[str, object], read: bytes | None, says: str
) -> None:
    plain = Rewrite(
        path="b.py",
        rules=["jinja2-pass-context"],
        before_sha256=sha256(TEXTS["b.py"].encode()),
        after_sha256=sha256(b"from jinja2 import pass_context as contextfilter\n"),
    )
    fix = Fix(mode="keep_new", origin="rules", rewrites=[plain.model_copy(update=changes)])
    with pytest.raises(InvalidArgument, match=says):
        await rewritten_files(fix, {} if read is None else {"b.py": read})


def test_only_source_is_read() -> None:
    made = io.BytesIO()
    names = (
        "p/__init__.py", "p/tests/test_a.py", "test_b.py", "checks/x.py", "docs/conf.py",
        "setup.py", "conftest.py", "p/data.txt", "p/bad.py",
    )  # fmt: skip
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name in names:
            content = b"\xff\xfe" if name == "p/bad.py" else name.encode()
            member = tarfile.TarInfo(f"p-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert source_texts(made.getvalue(), ["checks"]) == {"p/__init__.py": "p/__init__.py"}


def test_what_moved_with_the_culprit_is_known() -> None:
    tasks = {task.id: task for task in shipped_tasks()}
    moved = moved_of(tasks["flask-wtf-0.14.3__flask-3.0.3"])
    assert moved["flask"] == ("1.1.1", "3.0.3")
    assert moved["werkzeug"] == ("1.0.0", "3.0.6")
    assert moved["blinker"] == ("-", "1.8.2")
    assert moved_of(tasks["babel-2.12.1__python-3.13"]) == {"python": ("3.11", "3.13")}
