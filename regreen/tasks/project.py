"""From a project on disk to its prepared State.

- The project is copied into the blob store; nothing in it is changed.
- One that says how it is built and cannot be installed is tested on its files as they lie.
"""

from collections.abc import Callable
from pathlib import Path

from regreen.blobs import Digest, open_blobs
from regreen.client.stack import Stack
from regreen.rpc.errors import InfraError, InvalidArgument
from regreen.sandbox import v1 as pb
from regreen.tasks.local import Project, pack
from regreen.tasks.pinned import pinned_environment

Show = Callable[[str, float, float, str], None]
"""Called with stage, done, total and a line of text."""


async def pinned_project(
    project: Project, home: Path, show: Show
) -> tuple[pb.EnvironmentSpec, Digest]:
    """The environment of a project, every release by hash, and its files in the blob store.

    `home` is that of the stack: the sandbox service reads blobs from there.

    Raises:
        InvalidArgument: a package or release is not on the index.
        Unavailable: the index cannot be reached.
    """
    data, digest = pack(project.root)
    await open_blobs(home / "blobs").put(data)
    show("pin packages", 0, 1, f"{len(project.pins)} pinned")
    spec = await pinned_environment(project, digest, home / "pins")
    show("pin packages", 1, 1, f"{len(spec.pins)} packages, {len(spec.wheelhouse)} other releases")
    return spec, digest


async def prepared_project(
    stack: Stack, project: Project, home: Path, show: Show
) -> tuple[pb.EnvironmentSpec, pb.State]:
    """The environment of a project and its State.

    Raises:
        InvalidArgument: the environment cannot be made.
        MissingDependency: an interpreter or release is not to be had.
    """
    spec, _ = await pinned_project(project, home, show)
    try:
        return spec, await prepared(stack, spec, show)
    except InvalidArgument as error:
        if spec.install_mode != "editable" or "cannot install" not in error.message:
            raise
        reason = error.message.strip().splitlines()[-1]
        show("prepare", 0, 1, f"not installable, tests run on its files as they lie: {reason}")
    spec.install_mode = "path"
    return spec, await prepared(stack, spec, show)


async def prepared(stack: Stack, spec: pb.EnvironmentSpec, show: Show) -> pb.State:
    """The State of an environment."""
    async for event in stack.state.prepare_state(spec):
        if event.HasField("state"):
            return event.state
        progress = event.progress
        show(f"prepare: {progress.stage}", progress.done, progress.total, progress.message)
    raise InfraError("the sandbox service ended the preparation without a state")
