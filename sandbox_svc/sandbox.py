"""One running sandbox, as the service keeps it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandbox_svc.backends.base import Box, Limits
from sandbox_svc.egress import Door
from sandbox_svc.state_records import DEFAULT_CWD

if TYPE_CHECKING:
    from sandbox_svc.executions import Execution


@dataclass(slots=True, eq=False)
class Sandbox:
    """A running, disposable fork of a state."""

    id: str
    state_id: str
    box: Box
    layers: tuple[str, ...]
    """Layers below the box that are held for it, lowest first."""
    limits: Limits
    labels: Mapping[str, str]
    tenant: str
    """Whose it is: of the call that made it; empty where it is nobody's."""
    ttl_s: float
    created_s: float
    expires_s: float
    parent_id: str = ""
    """The sandbox that it was forked from."""
    states: list[tuple[str, int | None]] = field(default_factory=list)
    """States that it stands on, oldest first: id, and how many of `layers` show its files; None
    where that is no number of whole layers any more."""
    door: Door | None = None
    """Its way out; None where it has none."""
    cwd: str = DEFAULT_CWD
    """Where commands run that name no directory."""
    calls: int = 0
    executions: "dict[str, Execution]" = field(default_factory=dict)
    """Commands started in it that run or are kept, oldest first."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
