"""Starting the ranks of a run, and the channel over which rank 0 leads the others.

- The service starts the ranks of its own machine, rank 0 among them. Over several machines it
  leaves a call in its home, which all of them mount; `learner_svc.node` on each of the others
  answers it over a link (`link`), and starts the ranks of that machine once all have answered.
- Over several machines ranks talk over the interface that leads to rank 0: what a machine calls
  itself is often an address that no other reaches.
- Commands travel over a gloo group of their own, beside whatever the engine uses.
- Threads are divided: ranks on one machine never have more threads than it has processors.
"""

import contextlib
import datetime
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_COMMANDS: dict[str, Any] = {}
_WAIT = datetime.timedelta(days=7)
"""A follower waits for the next command as long as the driver needs to gather rollouts."""
_SIOCGIFADDR = 0x8915
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
    link: int = 0
    """Port at `address` where the other machines answer."""
    silence_s: float = 30.0
    """Time without a sign of life after which a machine is lost to the other."""

    @classmethod
    def make(
        cls,
        address: str,
        port: int,
        processes: int,
        nodes: int,
        *,
        link: int = 0,
        silence_s: float = 30.0,
    ) -> "Call":
        """A call that nobody has answered."""
        return cls(uuid.uuid4().hex, address, port, processes, nodes, link, silence_s)

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
    return (
        _interfaces(base, call)
        | dict(base)
        | {
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
    )


def _interfaces(base: Mapping[str, str], call: Call) -> dict[str, str]:
    """What names the interface towards rank 0 to gloo and NCCL; nothing on a single machine."""
    name = interface_to(call.address) if call.nodes > 1 else ""
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), name) if name else {}


def interface_to(address: str) -> str:
    """The interface over which this machine reaches an IPv4 address; empty if none is found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # of a datagram socket: nothing is sent
        except OSError:
            return ""
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no such address
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
                if found == own:
                    return name
    return ""


def how_ended(codes: Mapping[int, int]) -> str:
    """How ranks ended, by their exit codes. Those that a signal ended are the cause, where there
    are any: the others end because they lost them."""
    signalled = {rank: code for rank, code in codes.items() if code < 0}
    said = []
    for rank, code in sorted((signalled or codes).items()):
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        hint = " (out of memory, if nobody sent it)" if code == -signal.SIGKILL else ""
        said.append(f"rank {rank} {'was ' if code < 0 else ''}{how}{hint}")
    return ", ".join(said)


def own_device() -> "torch.device":
    """Where this rank computes: on the GPU of its place among the machine's ranks, else on the CPU.

    NCCL asks for one GPU a rank, and for the rank to have chosen it before the group is made.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def world_size() -> int:
    """Ranks of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> None:
    """Enter the process group, once; every rank calls it before its first command."""
    import torch.distributed as dist

    if "group" in _COMMANDS:
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo" if own_device().type == "cpu" else "nccl")
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
