"""Harbor: a directory a task, with its container, its instruction, its verifier and its solution.

- A task of another author is kept file by file with what it needs: its image, or the building of
  one. A directory of task directories is read as a whole.
- A task of ours becomes a Dockerfile that fetches everything by sha256, a verifier that runs the
  required tests, and the reference fix as the solution. The whole task travels in
  `solution/regreen.json`, which no solver sees.
- Harbor verifies in the container that the solver worked in: tests are not restored there.
"""

import base64
import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf.json_format import MessageToDict

from regreen.dataset import v1 as pb
from regreen.lockfile import format_lock, lock_change, lock_of, parse_lock
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb
from regreen.tasks.formats.extension import decode, encode
from regreen.tasks.formats.items import (
    Foreign,
    Item,
    LeftOut,
    Native,
    Written,
    chosen_fix,
    gold_patch,
    own_document,
    statement,
    task_id,
)
from regreen.tasks.formats.rows import Placed, parsed, placed
from regreen.tasks.local import MAX_TREE_BYTES
from regreen.tasks.patch import LOCK_NAME
from regreen.tasks.reading import bounded

name = "harbor"
MAX_TASK_BYTES = 8 << 20
CONFIG, OURS = "task.toml", "solution/regreen.json"
MAX_FILES = 10_000
_STEP = re.compile(r"\w[\w.-]{0,199}")
_SKIPPED = frozenset({".git", "__pycache__", ".DS_Store"})


def is_task(path: Path) -> bool:
    """Whether a directory is a Harbor task."""
    around = ("instruction.md", "environment", "steps")
    return (path / CONFIG).is_file() and any((path / name).exists() for name in around)


def read(path: Path) -> list[Foreign | Native]:
    """The task of a directory, or the tasks of the directories in it.

    Raises:
        InvalidArgument: names the file, the field and the remedy.
    """
    if (path / CONFIG).is_file():
        return [_read_task(path)]
    found = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    for folder in found:
        if folder.is_symlink():
            raise InvalidArgument(folder.name, "is a link", "put the directory itself there")
    if not found:
        remedy = "name a task directory, or a directory of them"
        raise InvalidArgument(str(path), f"has no {CONFIG}", remedy)
    return [_read_task(folder) for folder in found]


def _read_task(folder: Path) -> Foreign | Native:
    config = _config(folder)
    if (folder / OURS).is_file():
        return _native(folder, config)
    files = dict(_files(folder))
    where = f"{folder.name}/{CONFIG}"
    table = config.get("task", {})
    task = Placed(f"{where} field task", {k: v for k, v in table.items() if v not in ("", None)})
    package = task.name("name", required=False) or folder.name
    metadata = config.get("metadata", {})
    return Foreign(
        format=name,
        id=task_id(package, where),
        package=package,
        document=Placed(folder.name, {"files": files}).document(),
        needs=tuple(_needs(folder, config)),
        kind="harbor",
        version=Placed(where, {"version": str(table.get("version") or "")}).name(
            "version", required=False
        ),
        split="train",
        category=_slug(metadata.get("category")),
    )


def _slug(value: object) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", value.lower()).strip("-") if isinstance(value, str) else ""


def _config(folder: Path) -> dict[str, Any]:
    where = f"{folder.name}/{CONFIG}"
    try:
        config = tomllib.loads(_text(folder, CONFIG))
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(where, f"is no TOML: {error}", "correct that line") from error
    except RecursionError as error:
        raise InvalidArgument(where, "is nested too deeply", "write fewer lists") from error
    for section in ("task", "metadata", "verifier", "agent", "environment"):
        if not isinstance(config.get(section, {}), dict):
            raise InvalidArgument(f"{where} field {section}", "is no table", f"write [{section}]")
    version = config.get("schema_version", config.get("version", "1.0"))
    if not isinstance(version, str) or not re.fullmatch(r"1(\.\d+)*", version):
        problem = f"is {version!r}"
        raise InvalidArgument(f"{where} field schema_version", problem, "give one of series 1")
    return config


def _text(folder: Path, place: str) -> str:
    """A text file of a task; never what a link leads to.

    Raises:
        InvalidArgument: it cannot be read, is too large, or no UTF-8.
    """
    where = f"{folder.name}/{place}"
    try:
        return bounded(folder / place, where, MAX_TASK_BYTES, follow=False).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(where, f"cannot be read: {error}", "write it as UTF-8") from error


def _needs(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """What a task waits for; refuses a directory that lacks a part.

    Raises:
        InvalidArgument: names the part.
    """
    environment = config.get("environment", {})
    steps = config.get("steps") or []
    if not isinstance(steps, list):
        raise InvalidArgument(
            f"{folder.name}/{CONFIG} field steps", "is no list", "write [[steps]]"
        )
    image = environment.get("docker_image")
    if image is not None:
        where = f"{folder.name}/{CONFIG} field environment"
        image = Placed(where, environment).name("docker_image")
    if image:
        yield f"image {image}"
    elif any(folder.glob("environment/docker-compose.y*ml")):
        yield "containers of its environment/docker-compose.yaml"
    elif (folder / "environment/Dockerfile").is_file():
        yield "image built from its environment/Dockerfile"
    else:
        where = f"{folder.name}/environment"
        remedy = "add environment/Dockerfile, or environment.docker_image to task.toml"
        raise InvalidArgument(where, "has no Dockerfile", remedy)
    windows = str(environment.get("os", "linux")).lower() == "windows"
    script = "test.bat" if windows else "test.sh"
    wanted = ["instruction.md"] if not steps else []
    for place, step in enumerate(steps):
        named = step.get("name") if isinstance(step, dict) else None
        if not isinstance(named, str) or not _STEP.fullmatch(named):
            where = f"{folder.name}/{CONFIG} field steps[{place}].name"
            problem = "is missing" if named is None else f"is {named!r}"
            raise InvalidArgument(where, problem, "name a directory under steps/")
        wanted.append(f"steps/{step['name']}/instruction.md")
    for part in wanted:
        if not (folder / part).is_file():
            raise InvalidArgument(f"{folder.name}/{part}", "is missing", "add the instruction")
    bundled = (folder / "tests/Dockerfile").is_file()
    if not steps and not bundled and not (folder / f"tests/{script}").is_file():
        where = f"{folder.name}/tests/{script}"
        raise InvalidArgument(where, "is missing", "add the script that writes the reward")
    if windows:
        yield "Windows containers"
    if steps:
        yield f"a runner for its {len(steps)} steps"


def _files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file of a task, bounded in size.

    Raises:
        InvalidArgument: a link, what is no file, an unreadable one, too many of them or too large.
    """
    total = 0
    remedy = "build its image and name it as environment.docker_image"
    for count, path in enumerate(_below(folder)):
        inner = path.relative_to(folder).as_posix()
        place = f"{folder.name}/{inner}"
        if count >= MAX_FILES:
            raise InvalidArgument(place, f"is one of more than {MAX_FILES} files", remedy)
        if not inner.isprintable():
            raise InvalidArgument(place, f"{inner!r} is no name in Unicode", "rename the file")
        data = bounded(path, place, MAX_TASK_BYTES, follow=False)
        total += len(data)
        if total > MAX_TASK_BYTES:
            limit = f"makes the task larger than {MAX_TASK_BYTES >> 20} MiB"
            raise InvalidArgument(place, limit, remedy)
        entry: dict[str, Any] = _content(data)
        if path.stat().st_mode & 0o100:
            entry["executable"] = True
        yield inner, entry


def _below(folder: Path) -> Iterator[Path]:
    """What is no directory in a directory, at any depth, in order; links are not followed."""
    left = [folder]
    while left:
        here = left.pop()
        try:
            found = sorted(here.iterdir(), reverse=True)
        except OSError as error:
            place = f"{folder.name}/{here.relative_to(folder)}"
            raise InvalidArgument(place, f"cannot be read: {error.strerror}") from error
        inner = [path for path in found if path.name not in _SKIPPED]
        left += [path for path in inner if path.is_dir() and not path.is_symlink()]
        yield from (path for path in reversed(inner) if path.is_symlink() or not path.is_dir())


def _content(data: bytes) -> dict[str, Any]:
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


def _native(folder: Path, config: Mapping[str, Any]) -> Native:
    where = f"{folder.name}/{OURS}"
    ours = config.get("metadata", {}).get("regreen", {})
    id = ours.get("id", "") if isinstance(ours, dict) else ""
    text, said = _text(folder, OURS), _text(folder, "tests/required.json")
    try:
        required = placed(f"{folder.name}/tests/required.json", parsed(said))
        named = required.ids("fail_to_pass")
    except ValueError as error:
        if isinstance(error, InvalidArgument):
            raise
        remedy = f"export it again, or remove {OURS}"
        raise InvalidArgument(where, f"or tests/required.json: {error}", remedy) from error
    found = decode(text, where, id=id, fail_to_pass=named)
    digest = found.task.environment.source_tree.sha256
    if not digest:
        return found
    place = f"{folder.name}/environment/repo.tar"
    tree = bounded(folder / "environment/repo.tar", place, MAX_TREE_BYTES, follow=False)
    if hashlib.sha256(tree).hexdigest() != digest:
        raise InvalidArgument(place, "is not the tree of the task", "export the task again")
    return Native(found.task, found.record, tree)


def write(items: Sequence[Item], out: Path) -> Written:
    """Write every task as a directory of its id."""
    written = Written()
    for item in items:
        task = item.task
        target = out / task.id
        try:
            if task.HasField("foreign"):
                restore(own_document(task, name).get("files"), target)
            else:
                _write_native(item, target)
        except LeftOut as reason:
            written.left_out[task.id] = str(reason)
            continue
        written.paths.append(target)
        written.count += 1
    return written


def restore(files: object, target: Path) -> None:
    """Write the files of a document below a directory.

    Raises:
        InvalidArgument: the document is none, or a file of it leaves the directory.
    """
    remedy = "import the task again"
    if not isinstance(files, Mapping):
        raise InvalidArgument("files", "is no object", remedy)
    for place, entry in files.items():
        try:
            text = entry.get("text")
            data = (
                text.encode()
                if text is not None
                else base64.b64decode(entry["base64"], validate=True)
            )
            _put(target, place, data, executable=bool(entry.get("executable")))
        except InvalidArgument:
            raise
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise InvalidArgument(f"files.{place[:200]}", f"is no file: {error}", remedy) from error
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise InvalidArgument(f"files.{place[:200]}", "is a directory too", remedy) from error


def _put(target: Path, place: str, data: bytes, *, executable: bool = False) -> None:
    parts = PurePosixPath(place).parts
    if not parts or ".." in parts or place.startswith("/") or not place.isprintable():
        raise InvalidArgument(f"files.{place[:200]!r}", "leaves the task", "import the task again")
    path = target / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o755 if executable else 0o644)


def _write_native(item: Item, target: Path) -> None:
    """Write a task of ours.

    Raises:
        LeftOut: it cannot be; nothing was written.
    """
    task = item.task
    spec = task.environment
    fixes = [fix for fix in task.fixes if not _moves_python(spec, fix)]
    fix = chosen_fix(pb.Task(fixes=fixes))
    if fix is None and task.fixes and len(fixes) < len(task.fixes):
        raise LeftOut("its fix chooses another interpreter, which one image cannot")
    if spec.overlay:
        raise LeftOut("lays files over its source that are not in an archive")
    if spec.HasField("source_tree") and not item.tree:
        raise LeftOut("its tree is not in the blob store")
    if fix is not None:
        patch = gold_patch(replace(item, task=pb.Task(fixes=fixes)))
        _put(target, "solution/solve.sh", _solve(spec, fix).encode(), executable=True)
        _put(target, "solution/fix.patch", patch.encode())
    _put(target, OURS, encode(item).encode())
    _put(target, CONFIG, _config_text(task).encode())
    _put(target, "instruction.md", statement(task).encode())
    _put(target, "environment/Dockerfile", _dockerfile(spec).encode())
    _put(target, "environment/spec.json", json.dumps(_spec(spec), indent=1).encode())
    _put(target, "environment/prepare.py", _shipped("prepare.py"))
    if item.tree:
        _put(target, "environment/repo.tar", item.tree)
    for file in ("verify.py", "regreen_report.py"):
        _put(target, f"tests/{file}", _shipped(file))
    _put(target, "tests/test.sh", _shipped("test.sh"), executable=True)
    required = {
        "arguments": list(spec.test.arguments),
        "timeout_s": spec.test.timeout.ToNanoseconds() / 1e9 or 600.0,
        "fail_to_pass": list(task.fail_to_pass),
        "pass_to_pass": sorted(item.pass_to_pass),
    }
    _put(target, "tests/required.json", json.dumps(required, indent=1).encode())


def _shipped(file: str) -> bytes:
    return resources.files("regreen.tasks.formats").joinpath("harbor_files", file).read_bytes()


def _lock(spec: sandbox_pb.EnvironmentSpec) -> str:
    pins = [f"{pin.name}=={pin.version}" for pin in spec.pins]
    return format_lock(lock_of(pins, spec.python))


def _fixed_lock(fix: pb.ReferenceFix) -> bytes:
    return next((change.content for change in fix.changes if change.path == LOCK_NAME), b"")


def _moves_python(spec: sandbox_pb.EnvironmentSpec, fix: pb.ReferenceFix) -> bool:
    lock = _fixed_lock(fix)
    return bool(lock) and bool(lock_change(parse_lock(_lock(spec)), parse_lock(lock)).python)


def _solve(spec: sandbox_pb.EnvironmentSpec, fix: pb.ReferenceFix) -> str:
    """The script of the reference fix: the patch, and the packages that it moves."""
    lines = [
        "#!/bin/bash",
        "set -euo pipefail",
        'here=$(cd "$(dirname "$0")" && pwd)',
        "work=${REGREEN_WORK:-/work}",
        'cd "$work/repo"',
        'patch -p1 --no-backup-if-mismatch < "$here/fix.patch"',
    ]
    lock = _fixed_lock(fix)
    if lock:
        moved = lock_change(parse_lock(_lock(spec)), parse_lock(lock))
        pip = '"$work/env/bin/python" -m pip --disable-pip-version-check'
        if moved.removed:
            lines.append(f"{pip} uninstall --yes {shlex.join(moved.removed)}")
        pins = [f"{name}=={version}" for name, version in sorted(moved.installed.items())]
        if pins:
            options = 'install --no-index --no-deps --find-links "$work/wheelhouse"'
            lines.append(f"{pip} {options} {shlex.join(pins)}")
    return "\n".join([*lines, ""])


def _spec(spec: sandbox_pb.EnvironmentSpec) -> dict[str, Any]:
    """What prepare.py needs: names, versions and hashes, nothing that tells what broke."""
    wanted = ("package", "source", "overlay_source", "overlay_paths", "install_mode")
    document = MessageToDict(spec, preserving_proto_field_name=True)
    found = {field: document[field] for field in wanted if field in document}
    pins = {field: document.get(field, []) for field in ("pins", "wheelhouse", "build_pins")}
    return {"install_mode": "none", **found, **pins, "lock": _lock(spec)}


def _dockerfile(spec: sandbox_pb.EnvironmentSpec) -> str:
    return f"""\
# Everything is fetched by sha256; the build argument PIP_INDEX_URL names another index.
FROM python:{spec.python}-bookworm
ARG PIP_INDEX_URL=https://pypi.org/simple
COPY . /work/spec/
RUN python /work/spec/prepare.py && rm -rf /work/spec
ENV PATH=/work/env/bin:$PATH VIRTUAL_ENV=/work/env PYTHONHASHSEED=0 TZ=UTC LANG=C.UTF-8 \\
    PIP_NO_INDEX=1 PIP_FIND_LINKS=/work/wheelhouse
WORKDIR /work/repo
"""


def _quoted(text: str) -> str:
    """A TOML text: JSON's, which has no surrogates to write and no DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _config_text(task: pb.Task) -> str:
    """The task.toml; the verifier needs no network, what a solver needs is the runner's choice."""
    spec = task.environment
    timeout_s = spec.test.timeout.ToNanoseconds() / 1e9 or 600.0
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", task.id)
    facts = {
        "id": task.id,
        "kind": task.kind,
        "package": spec.package,
        "version": spec.version,
        "python": spec.python,
        "split": task.split,
    }
    lines = [
        'schema_version = "1.4"',
        "",
        "[task]",
        f"name = {_quoted(f'regreen/{short}')}",
        f"description = {_quoted(f'{spec.package} {spec.version}: tests fail')}",
        "",
        "[metadata]",
        f"category = {_quoted(task.category or 'build-repair')}",
        "",
        "[metadata.regreen]",
        *(f"{key} = {_quoted(value)}" for key, value in facts.items()),
        "",
        "[verifier]",
        f"timeout_sec = {timeout_s + 60.0}",
        'network_mode = "no-network"',
        "",
        "[agent]",
        "timeout_sec = 4800.0",
        "",
        "[environment]",
        "build_timeout_sec = 1800.0",
        "cpus = 2",
        "memory_mb = 4096",
        "storage_mb = 10240",
        "",
    ]
    return "\n".join(lines)
