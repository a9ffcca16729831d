"""Files that somebody made to do harm: each is refused by name, and nothing of it is left."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument
from regreen.tasks.formats import harbor
from regreen.tasks.formats.diffs import reversed_diff
from regreen.tasks.formats.registry import detect, read

SAMPLES = Path(__file__).resolve().parents[2] / "fixtures" / "formats"
DEEP = "[" * 100_000 + "]" * 100_000
INSTANCE = json.loads((SAMPLES / "swe-bench/instances.jsonl").read_text().splitlines()[0])
SMITH = json.loads((SAMPLES / "swe-smith/instances.json").read_text())[0]
UPDATE = json.loads((SAMPLES / "bump/00112233445566778899aabbccddeeff00112233.json").read_text())


def line(row: dict, **changes: object) -> str:
    return json.dumps({**row, **changes})


ROWS = [
    ("swe-bench", DEEP, r"line 1: is no JSON: it is nested too deeply"),
    ("swe-bench", line(INSTANCE, FAIL_TO_PASS=DEEP), r"FAIL_TO_PASS: is no JSON: .*too deeply"),
    ("swe-bench", line(INSTANCE, regreen=DEEP), r"field regreen: cannot be read: .*too deeply"),
    ("swe-bench", line(INSTANCE, hints_text=float("nan")), r"line 1: has what no JSON text"),
    ("swe-bench", line(INSTANCE, hints_text="\ud800"), r"line 1: has what no JSON text"),
    ("swe-bench", line(INSTANCE, hints_text="x" * (9 << 20)), r"line 1: has \d+ bytes; keep"),
    ("swe-bench", line(INSTANCE, repo="a/b\x1b]0;x\x07"), r"field repo: .* control characters"),
    ("swe-bench", line(INSTANCE, image="a\0b"), r"field image: .* control characters"),
    ("swe-bench", line(INSTANCE, repo="a" * 501), r"field repo: has 501 characters"),
    ("swe-bench", line(INSTANCE, instance_id="../.."), r"line 1: is named '../..', which makes"),
    ("swe-bench", line(INSTANCE, FAIL_TO_PASS=["a\0"]), r"FAIL_TO_PASS: has str 'a\\x00' at"),
    ("swe-bench", line(INSTANCE, created_at={"a": 1}), r"created_at: is dict, not text"),
    ("swe-smith", line(SMITH, patch="hello"), r"field patch: is no unified diff"),
    ("swe-smith", line(SMITH, patch=f"--- a\n+++ b\n@@ -{'9' * 5000} +1 @@\n-a\n"), r"patch"),
    ("bump", line(UPDATE, project="..."), r"."),
    ("bump", line(UPDATE, projectOrganisation="a\nb"), r"projectOrganisation: .* control char"),
]


@pytest.mark.parametrize(("name", "text", "said"), ROWS, ids=range(len(ROWS)))
def test_a_hostile_row_is_refused_by_its_field(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text + "\n")
    if said == ".":  # strange, and no harm
        (found,) = read(path, name).foreign
        assert found.id == UPDATE["breakingCommit"]
        return
    if "9" * 5000 in text:  # a head that is none: no hunk, no number of 5000 digits
        assert read(path, name).foreign
        return
    with pytest.raises(InvalidArgument, match=said):
        read(path, name)


@pytest.mark.parametrize("name", ["swe-bench", "bump", "regreen"])
def test_a_pipe_and_a_device_are_never_waited_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    os.mkfifo(path)
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match="is no file"):
        detect(path) if name == "regreen" else read(path, name)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(InvalidArgument, match="is no file"):
        detect(path)
    assert time.monotonic() - began < 5


def given(place: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)

    return change


def linked(place: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).unlink(missing_ok=True)
        (folder / place).symlink_to(target)

    return change


def piped(folder: Path) -> None:
    os.mkfifo(folder / "environment/pipe")


def unnamed(folder: Path) -> None:
    (folder / os.fsdecode(b"environment/\xff")).write_text("x")


def crowded(folder: Path) -> None:
    for number in range(harbor.MAX_FILES + 1):
        (folder / f"environment/{number}").touch()


def nested(folder: Path) -> None:
    here = folder / "environment" / "/".join("d" * 400)
    here.mkdir(parents=True)
    (here / "leaf").touch()


def config(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "task.toml").read_text()
        assert old in text
        (folder / "task.toml").write_text(text.replace(old, new, 1))

    return change


HEAD = 'version = "1.0"'
DIRECTORIES = [
    (given("task.toml", f"a = {DEEP}"), "task.toml: is nested too deeply"),
    (linked("task.toml", "/etc/passwd"), "task.toml: is a link"),
    (linked("solution/regreen.json", "/etc/passwd"), "solution/regreen.json: is a link"),
    (given("solution/regreen.json", "x" * (9 << 20)), "regreen.json: is too large"),
    (given("solution/regreen.json", "{}"), "tests/required.json"),
    (piped, "environment/pipe: is no file"),
    (unnamed, "is no name in Unicode"),
    (crowded, "is one of more than 10000 files"),
    (config(HEAD, f"{HEAD}\nsteps = 3"), "field steps: is no list"),
    (config(HEAD, f'{HEAD}\nsteps = [{{name = "../../../etc"}}]'), r"steps\[0\].name: is"),
    (config(HEAD, f"{HEAD}\n[task]\nname = 7"), "field task field name: is int '7'"),
    (config(HEAD, f'{HEAD}\n[task]\nname = "\\u001b[2J"'), "control characters"),
    (config("[environment]", "[environment]\ndocker_image = 3"), "docker_image: is int '3'"),
]


@pytest.mark.parametrize(("change", "said"), DIRECTORIES, ids=range(len(DIRECTORIES)))
def test_a_hostile_directory_is_refused_by_its_file(
    change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "count-rays"
    shutil.copytree(SAMPLES / "harbor/count-rays", folder)
    change(folder)
    with pytest.raises(InvalidArgument, match=said):
        read(folder, "harbor")


def test_a_deep_directory_is_read_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "count-rays"
    shutil.copytree(SAMPLES / "harbor/count-rays", folder)
    nested(folder)
    (found,) = read(folder, "harbor").foreign
    assert any(place.endswith("d/leaf") for place in found.document["files"])


def test_a_directory_of_links_to_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "count-rays").symlink_to(SAMPLES / "harbor/count-rays")
    with pytest.raises(InvalidArgument, match="count-rays: is a link"):
        read(tmp_path, "harbor")


FILES = {
    "task.toml": {"text": (SAMPLES / "harbor/count-rays/task.toml").read_text()},
    "instruction.md": {"text": "do"},
    "environment/Dockerfile": {"text": "FROM x"},
    "tests/test.sh": {"text": "true"},
}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"repo": "a/..", "document": {"files": {**FILES, "stolen.txt": {"text": "x"}}}}, ""),
        ({"document": {"files": {**FILES, "../stolen.txt": {"text": "x"}}}}, "leaves the task"),
        ({"document": {"files": {**FILES, "a\0b": {"text": "x"}}}}, "leaves the task"),
        ({"document": {"files": {**FILES, "": {"text": "x"}}}}, "leaves the task"),
        ({"document": {"files": {**FILES, "a": {"text": 1}}}}, "files.a: is no file"),
        ({"document": {"files": {**FILES, "a": 1}}}, "files.a: is no file"),
        ({"document": {"files": {**FILES, "a": {"base64": "?"}}}}, "files.a: is no file"),
        ({"document": {"files": {**FILES, "a": {"text": ""}, "a/b": {"text": ""}}}}, "directory"),
        ({"document": {"files": 3}}, "field files: is no object"),
        ({"document": [1]}, "field document: is list"),
        ({"document": {}, "format": "strange"}, "'strange' is not known"),
    ],
    ids=range(11),
)
def test_a_hostile_row_of_parquet_writes_nothing_outside(
    columns: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    row = {"format": "harbor", "repo": "acme/count-rays", **columns}
    row["document"] = json.dumps(row["document"])
    path = tmp_path / "tasks.parquet"
    parquet.write_table(arrow.Table.from_pylist([row]), path)
    if said:
        with pytest.raises(InvalidArgument, match=said):
            read(path, "parquet")
    else:
        assert read(path, "parquet").foreign
    assert not list(tmp_path.rglob("stolen.txt"))
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("value", [3, 1.5, [1], b"x"])
def test_a_column_of_another_type_is_named(value: object, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "tasks.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"format": "harbor", "document": value}]), path)
    with pytest.raises(InvalidArgument, match="row 1 field document: is"):
        read(path, "parquet")
    parquet.write_table(arrow.Table.from_pylist([{"format": value, "document": "{}"}]), path)
    with pytest.raises(InvalidArgument, match="row 1 field format: "):
        read(path, "parquet")


def test_a_small_parquet_file_of_many_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("regreen.tasks.formats.parquet.MAX_FILE_BYTES", 1 << 20)
    rows = [{**INSTANCE, "instance_id": f"a__{n}", "hints_text": "x" * 30_000} for n in range(100)]
    rows = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows]
    path = tmp_path / "tasks.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, compression="zstd")
    assert path.stat().st_size < 1 << 18
    with pytest.raises(InvalidArgument, match=r"tasks.parquet: is too large"):
        read(path, "parquet")


def test_two_updates_of_one_commit_do_not_overwrite_each_other(tmp_path: Path) -> None:
    from regreen.tasks.formats.items import Item
    from regreen.tasks.formats.registry import FORMATS

    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text(line(UPDATE))
    (tmp_path / "in/b.json").write_text(line(UPDATE, project="another"))
    tasks = [found.message() for found in read(tmp_path / "in", "bump").foreign]
    done = FORMATS["bump"].write([Item(task) for task in tasks], tmp_path)
    assert (done.count, list(done.left_out.values())) == (
        1,
        ["has the breaking commit of another task"],
    )


def test_a_diff_is_told_from_other_text() -> None:
    with pytest.raises(InvalidArgument, match="is no unified diff"):
        reversed_diff("some text\n")
