"""Starting the ranks of a run, and the channel over which rank 0 leads the others.

- The service starts the ranks of its own machine, rank 0 among them. Over several machines it
  leaves a call in its home, which all of them mount; `learner_svc.node` on each of the others
  answers it with the ranks of that machine. A call is answered once.
- Commands travel over a gloo group of their own, beside whatever the engine uses.
- Threads are divided: ranks on one machine never have more threads than it has processors.
"""

import datetime
import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_COMMANDS: dict[str, Any] = {}
_WAIT = datetime.timedelta(days=7)
"""A follower waits for the next command as long as the driver needs to gather rollouts."""
CALL = "call.json"
"""File below the learner's directory that calls the ranks of other machines."""


@dataclass(frozen=True, slots=True)
class Call:
    """What brings the ranks of a run together."""

    id: str
    address: str
    """Where the ranks of other machines reach rank 0."""
    port: int
    processes: int
    """Ranks of each machine."""
    nodes: int = 1
    """Machines."""

    @classmethod
    def make(cls, address: str, port: int, processes: int, nodes: int) -> "Call":
        """A call that nobody has answered."""
        return cls(uuid.uuid4().hex, address, port, processes, nodes)

    @classmethod
    def read(cls, path: Path) -> "Call | None":
        """The call in a file; None if there is none, or what is there is none.

        Raises:
            OSError: the volume cannot be read.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except (FileNotFoundError, TypeError, ValueError):
            return None

    def to_json(self) -> str:
        """As `read` reads it."""
        return json.dumps(asdict(self))

    def ranks(self, node: int) -> range:
        """Ranks of one machine; the service's own is the first."""
        return range(node * self.processes, (node + 1) * self.processes)


def command(fd: int | None, parent: int) -> list[str]:
    """Command line of one rank; `fd` is the control socket of rank 0."""
    line = [sys.executable, "-m", "learner_svc.worker", "--parent", str(parent)]
    return line if fd is None else [*line, "--fd", str(fd)]


def environment(base: Mapping[str, str], call: Call, rank: int) -> dict[str, str]:
    """Environment of one rank."""
    threads = max(1, len(os.sched_getaffinity(0)) // call.processes)
    return dict(base) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % call.processes),
        "WORLD_SIZE": str(call.processes * call.nodes),
        "MASTER_ADDR": call.address,
        "MASTER_PORT": str(call.port),
        "OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", str(threads))
        if call.processes == 1
        else str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def world_size() -> int:
    """Ranks of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> None:
    """Enter the process group, once; every rank calls it before its first command."""
    import torch.distributed as dist

    if "group" in _COMMANDS:
        return
    if not dist.is_initialized():
        import torch

        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    _COMMANDS["group"] = dist.new_group(backend="gloo", timeout=_WAIT)


def send_command(message: Mapping[str, Any]) -> None:
    """Rank 0: hand a command to all ranks."""
    import torch.distributed as dist

    dist.broadcast_object_list([json.dumps(message)], src=0, group=_COMMANDS["group"])


def receive_command() -> dict[str, Any] | None:
    """Other ranks: the next command; None when rank 0 is gone."""
    import torch.distributed as dist

    box: list[Any] = [None]
    try:
        dist.broadcast_object_list(box, src=0, group=_COMMANDS["group"])
    except RuntimeError:
        return None
    message: dict[str, Any] = json.loads(box[0])
    return message


def from_rank_0(value: str) -> str:
    """What rank 0 called this with; every rank calls it at the same point."""
    import torch.distributed as dist

    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_COMMANDS["group"])
    return box[0]
