"""The knowledge base as a service: filled from training tasks and honest successes, and asked.

- What may be seen is the service's decision, made from the asking task that it stores; nothing that
  an agent writes takes part in it.
- Only what trained tasks and solved trajectories without a hack class show is recorded; the service
  checks that again.
- Filling again changes nothing: an item is known by its content.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING

import structlog

from regreen.common.v1 import Mode
from regreen.dataset import v1 as pb
from regreen.lockfile import lock_change, lock_of, normalize, parse_lock
from regreen.rollout.facts import Facts
from regreen.rollout.knowledge import LOCK_NAME, Hit, Move, PastFix, advice, build
from regreen.rollout.logs import PrimaryError, analyse, signature_of
from regreen.rpc.errors import NotFound, RegreenError

if TYPE_CHECKING:
    from regreen.client.stack import Stack

log = structlog.get_logger(__name__)
_BATCH = 500
_QUESTION_CHARS = 2000


SHOWN = "knowledge"
"""Label of a trajectory: the items that it was shown."""


async def fill(stack: "Stack", *, trajectories: int = 200) -> int:
    """Record what training tasks, new solved trajectories and changelogs show; how many are new."""
    wanted = pb.TaskFilter(statuses=[pb.TASK_STATUS_ADMITTED], split="train")
    tasks = {task.id: task for task in await stack.tasks.all_tasks(wanted)}
    items = [*task_items(tasks.values()), *changelog_items()]
    page = await stack.trajectories.list_trajectories(
        page_size=max(1, min(trajectories, 1000)), filter=pb.TrajectoryFilter(solved_only=True)
    )
    for brief in page.trajectories[:trajectories]:
        if brief.task_id in tasks and not brief.reward.hacks:
            whole = await stack.trajectories.get_trajectory(brief.id, without_tokens=True)
            items += trajectory_items(tasks[brief.task_id], whole)
    return await record(stack, items)


async def record(stack: "Stack", items: Sequence[pb.KnowledgeItem]) -> int:
    """Record items in parts; how many are new."""
    recorded = 0
    for start in range(0, len(items), _BATCH):
        answer = await stack.knowledge.record_knowledge(items[start : start + _BATCH])
        recorded += answer.recorded
    return recorded


async def record_use(stack: "Stack", trajectory_id: str, labels: Mapping[str, str]) -> None:
    """Record what a stored trajectory was shown, so that what helps comes first; best effort."""
    if ids := [item_id for item_id in labels.get(SHOWN, "").split(",") if item_id]:
        try:
            await stack.knowledge.record_use(trajectory_id, ids)
        except RegreenError as error:
            log.warning("use not recorded", trajectory_id=trajectory_id, error=str(error))


def task_items(tasks: Iterable[pb.Task]) -> Iterator[pb.KnowledgeItem]:
    """What the reference fixes of admitted training tasks show.

    Raises:
        InvalidArgument: a task is not an admitted training task.
    """
    for fix in build(tasks).fixes:
        yield pb.KnowledgeItem(
            kind="reference-fix",
            task_id=fix.task_id,
            mode=Mode.ValueType(fix.mode),
            error=fix.error,
            signature=fix.signature,
            moves=[
                pb.KnowledgeMove(name=m.name, before=m.before, after=m.after) for m in fix.moves
            ],
            edited=fix.edited,
        )


def trajectory_items(task: pb.Task, made: pb.Trajectory) -> Iterator[pb.KnowledgeItem]:
    """What the diff of a solved trajectory shows."""
    error = analyse(task.error_log)
    lock = next((change for change in made.changes if change.path == LOCK_NAME), None)
    edited = sorted(change.path for change in made.changes if change.path != LOCK_NAME)
    moves: list[pb.KnowledgeMove] = []
    if lock is not None:
        before = lock_of(
            {pin.name: pin.version for pin in task.environment.pins}, task.environment.python
        )
        found = lock_change(before, parse_lock(lock.content))
        moves = [
            pb.KnowledgeMove(name=name, before=before.pins.get(name, ""), after=version)
            for name, version in sorted(found.installed.items())
        ]
        moves += [pb.KnowledgeMove(name=n, before=before.pins[n]) for n in sorted(found.removed)]
    if error is None or not (moves or edited):
        return
    yield pb.KnowledgeItem(
        kind="trajectory",
        task_id=task.id,
        trajectory_id=made.id,
        mode=made.mode,
        error=error.text[:300],
        signature=signature_of(error.type, error.message),
        moves=moves[:12],
        edited=edited[:5],
    )


def changelog_items() -> Iterator[pb.KnowledgeItem]:
    """What is known to have changed in which release of which package."""
    listed = resources.files("regreen.mine").joinpath("data/culprits.jsonl").read_text()
    for line in listed.splitlines():
        known = json.loads(line)
        for version, date, *note in known.get("breaks", ()):
            told = f" changed: {note[0]}" if note else " may break its dependents"
            yield pb.KnowledgeItem(
                kind="changelog",
                culprit=normalize(known["name"]),
                error=f"{known['name']} {version} ({date}){told}",
            )


async def ask(
    stack: "Stack",
    task: pb.Task,
    question: str,
    facts: Facts,
    *,
    error: PrimaryError | None,
    mode: Mode.ValueType,
    limit: int = 2,
) -> list[Hit]:
    """The best advice for a question, best first; none twice."""
    text = question[:_QUESTION_CHARS] or (error.text if error else "")
    search = partial(
        stack.knowledge.search_knowledge,
        text,
        package=task.environment.package or facts.package,
        signature=error.signature if error else "",
        named=facts.suspects(error)[:3],
        mode=mode,
        limit=10,
    )
    try:
        items = await search(task_id=task.id)
    except NotFound:  # a project of one's own: its task is stored nowhere
        items = await search()
    return _hits(items, facts, limit)


def _hits(items: Sequence[pb.KnowledgeItem], facts: Facts, limit: int) -> list[Hit]:
    found: dict[str, Hit] = {}
    for item in items:
        fix = PastFix(
            item.task_id,
            "",
            int(item.mode),
            item.error,
            item.signature,
            tuple(Move(move.name, move.before, move.after) for move in item.moves),
            tuple(item.edited),
        )
        fact = item.kind == "changelog"
        if text := (item.error if fact and _concerns(item, facts) else advice(fix, facts)):
            found.setdefault(text, Hit(fix, item.score, text, item.id))
        if len(found) >= limit:
            break
    return list(found.values())


def _concerns(item: pb.KnowledgeItem, facts: Facts) -> bool:
    return item.culprit in facts.lock.pins
