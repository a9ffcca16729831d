"""Starting the ranks of a run, and the channel over which rank 0 leads the others.

- On one machine the service starts every rank itself; over several, rank 0 runs in the service's
  pod and the others are started by whatever sets the rank variables (JobSet, torchrun):
  `RANK=1 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m learner_svc.worker`.
- Commands travel over a gloo group of their own, beside whatever the engine uses.
- Threads are divided: ranks on one machine never have more threads than it has processors.
"""

import datetime
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

_COMMANDS: dict[str, Any] = {}
_WAIT = datetime.timedelta(days=7)
"""A follower waits for the next command as long as the driver needs to gather rollouts."""


def command(fd: int | None, parent: int) -> list[str]:
    """Command line of one rank; `fd` is the control socket of rank 0."""
    line = [sys.executable, "-m", "learner_svc.worker", "--parent", str(parent)]
    return line if fd is None else [*line, "--fd", str(fd)]


def environment(base: Mapping[str, str], rank: int, processes: int, port: int) -> dict[str, str]:
    """Environment of one local rank; `port` is where rank 0 will listen."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return dict(base) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", str(threads))
        if processes == 1
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
