"""`python -m learner_svc.broadcast JOB`: rank 0 of a process group, which sends a weights file.

- A process of its own, beside those that train: when a receiver is lost it hangs or dies alone.
- It says on one line where it waits and what it will send, in which order; then it sends, once all
  are there. When it ends, whatever still waits for it is told so by its broken connection.
- It ends by itself: when nobody joins, when sending takes too long, and a while after all is sent.

The group is made as SGLang makes its side (`init_custom_process_group`), from private parts of
torch: the public ones would make it under other names.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

JOIN_S = 60.0
"""Receivers are there by then."""
_LINGER_S = 60.0
"""So long it stays after all was sent: receivers may still read."""
_SLOWEST_BYTES_S = 20e6


@dataclass(frozen=True, slots=True)
class Job:
    """What to send, and to how many."""

    file: str
    receivers: int
    group: str
    host: str
    """Name or address by which receivers reach it."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where it waits, and what it will send."""

    port: int
    backend: str
    tensors: list[tuple[str, str, list[int]]]
    """Name, type as torch calls it, and shape, in the order of sending."""


def main(job: Job) -> None:
    """Wait, send, and stay a while."""
    import torch
    import torch.distributed as dist
    from safetensors import safe_open

    size = job.receivers + 1
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(0)
    backend = "nccl" if gpu else "gloo"
    patience = timedelta(seconds=JOIN_S + Path(job.file).stat().st_size / _SLOWEST_BYTES_S)
    _end_after(patience.total_seconds() + _LINGER_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        job.host, 0, size, True, patience, wait_for_workers=False
    )
    with safe_open(job.file, framework="pt") as weights:
        tensors = [_described(weights, name) for name in weights.keys()]  # noqa: SIM118
        sys.stdout.write(json.dumps(asdict(Waiting(store.port, backend, tensors))) + "\n")
        sys.stdout.flush()
        alone = _end_after(JOIN_S)
        group = _join(store, size, job.group, backend, patience)
        for name, _, _ in tensors:
            tensor = weights.get_tensor(name)
            dist.broadcast(tensor.cuda() if gpu else tensor, src=0, group=group)
            if gpu:
                torch.cuda.synchronize()
            alone.cancel()  # all are there
    time.sleep(_LINGER_S)


def _described(weights: Any, name: str) -> tuple[str, str, list[int]]:
    tensor = weights.get_tensor(name)
    return name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _join(store: Any, size: int, group: str, backend: str, timeout: timedelta) -> Any:
    from torch.distributed import distributed_c10d as c10d

    made, _ = c10d._new_process_group_helper(
        size,
        0,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(group, store),
        group_name=c10d.GroupName(group),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[made] = {rank: rank for rank in range(size)}
    return made


def _end_after(seconds: float) -> threading.Timer:
    """What hangs in a library is ended by nothing else."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
