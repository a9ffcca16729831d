"""Lists of all workers, one page at a time.

- A page costs each worker one page, however long its list is: all of them go on from the place that
  the token names, and what lies before the first place that some worker has not reached is merged.
- A token is a time and a name, as a worker's own; it holds when workers come or go in between.
- A state that several workers hold is listed once, where it is oldest. An action that was seen to
  differ on several workers is listed for each of them.
- A worker that goes away meanwhile has nothing to list.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regreen.rpc.errors import Unavailable
from sandbox_svc.fleet.calls import METHODS, Worker
from sandbox_svc.fleet.registry import Registry
from sandbox_svc.servicer import DEFAULT_PAGE, place_of, token_of

Place = tuple[float, str]
_SLACK_NS = 2_000.0
"""Times travel as nanoseconds and are compared as seconds: so far before a place a worker is asked
to begin, and what it gives twice is left out."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one worker has after a place."""

    worker: str
    entries: Sequence[tuple[Place, Any]]
    more: bool
    """Whether there are more after the last of these."""


async def merged_page(
    registry: Registry, name: str, field: str, filters: Mapping[str, Any], size: int, token: str
) -> tuple[Sequence[Any], str]:
    """One page of the lists of all workers, and the next token; a page may be short.

    Raises:
        InvalidArgument: bad token.
        Unavailable: there is no worker.
    """
    cursor = place_of(token) if token else None
    size = size or DEFAULT_PAGE
    while True:
        asked = (_part(w, name, field, filters, size, cursor) for w in registry.ranked(""))
        parts = [part for part in await asyncio.gather(*asked) if part is not None]
        reached = min((part.entries[-1][0] for part in parts if part.more), default=None)
        answered = frozenset(part.worker for part in parts)
        found = [
            (place, entry)
            for part in parts
            for place, entry in part.entries
            if (reached is None or place <= reached)
            and (field != "states" or registry.is_oldest(entry.id, part.worker, answered))
        ]
        found.sort(key=lambda item: item[0])
        chosen = [entry for _, entry in found[:size]]
        if len(found) > size:
            return chosen, token_of(found[size - 1][0])
        if reached is None:
            return chosen, ""
        if chosen:
            return chosen, token_of(reached)
        cursor = reached


async def _part(
    worker: Worker,
    name: str,
    field: str,
    filters: Mapping[str, Any],
    size: int,
    cursor: Place | None,
) -> _Part | None:
    """What a worker has after a place, if anything is there at least one entry; None if it left."""
    asked = METHODS[name]
    token = token_of((max(0.0, cursor[0] - _SLACK_NS) / 1e9, "")) if cursor else ""
    while True:
        request = asked.request(page_size=size, page_token=token, **filters)
        try:
            response = await worker.ask(asked, request)
        except Unavailable:
            return None
        placed = [(place(entry), entry) for entry in getattr(response, field)]
        fresh = [item for item in placed if cursor is None or item[0] > cursor]
        token = response.next_page_token
        if fresh or not token:
            return _Part(worker.name, fresh, bool(token))


def place(entry: Any) -> Place:
    """Where an entry stands in its list."""
    return float(entry.create_time.ToNanoseconds()), _name(entry)


def _name(entry: Any) -> str:
    """What tells entries of one moment apart."""
    fields = entry.DESCRIPTOR.fields_by_name
    if "id" in fields:
        return str(entry.id)
    return (
        str(entry.action_sha256) if "action_sha256" in fields else entry.SerializeToString().hex()
    )
