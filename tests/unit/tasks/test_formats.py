"""Formats of other systems: what is read, what is refused and how, and that it comes back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.formats import swebench
from regreen.tasks.formats.diffs import reversed_diff
from regreen.tasks.formats.extension import KEY, undecided
from regreen.tasks.formats.items import Item
from regreen.tasks.formats.registry import FORMATS, OURS, PROJECT, Found, detect, read
from regreen.tasks.messages import task_message
from regreen.tasks.model import TaskRecord
from regreen.tasks.records import RECORD_LABEL, record_sha256
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.tasks.tiny_record import tiny_record
from tests.fixtures.tasks.tiny_task import FAIL_TO_PASS, TINY

SAMPLES = Path(__file__).resolve().parents[2] / "fixtures" / "formats"
OWN = os.environ.get("REGREEN_FORMAT_SAMPLES", "")
PATHS = {
    "swe-bench": ["swe-bench/instances.jsonl", "swe-bench/instances.json"],
    "swe-smith": ["swe-smith/instances.json"],
    "bump": ["bump"],
    "harbor": ["harbor", "harbor/count-rays", "harbor/with-image", "harbor/in-steps"],
}
FOREIGN = [(name, path) for name, paths in PATHS.items() for path in paths]


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Item:
    """The tiny task as the dataset service has it once it is admitted."""
    home = tmp_path_factory.mktemp("tiny")
    (home / "made").mkdir()
    record, releases = tiny_record(DistStore(home / "dists"), home / "made")
    source = (TINY / "greet/__init__.py").read_bytes()
    mended = source.replace(b"import hello", b"import salute").replace(b"{hello()}", b"{salute()}")
    modify = common_pb.CHANGE_KIND_MODIFY
    change = common_pb.FileChange(path="greet/__init__.py", kind=modify, content=mended, mode=0o644)
    task = task_message(record, releases, fixes={"keep_new/source-edit": [change]})
    task.labels[RECORD_LABEL] = record_sha256(record)
    task.status, task.state_id = pb.TASK_STATUS_ADMITTED, "st_1"
    task.error_log = "E   ImportError: cannot import name 'hello'"
    task.create_time.FromJsonString("2026-01-02T03:04:05Z")
    passing = ("tests/test_greet.py::test_arithmetic",)
    return Item(task, record, passing, {"greet/__init__.py": source})


def messages(found: Found) -> list[pb.Task]:
    return sorted((foreign.message() for foreign in found.foreign), key=lambda task: task.id)


@pytest.mark.parametrize(("name", "path"), FOREIGN)
def test_a_sample_is_found_read_and_written_again_unchanged(
    name: str, path: str, tmp_path: Path
) -> None:
    assert detect(SAMPLES / path) == name
    found = read(SAMPLES / path, name)
    assert found.foreign
    assert not found.native
    for task in messages(found):
        assert task.foreign.needs
        assert task.status == pb.TASK_STATUS_UNSPECIFIED
        assert not task.fixes
    again = written(name, found, tmp_path)
    assert messages(again) == messages(found)


def written(name: str, found: Found, out: Path) -> Found:
    """What comes back of tasks that are written in a format."""
    done = FORMATS[name].write([Item(task) for task in messages(found)], out)
    assert not done.left_out
    assert done.count == len(found.foreign)
    single = done.paths[0] if name in ("swe-bench", "swe-smith", "parquet") else out
    assert detect(single) == name
    return read(single, name)


@pytest.mark.parametrize(("name", "path"), FOREIGN)
def test_every_format_goes_through_parquet(name: str, path: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    found = read(SAMPLES / path, name)
    assert messages(written("parquet", found, tmp_path)) == messages(found)


@pytest.mark.parametrize("name", list(PATHS))
def test_the_published_files_are_read_too(name: str, tmp_path: Path) -> None:
    if not OWN:
        pytest.skip("REGREEN_FORMAT_SAMPLES names no directory of published files")
    paths = [Path(OWN) / name]
    if name in ("swe-bench", "swe-smith"):
        paths = sorted(paths[0].glob("*.json*"))
    if name == "harbor":
        paths = sorted({config.parent.parent for config in paths[0].rglob("task.toml")})
    for place, path in enumerate(paths):
        assert detect(path) == name
        found = read(path, name)
        assert found.foreign
        for form in (name, "parquet"):
            out = tmp_path / f"{place}-{form}"
            out.mkdir()
            assert messages(written(form, found, out)) == messages(found)


def test_what_a_sample_says_is_in_the_task() -> None:
    old, new = messages(read(SAMPLES / BENCH, "swe-bench"))
    assert (old.id, old.environment.package, old.environment.version) == (
        "acme__lantern-101",
        "acme/lantern",
        "2.3",
    )
    assert list(old.fail_to_pass) == ["tests/test_beam.py::test_generator"]
    assert (old.pass_to_pass_count, old.split) == (1, "test")
    image = "image swebench/sweb.eval.x86_64.acme_1776_lantern-{}:latest"
    assert old.foreign.needs[0] == image.format(101)
    assert new.foreign.needs[0] == image.format(204)
    bump = {task.category: task for task in messages(read(SAMPLES / "bump", "bump"))}
    compiled = bump["compile-error"]
    assert (compiled.culprit, compiled.culprit_good_version, compiled.culprit_version) == (
        "org.example.light:light-core",
        "2.1.5",
        "2.2.1",
    )
    assert list(compiled.modes) == [common_pb.MODE_KEEP_NEW]
    assert compiled.foreign.needs[1] == "a builder for Maven with Java 11"
    assert compiled.labels["licence"] == "Apache-2.0"
    assert "licence" not in bump["enforcer"].labels
    harbor = {task.id: task for task in messages(read(SAMPLES / "harbor", "harbor"))}
    assert list(harbor["acme__with-image"].foreign.needs) == [
        "image registry.example/acme/lantern:3"
    ]
    assert harbor["in-steps"].foreign.needs[1] == "a runner for its 2 steps"
    assert harbor["count-rays"].category == "data-processing"


def test_a_task_of_ours_comes_back_whole_from_every_format(item: Item, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for name in ("swe-bench", "swe-smith", "harbor", "parquet"):
        out = tmp_path / name
        out.mkdir()
        done = FORMATS[name].write([item], out)
        assert (done.count, done.left_out) == (1, {}), name
        path = done.paths[0]
        assert detect(path) == name
        (native,) = read(path, name).native
        assert native.task == undecided(item.task)
        assert native.task != item.task
        assert native.record == item.record


def test_bump_and_other_systems_get_only_their_own(item: Item, tmp_path: Path) -> None:
    done = FORMATS["bump"].write([item], tmp_path)
    assert (done.count, list(done.left_out.values())) == (0, ["is no Maven build of BUMP"])
    (foreign,) = messages(read(SAMPLES / "harbor/count-rays", "harbor"))
    for name in ("swe-bench", "swe-smith"):
        left = FORMATS[name].write([Item(foreign)], tmp_path).left_out
        assert left == {"count-rays": "is a task of harbor: export it to that, or to parquet"}


def test_an_exported_instance_says_what_its_readers_look_for(item: Item) -> None:
    row = swebench.row(item)
    assert isinstance(row, dict)
    assert json.loads(row["FAIL_TO_PASS"]) == list(FAIL_TO_PASS)
    assert json.loads(row["PASS_TO_PASS"]) == list(item.pass_to_pass)
    assert "+from wordlib import salute" in row["patch"]
    assert "wordlib" not in row["problem_statement"].partition("## What")[0]
    assert swebench.END in row["eval_script"]


def test_a_fix_that_moves_pins_is_a_patch_of_the_lock(item: Item) -> None:
    task = pb.Task()
    task.CopyFrom(item.task)
    del task.fixes[:]
    task.fixes.extend(fix for fix in item.task.fixes if fix.origin == "pins-restored")
    lock = b"# python==3.11\nwordlib==2.0\n"
    row = swebench.row(Item(task, before={"requirements.lock": lock}))
    assert isinstance(row, dict)
    assert "-wordlib==2.0\n" in row["patch"]
    assert "+wordlib==1.0\n" in row["patch"]


def test_a_task_without_a_fix_is_left_out_with_the_reason(item: Item, tmp_path: Path) -> None:
    task = pb.Task()
    task.CopyFrom(item.task)
    del task.fixes[:]
    done = FORMATS["swe-bench"].write([Item(task)], tmp_path)
    assert done.left_out[task.id].startswith("has no fix")


def test_the_hidden_part_is_hidden_from_solvers(item: Item, tmp_path: Path) -> None:
    FORMATS["harbor"].write([item], tmp_path)
    folder = tmp_path / item.task.id
    seen = [folder / "instruction.md", folder / "task.toml", *folder.glob("environment/*")]
    text = "\n".join(path.read_text() for path in seen)
    assert "salute" not in text
    assert "culprit" not in text
    assert "wordlib==2.0" in text
    assert "salute" in (folder / "solution/fix.patch").read_text()


def edited(folder: Path, place: str, change: Callable[[str], str]) -> Path:
    """A copy of the samples with one file changed."""
    root = folder / "samples"
    shutil.copytree(SAMPLES, root)
    path = root / place
    path.write_text(change(path.read_text()))
    return root


def gone(field: str) -> Callable[[str], str]:
    """Without a field, in the first row."""

    def change(text: str) -> str:
        lines = text.split("\n", 1)
        whole = not text.startswith('{"')
        rows = json.loads(text) if whole else json.loads(lines[0])
        row = rows[0] if isinstance(rows, list) else rows
        inner = row["updatedDependency"] if field.startswith("dependency") else row
        del inner[field]
        return json.dumps(rows) + ("" if whole else "\n" + lines[1])

    return change


def put(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


BENCH, SMITH = "swe-bench/instances.jsonl", "swe-smith/instances.json"
BUMP = "bump/00112233445566778899aabbccddeeff00112233.json"
HARBOR = "harbor/count-rays/task.toml"
MALFORMED = [
    (BENCH, gone("repo"), r"instances.jsonl line 1 field repo: is missing"),
    (BENCH, gone("base_commit"), r"line 1 field base_commit: is missing"),
    (BENCH, gone("problem_statement"), r"line 1 field problem_statement: is missing"),
    (BENCH, gone("patch"), r"line 1 field patch: is missing; give the gold patch"),
    (BENCH, gone("PASS_TO_PASS"), r"line 1 field PASS_TO_PASS: is missing; give a list"),
    (BENCH, put(r'"[\"tests', '"[tests'), r"line 1 field FAIL_TO_PASS: is no JSON"),
    (BENCH, put(r'"[\"tests/test_beam.py::test_generator\"]"', "[1]"), r"has int '1' at place 1"),
    (BENCH, put('"acme/lantern"', "7"), r"line 1 field repo: is int '7', not text"),
    (BENCH, lambda text: text + "{\n", r"instances.jsonl line 3: is no JSON.*one object a line"),
    (BENCH, lambda text: text + "[]\n", r"instances.jsonl line 3: is list"),
    (BENCH, put("lantern-204", "lantern-101"), r"has two tasks acme__lantern-101"),
    (SMITH, gone("image_name"), r"instances.json row 1 field image_name: is missing"),
    (SMITH, put("@@ -8,8 +8,6", "@@ -8,80 +8,6"), r"row 1 field patch: ends inside the hunk"),
    (SMITH, put('"tests/test_beam.py::test_none"', '""'), r"field FAIL_TO_PASS: has str '' at"),
    (SMITH, lambda text: text[:-3], r"instances.json line \d+: is no JSON"),
    (SMITH, lambda text: '"a"', r"instances.json: is str"),
    (BUMP, gone("updatedDependency"), r"00112233.*json field updatedDependency: is missing"),
    (BUMP, gone("dependencyGroupID"), r"field updatedDependency field dependencyGroupID"),
    (BUMP, put("COMPILATION_F", "STRANGE_F"), r"'STRANGE_FAILURE' is not known; give COMPIL"),
    (BUMP, put('"0011', '"00zz'), r"field breakingCommit: is '00zz.*40 hexadecimal"),
    (BUMP, lambda text: text.replace("docker run", "docker pull"), r"names no image"),
    (HARBOR, put("[verifier]", "[verifier"), r"count-rays/task.toml: is no TOML.*line 9"),
    (HARBOR, put('version = "1.0"', "version = 1"), r"field schema_version: is 1; give one of"),
    (HARBOR, put("[agent]\ntimeout_sec = 120.0", "agent_too = 1"), ""),
    (HARBOR, put('version = "1.0"', 'agent = 1\nversion = "1.0"'), r"TOML|field agent"),
]


@pytest.mark.parametrize(("place", "change", "said"), MALFORMED)
def test_what_is_malformed_is_named_with_its_place(
    place: str, change: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    root = edited(tmp_path, place, change)
    name = place.partition("/")[0]
    target = root / name if name in ("bump", "harbor") else root / place
    if not said:  # what a format leaves to its users is no error
        assert read(target, name).foreign
        return
    with pytest.raises(InvalidArgument, match=said):
        read(target, name)


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("instruction.md", "count-rays/instruction.md: is missing"),
        ("tests/test.sh", "count-rays/tests/test.sh: is missing"),
        ("environment/Dockerfile", "count-rays/environment: has no Dockerfile"),
    ],
)
def test_a_harbor_task_without_a_part_is_refused(lacks: str, said: str, tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "harbor", tmp_path / "harbor")
    (tmp_path / "harbor/count-rays" / lacks).unlink()
    with pytest.raises(InvalidArgument, match=said):
        read(tmp_path / "harbor", "harbor")


def test_a_link_in_a_harbor_task_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "harbor/count-rays", tmp_path / "count-rays")
    (tmp_path / "count-rays/tests/secret").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgument, match=r"count-rays/tests/secret: is a link"):
        read(tmp_path / "count-rays", "harbor")


def tampered(row: dict, **changes: object) -> dict:
    ours = json.loads(row[KEY])
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            ours[part][field] = value
        elif value is None:
            del ours[part]
        else:
            ours[part] = value
    return {**row, KEY: json.dumps(ours)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "has version 2, not 1; use the release that wrote it"),
        ({"task": None}, "cannot be read"),
        ({"task__id": "another"}, "is of task 'another', the row of"),
        ({"task__fail_to_pass": ["a"]}, "has other failing tests than the row"),
        ({"task__strange": 1}, "cannot be read.*strange"),
        ({"record__python": "3"}, "cannot be read.*python"),
        ({"record__version": "9"}, "has a record that is not that of its task"),
    ],
)
def test_a_damaged_extension_is_refused(
    item: Item, changes: dict, said: str, tmp_path: Path
) -> None:
    row = swebench.row(item)
    assert isinstance(row, dict)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(tampered(row, **changes)))
    with pytest.raises(InvalidArgument, match=rf"rows.jsonl line 1 field regreen: {said}"):
        read(path, "swe-bench")


def test_a_status_in_a_file_counts_for_nothing(item: Item, tmp_path: Path) -> None:
    row = swebench.row(item)
    assert isinstance(row, dict)
    path = tmp_path / "rows.jsonl"
    claims = {"task__status": "TASK_STATUS_ADMITTED", "task__state_id": "st_9"}
    path.write_text(json.dumps(tampered(row, **claims)))
    (native,) = read(path, "swe-bench").native
    assert native.task.status == pb.TASK_STATUS_UNSPECIFIED
    assert native.task.state_id == ""


def test_rows_that_say_the_same_count_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((SAMPLES / BENCH).read_text() * 2)
    found = read(path, "swe-bench")
    assert (len(found.foreign), found.repeated) == (2, 2)


def test_what_a_path_is_follows_from_its_content(tmp_path: Path, item: Item) -> None:
    assert detect(TINY) == PROJECT
    (tmp_path / "ours.jsonl").write_text(TaskRecord.model_dump_json(item.record) + "\n")
    assert detect(tmp_path / "ours.jsonl") == detect(tmp_path) == OURS
    (tmp_path / "ours.jsonl").unlink()
    (tmp_path / "other.json").write_text('{"a": 1}')
    for path in (tmp_path / "other.json", tmp_path / "nothing", tmp_path):
        with pytest.raises(InvalidArgument, match=r"name one of regreen, swe-bench, .*project"):
            detect(path)


def test_a_diff_turned_around_undoes_it_and_turns_back(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for root, kept in ((before, "one\ntwo\n--- three\nfour"), (after, "one\n2\n--- 3\nfour\n")):
        root.mkdir()
        (root / "kept.txt").write_text(kept)
    (before / "gone.txt").write_text("here\n")
    (after / "made.txt").write_text("new\n\n")
    (before / "old name.txt").write_text("a\nb\nc\nd\ne\n")
    (after / "new name.txt").write_text("a\nb\nc\nd\nE\n")
    words = ["git", "diff", "--no-index", "-M", "--no-prefix", "before", "after"]
    text = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True).stdout
    for side, letter in (("before", "a"), ("after", "b")):
        text = text.replace(f"{side}/", f"{letter}/")
    text = "".join(
        line.replace(" a/", " ", 1) if line.startswith(("rename from ", "copy from ")) else line
        for line in text.splitlines(keepends=True)
    ).replace("rename to b/", "rename to ")
    turned = reversed_diff(text)
    assert reversed_diff(turned) == text
    (tmp_path / "turned.diff").write_text(turned)
    done = subprocess.run(
        ["git", "apply", "../turned.diff"], cwd=after, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + turned
    assert {p.name: p.read_text() for p in after.iterdir()} == {
        p.name: p.read_text() for p in before.iterdir()
    }


def test_binary_files_cannot_be_turned_around() -> None:
    with pytest.raises(InvalidArgument, match="holds binary files"):
        reversed_diff("diff --git a/x b/x\nGIT binary patch\nliteral 3\n")


def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not here')\n")
    code = (
        "from regreen.tasks.formats import parquet; from pathlib import Path\n"
        "from regreen.rpc.errors import MissingDependency\n"
        "try: parquet.write([], Path('.'))\n"
        "except MissingDependency as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "pip install pyarrow" in done.stdout, done.stderr


@pytest.mark.parametrize("place", ["../out.txt", "/tmp/out.txt", "a/../../out.txt"])
def test_a_stored_document_cannot_write_outside_its_directory(place: str, tmp_path: Path) -> None:
    (foreign,) = messages(read(SAMPLES / "harbor/count-rays", "harbor"))
    foreign.foreign.document_json = json.dumps({"files": {place: {"text": "x"}}})
    with pytest.raises(InvalidArgument, match="leaves the task"):
        FORMATS["harbor"].write([Item(foreign)], tmp_path / "out")
    one, _ = messages(read(SAMPLES / "bump", "bump"))
    document = json.loads(one.foreign.document_json) | {"breakingCommit": "../../x"}
    one.foreign.document_json = json.dumps(document)
    with pytest.raises(InvalidArgument, match="breakingCommit"):
        FORMATS["bump"].write([Item(one)], tmp_path)
    assert not list(tmp_path.rglob("*.txt"))


def test_records_of_before_keep_their_digest(item: Item) -> None:
    assert item.record is not None
    text = item.record.model_dump_json()
    assert '"tree"' not in text
    assert '"changes"' not in text
