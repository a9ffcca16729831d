"""Reading rows of the dataset service, and the config of a run.

- A run's config is fixed when it is created: `settings` is what was asked for, `resolved` what was
  worked out then and must not be worked out again (ids, versions).
- A name used again with other settings is refused, never mixed.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict

from regreen.client.dataset import struct
from regreen.client.stack import Stack
from regreen.dataset import v1 as dataset_pb
from regreen.rpc.errors import AlreadyExists, FailedPrecondition, NotFound
from regreen.train.names import mode_of
from regreen.train.schedule import Candidate

_PAGE = 500
_RUNS = 100


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run and what was worked out when it was created."""

    run: dataset_pb.Run
    resolved: Mapping[str, Any]
    """Numbers come back as floats."""


async def all_trajectories(
    stack: Stack, filter: dataset_pb.TrajectoryFilter
) -> AsyncIterator[dataset_pb.Trajectory]:
    """Every matching trajectory, newest first, without tokens, turns and logs."""
    token = ""
    while True:
        page = await stack.trajectories.list_trajectories(
            page_size=_PAGE, page_token=token, filter=filter
        )
        for trajectory in page.trajectories:
            yield trajectory
        token = page.next_page_token
        if not token:
            return


async def known_run(stack: Stack, id_or_name: str) -> dataset_pb.Run:
    """The run of that id or name.

    Raises:
        NotFound: there is none; names some that there are.
    """
    try:
        return await stack.runs.get_run(id_or_name)
    except NotFound as error:
        names = [run.name for run in (await stack.runs.list_runs(page_size=10)).runs]
        told = f"the newest are {', '.join(names)}" if names else "there is none yet"
        raise NotFound(f"{error.message}; {told}") from error


async def find_run(stack: Stack, name: str) -> dataset_pb.Run | None:
    """The run of that name, or None."""
    try:
        return await stack.runs.get_run(name)
    except NotFound:
        return None


async def open_run(
    stack: Stack,
    name: str,
    kind: str,
    settings: Mapping[str, Any],
    resolved: Mapping[str, Any],
    exact: str = "",
) -> OpenRun:
    """Create the run, or take up the one of that name with the same settings.

    `exact` is kept with a new run: all that it was asked for, where `settings` would round it.

    Raises:
        FailedPrecondition: the name is taken by a run with other settings; says which differ.
    """
    config: dict[str, Any] = {"settings": dict(settings), "resolved": dict(resolved)}
    if exact:
        config["exact"] = exact
    run = (await stack.runs.create_run(name, kind, config=config)).run
    check_same(run, kind, settings)
    return OpenRun(run, MessageToDict(run.config.fields["resolved"].struct_value))


def check_same(run: dataset_pb.Run, kind: str, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was created with other settings.

    Raises:
        AlreadyExists: it is of another kind.
        FailedPrecondition: its settings differ; says which.
    """
    if run.kind != kind:  # as the dataset service says it
        raise AlreadyExists(f"run {run.name!r} is of kind {run.kind}; choose another name")
    stored = run.config.fields["settings"].struct_value
    wanted = struct(settings)
    assert wanted is not None
    if stored != wanted:
        old, new = MessageToDict(stored), MessageToDict(wanted)
        different = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        raise FailedPrecondition(
            f"run {run.name!r} exists with other settings ({', '.join(different)}); "
            "choose another name, or give the settings that it was created with"
        )


async def all_runs(stack: Stack, kind: str = "") -> AsyncIterator[dataset_pb.Run]:
    """Every run of a kind, or of any, newest first."""
    token = ""
    while True:
        page = await stack.runs.list_runs(page_size=_RUNS, page_token=token, kind=kind)
        for run in page.runs:
            yield run
        token = page.next_page_token
        if not token:
            return


async def last_checkpoint(stack: Stack, run_id: str) -> dataset_pb.CheckpointRecord | None:
    """The newest recorded checkpoint of a run, or None."""
    page = await stack.runs.list_checkpoints(run_id, page_size=1)
    return page.checkpoints[0] if page.checkpoints else None


async def all_checkpoints(stack: Stack, run_id: str) -> AsyncIterator[dataset_pb.CheckpointRecord]:
    """Every recorded checkpoint of a run that no rewind has abandoned, newest first."""
    token = ""
    while True:
        page = await stack.runs.list_checkpoints(run_id, page_token=token)
        for record in page.checkpoints:
            yield record
        token = page.next_page_token
        if not token:
            return


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a training run ended."""

    run_id: str
    name: str
    state: str
    steps: int
    """Driver steps contained in the last checkpoint."""
    uri: str
    """Last checkpoint; empty when nothing was learned."""
    policy_version: int
    sha256: str


async def result_of(stack: Stack, run: dataset_pb.Run) -> TrainResult:
    """Where a run stands by its last recorded checkpoint."""
    fresh = await stack.runs.get_run(run.id)
    record = await last_checkpoint(stack, run.id) or dataset_pb.CheckpointRecord()
    return TrainResult(
        run_id=run.id,
        name=run.name,
        state=fresh.state,
        steps=record.step,
        uri=record.uri,
        policy_version=record.policy_version,
        sha256=record.digest.sha256,
    )


async def training_tasks(stack: Stack, ids: Sequence[str], split: str) -> list[dataset_pb.Task]:
    """`wanted_tasks` to learn from, which controls are not; raises as it does."""
    tasks = await wanted_tasks(stack, ids, split)
    fixable = [task for task in tasks if task.labels.get("control") != "true"]
    if not fixable or (ids and len(fixable) < len(tasks)):
        known = {task.id for task in fixable}
        named = ", ".join(task.id for task in tasks if task.id not in known)
        raise FailedPrecondition(f"nothing can fix these controls, learn from others: {named}")
    return fixable


async def wanted_tasks(stack: Stack, ids: Sequence[str], split: str) -> list[dataset_pb.Task]:
    """Tasks by id, or every admitted task of a split, in id order.

    Raises:
        NotFound: an unknown id.
        FailedPrecondition: a task that is not admitted, or no task at all. Each says what to do.
    """
    shown = f"`regreen tasks list --split {split}`"
    if ids:
        try:
            tasks = [await stack.tasks.get_task(id) for id in sorted(set(ids))]
        except NotFound as error:
            raise NotFound(f"{error.message}; {shown} shows those that there are") from error
        refused = [task.id for task in tasks if task.status != dataset_pb.TASK_STATUS_ADMITTED]
        if refused:
            raise FailedPrecondition(
                f"not admitted: {', '.join(refused)}; gate them with "
                f"`regreen tasks verify {' '.join(refused)}`, or choose from {shown}"
            )
        return tasks
    admitted = [dataset_pb.TASK_STATUS_ADMITTED]
    filter = dataset_pb.TaskFilter(statuses=admitted, split=split)
    tasks = sorted(await stack.tasks.all_tasks(filter), key=lambda task: task.id)
    if not tasks:
        raise FailedPrecondition(
            f"no admitted task in split {split!r}; choose from {shown} (`regreen tasks import` "
            "brings the set that ships) and gate them with `regreen tasks verify`"
        )
    return tasks


async def candidates_of(
    stack: Stack, ids: Sequence[str], split: str, modes: Sequence[str]
) -> list[Candidate]:
    """Every (task, mode) pair that is wanted and fair.

    Raises:
        FailedPrecondition: none is.
    """
    wanted = [mode_of(mode, "modes") for mode in modes]
    tasks = await training_tasks(stack, ids, split)
    found = [Candidate(t.id, mode) for t in tasks for mode in wanted if mode in t.modes]
    if not found:
        raise FailedPrecondition(f"none of the {len(tasks)} tasks is fair in {', '.join(modes)}")
    return found
