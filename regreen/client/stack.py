"""The five services as one object: what a driver holds.

- Channels are lazy: a service that is not needed need not run.
- Where the services are, and what clients show there, comes from the caller, or from
  `REGREEN_HOME/run/stack.json`, which `regreen up` writes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from regreen.client.access import Access
from regreen.client.actions import ActionClient
from regreen.client.archive import ArchiveClient
from regreen.client.channel import absent, connect
from regreen.client.dataset import RolloutQueueClient, RunClient, TaskClient, TrajectoryClient
from regreen.client.egress import EgressClient
from regreen.client.exec import ExecClient
from regreen.client.image import ImageClient
from regreen.client.judge import JudgeClient
from regreen.client.knowledge import KnowledgeClient
from regreen.client.learner import LearnerClient
from regreen.client.parking import ParkingClient
from regreen.client.policy import PolicyClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.home import default_home
from regreen.rpc import traces
from regreen.rpc.errors import InvalidArgument, Unavailable

SERVICES = ("dataset", "sandbox", "policy", "judge", "learner")


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the services are; an empty address is of one that is not run."""

    dataset: str = "127.0.0.1:50051"
    sandbox: str = "127.0.0.1:50052"
    policy: str = "127.0.0.1:50053"
    judge: str = "127.0.0.1:50054"
    learner: str = "127.0.0.1:50055"
    access: Access | None = None
    """What clients show there; None is what the environment says."""

    @property
    def addresses(self) -> dict[str, str]:
        """Address by name of the service."""
        return {name: getattr(self, name) for name in SERVICES}

    @classmethod
    def load(cls, home: Path | None = None) -> "Endpoints":
        """The endpoints of the running local stack.

        Raises:
            Unavailable: no stack was started from this home.
            InvalidArgument: the home cannot be read, or its file is damaged.
        """
        path = (home or default_home()) / "run" / "stack.json"
        try:
            described: Mapping[str, Any] = json.loads(path.read_text())
            found: Mapping[str, str] = described["endpoints"]
        except FileNotFoundError as error:
            raise Unavailable(
                f"no local stack is running ({path} is absent); start one with `regreen up`"
            ) from error
        except OSError as error:
            problem = f"{path} cannot be read ({error.strerror})"
            raise InvalidArgument("home", problem, "give the directory of a stack") from error
        except (json.JSONDecodeError, KeyError) as error:
            raise InvalidArgument(
                "stack.json", f"{path} is damaged", "run `regreen up` again"
            ) from error
        access = Access.of_stack(described)
        return cls(**{name: found.get(name, "") for name in SERVICES}, access=access)


class Stack:
    """Clients of all services; use as an async context manager."""

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        patience_s: float = 30.0,
        wrap: Callable[[grpc.aio.Channel], grpc.aio.Channel] = lambda channel: channel,
    ) -> None:
        """`wrap` gets each channel, and the clients what it gives back."""
        self.endpoints = endpoints
        channels = {
            name: wrap(connect(target, endpoints.access)) if target else absent(name)
            for name, target in endpoints.addresses.items()
        }
        self._channels: list[grpc.aio.Channel] = list(channels.values())
        self.tasks = TaskClient(channels["dataset"], patience_s=patience_s)
        self.trajectories = TrajectoryClient(channels["dataset"], patience_s=patience_s)
        self.queue = RolloutQueueClient(channels["dataset"], patience_s=patience_s)
        self.archive = ArchiveClient(channels["dataset"], patience_s=patience_s)
        self.knowledge = KnowledgeClient(channels["dataset"], patience_s=patience_s)
        self.parking = ParkingClient(channels["dataset"], patience_s=patience_s)
        self.runs = RunClient(channels["dataset"], patience_s=patience_s)
        self.state = StateClient(channels["sandbox"], patience_s=patience_s)
        self.sandbox = SandboxClient(channels["sandbox"], patience_s=patience_s)
        self.execs = ExecClient(channels["sandbox"], patience_s=patience_s)
        self.egress = EgressClient(channels["sandbox"], patience_s=patience_s)
        self.actions = ActionClient(channels["sandbox"], patience_s=patience_s)
        self.images = ImageClient(channels["sandbox"], patience_s=patience_s)
        self.policy = PolicyClient(channels["policy"], patience_s=patience_s)
        self.judge = JudgeClient(channels["judge"], patience_s=patience_s)
        self.learner = LearnerClient(channels["learner"], patience_s=patience_s)

    async def __aenter__(self) -> "Stack":
        traces.prepare()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every channel."""
        for channel in self._channels:
            await channel.close()
        await traces.flush()
