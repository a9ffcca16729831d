"""Between files of other systems and the services: what was read is stored, what is stored written.

- A task of another system is stored as waiting, with what it waits for; none is dropped.
- Where the archive of its image is at hand, the image becomes a State; that verifies nothing.
- A task of ours comes back new: the gate here decides on it, whatever the file says.
- An export is there whole under its name, or not at all; what it leaves out is counted with why.
"""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from regreen.blobs import Digest, open_blobs
from regreen.client.image import file_chunks
from regreen.client.stack import Stack
from regreen.dataset import v1 as pb
from regreen.lockfile import format_lock, lock_of
from regreen.rpc.errors import InvalidArgument, NoSuchFile, NotFound
from regreen.tasks.admit import last_report
from regreen.tasks.formats import sft
from regreen.tasks.formats.items import Foreign, Item, Written
from regreen.tasks.formats.registry import Found, format_of
from regreen.tasks.jsonl import shipped_tasks
from regreen.tasks.patch import LOCK_NAME
from regreen.tasks.records import RecordStore

Show = Callable[[str, float, float, str], None]
"""Called with stage, done, total and a line of text."""
SFT = "sft"
_BATCH = 100
_BATCH_BYTES = 2 << 20
_MOST_BYTES = 8 << 20
_REPO = "/work/repo"


@dataclass(slots=True)
class Imported:
    """What an import did."""

    imported: int = 0
    unchanged: int = 0
    waiting: dict[str, str] = field(default_factory=dict)
    """Task id to what it waits for."""
    native: list[str] = field(default_factory=list)
    """Tasks of ours, to be gated here."""
    repeated: int = 0
    """Rows that said again what another says."""
    states: dict[str, str] = field(default_factory=dict)
    """Task id to the State of its image."""


async def import_found(
    stack: Stack,
    found: Found,
    home: Path,
    keep: RecordStore,
    show: Show,
    *,
    split: str = "",
    images: Path | None = None,
) -> Imported:
    """Store tasks that were read; `images` holds archives named by task id, as `ID.tar`.

    Raises:
        InvalidArgument: a task is malformed; those before it are stored.
    """
    done = Imported(repeated=found.repeated)
    for item in found.native:
        if item.tree:
            await open_blobs(home / "blobs").put(item.tree)
        if item.record is not None:
            keep.put(item.record)
        done.native.append(item.task.id)
    tasks = [item.task for item in found.native] + [item.message() for item in found.foreign]
    await _same_origin(stack, tasks)
    if split:
        for task in tasks:
            task.split = split
    for batch in _batches(tasks):
        answer = await stack.tasks.import_tasks(batch, replace=True)
        done.imported += answer.imported
        done.unchanged += answer.unchanged
        show("import", done.imported + done.unchanged, len(tasks), batch[-1].id)
    new = pb.TaskFilter(statuses=[pb.TASK_STATUS_NEW])
    fresh = {task.id for task in await stack.tasks.all_tasks(new)}
    for place, foreign in enumerate(found.foreign, 1):
        done.waiting[foreign.id] = ", ".join(foreign.needs)
        archive = images / f"{foreign.id}.tar" if images else None
        at_hand = archive is not None and archive.is_file()
        if foreign.id not in fresh and not at_hand:
            continue
        show("record", place, len(found.foreign), foreign.id)
        state_id = await _image(stack, foreign, archive) if archive and at_hand else ""
        await stack.tasks.record_gate(_waiting(foreign, state_id))
        if state_id:
            done.states[foreign.id] = state_id
    return done


async def _same_origin(stack: Stack, tasks: Sequence[pb.Task]) -> None:
    """Refuse to put tasks of one system in the place of those of another.

    Raises:
        InvalidArgument: an id is taken; names it.
    """
    stored = {task.id: task.foreign.format for task in await stack.tasks.all_tasks()}
    for task in tasks:
        there = stored.get(task.id, task.foreign.format)
        if there != task.foreign.format:
            problem = f"{task.id} is stored as a task of {there or 'ours'}"
            raise InvalidArgument("tasks", problem, "give the new one another id")


def _batches(tasks: Sequence[pb.Task]) -> Iterable[list[pb.Task]]:
    batch: list[pb.Task] = []
    size = 0
    for task in tasks:
        size += task.ByteSize()
        if batch and (len(batch) == _BATCH or size > _BATCH_BYTES):
            yield batch
            batch, size = [], task.ByteSize()
        batch.append(task)
    if batch:
        yield batch


async def _image(stack: Stack, foreign: Foreign, archive: Path) -> str:
    """The State of an image archive."""
    labels = {"task": foreign.id, "format": foreign.format}
    answer = await stack.images.import_image(file_chunks(archive), labels=labels)
    state_id: str = answer.state.id
    return state_id


def _waiting(foreign: Foreign, state_id: str) -> pb.GateReport:
    """What the task waits for, as a report of the gate."""
    needs = [need for need in foreign.needs if not (state_id and need.startswith("image "))]
    reason = f"needs {', '.join(needs)}" if needs else "needs a runner of its tests"
    if state_id:
        reason = f"its image is State {state_id}, not verified; {reason}"
    return pb.GateReport(
        task_id=foreign.id, status=pb.TASK_STATUS_WAITING, reason=reason, state_id=state_id
    )


async def items_of(
    stack: Stack, tasks: Sequence[pb.Task], home: Path, keep: RecordStore, show: Show
) -> tuple[list[Item], dict[str, str]]:
    """Tasks with what writers need of them, and why others are left out."""
    shipped = shipped_tasks()
    items: list[Item] = []
    left_out: dict[str, str] = {}
    for place, task in enumerate(tasks, 1):
        show("read tasks", place, len(tasks), task.id)
        if task.labels.get("control") == "true":
            left_out[task.id] = "is a control, which nothing can fix"
            continue
        if task.HasField("foreign"):
            items.append(Item(task))
            continue
        try:
            before = await _before(stack, task)
        except NotFound:
            left_out[task.id] = f"its State is gone: run `regreen tasks prepare {task.id}`"
            continue
        report = await last_report(stack, task.id)
        record = next(iter(keep.of_tasks([task], shipped)), None)
        passing = tuple(report.pass_to_pass) if report is not None else ()
        items.append(Item(task, record, passing, before, await _tree(task, home)))
    return items, left_out


async def _before(stack: Stack, task: pb.Task) -> dict[str, bytes]:
    """The files of the broken State that fixes change.

    Raises:
        NotFound: the State is not there.
    """
    spec = task.environment
    lock = format_lock(lock_of([f"{p.name}=={p.version}" for p in spec.pins], spec.python))
    found = {LOCK_NAME: lock.encode()}
    paths = sorted({change.path for fix in task.fixes for change in fix.changes} - {LOCK_NAME})
    if not paths:
        return found
    if not task.state_id:
        raise NotFound(f"task {task.id!r} has no State")
    box = await stack.sandbox.create_sandbox(task.state_id, labels={"for": "export"})
    try:
        for path in paths:
            try:
                place = f"{_REPO}/{path}"
                answer = await stack.sandbox.read_file(box.id, place, max_bytes=_MOST_BYTES)
            except NoSuchFile:
                continue  # the fix makes it
            found[path] = answer.content
    finally:
        await stack.sandbox.delete_sandbox(box.id)
    return found


async def _tree(task: pb.Task, home: Path) -> bytes:
    """The files of a task that has a tree; empty where they are not in the store here."""
    spec = task.environment
    if not spec.HasField("source_tree"):
        return b""
    digest = Digest(spec.source_tree.sha256, spec.source_tree.size_bytes)
    blobs = open_blobs(home / "blobs")
    return await blobs.get(digest) if await blobs.exists(digest) else b""


async def export_tasks(
    stack: Stack,
    tasks: Sequence[pb.Task],
    format: str,
    out: Path,
    home: Path,
    keep: RecordStore,
    show: Show,
) -> Written:
    """Write tasks in a format into a new directory.

    Raises:
        InvalidArgument: the directory is not empty, or the format is unknown.
        MissingDependency: the format needs a package that is not installed.
    """
    writer = format_of(format)
    with new_directory(out) as partial:
        items, left_out = await items_of(stack, tasks, home, keep, show)
        written = writer.write(items, partial)
        written.left_out |= left_out
        show("write", written.count, len(tasks), str(out))
        return _in_place(written, partial, out)


async def export_chats(
    trajectories: AsyncIterator[pb.Trajectory],
    tasks: Set[str],
    out: Path,
    show: Show,
    *,
    style: str = "tools",
    tokens: bool = False,
) -> Written:
    """Write chats of the trajectories of some tasks into a new directory.

    Raises:
        InvalidArgument: the directory is not empty.
    """
    seen = others = 0

    async def told() -> AsyncIterator[pb.Trajectory]:
        nonlocal seen, others
        async for trajectory in trajectories:
            seen += 1
            show("read trajectories", seen, 0, trajectory.id)
            if trajectory.task_id in tasks:
                yield trajectory
            else:
                others += 1

    with new_directory(out) as partial:
        written = await sft.write(told(), partial, style=style, tokens=tokens)
        if others:
            written.left_out["of other tasks or splits"] = str(others)
        return _in_place(written, partial, out)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out`, for it to be put in its place; nothing is left of it otherwise.

    Raises:
        InvalidArgument: `out` holds something already, or cannot be made or written.
    """
    remedy = "name a directory that does not exist yet, where there is room"
    whole = Path(os.path.abspath(out))
    partial = None
    try:
        if whole.is_symlink() or (whole.exists() and (not whole.is_dir() or any(whole.iterdir()))):
            raise InvalidArgument("out", f"{out} is not empty", remedy)
        whole.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(".new", f".{whole.name[:200]}.", whole.parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
    except OSError as error:
        problem = f"{out} cannot be written: {error.strerror or error}"
        raise InvalidArgument("out", problem, remedy) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _in_place(written: Written, partial: Path, out: Path) -> Written:
    partial.replace(os.path.abspath(out))  # onto an empty directory, or nothing
    written.paths = [out / path.relative_to(partial) for path in written.paths]
    return written
