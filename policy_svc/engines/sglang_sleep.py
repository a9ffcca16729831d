"""Sleep and wake of SGLang servers: their GPU memory is given back, and taken again.

- A server that sleeps says so itself, by the name of its weights' version, which a service that was
  begun anew reads; a server that was begun anew has another name, and is awake.
- It is paused and idle while memory moves: its scheduler ends itself when it has a request then, or
  is told to take what it has not given, and a request on memory that is gone ends it too.
- Released weights are gone: they are loaded before requests are let in, whatever served before.
- A server that fails to wake gives back what it took, and sleeps on.

Source: sglang 0.5.16, `srt/managers/scheduler_components/weight_updater.py`, `http_server.py`.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from policy_svc.engines.sglang_replica import Replica, Unanswered, all_of, problems
from policy_svc.engines.sglang_wire import asleep, sleeps
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, RegreenError, Unavailable
from regreen.rpc.logging import get

_WEIGHTS, _CACHE = "weights", "kv_cache"
_LULL_S = 30.0
"""Requests that were ended are gone by then."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a server serves, or is to serve, by the server's own names."""

    path: str
    label: str
    """Name of the version."""
    adapter: tuple[str, str] | None = None
    """Name and place of the adapter that is sampled from."""


class StillAsleep(Unavailable):
    """Servers sleep that should not."""


def gives_back(server_info: dict[str, Any]) -> bool:
    """Whether a server would really release memory: without this it says yes, and does not."""
    return bool(server_info.get("enable_memory_saver"))


async def sleep_all(replicas: Sequence[Replica], held: Held) -> None:
    """Have every server sleep; none does when it raises, but for `StillAsleep`.

    Raises:
        FailedPrecondition: a server has nothing to give back, or runs requests of others.
        Unavailable: one cannot be reached.
        StillAsleep: one failed, and so did having the others awake again.
    """
    await asyncio.gather(*(_check(replica) for replica in replicas))
    try:
        await sleep_too(replicas)
    except RegreenError as problem:
        try:
            await wake_all(replicas, held)
        except RegreenError as error:
            raise StillAsleep(
                f"not all servers went to sleep ({problem.message}), nor do all wake again "
                f"({error.message}); wake the policy",
                retry_after_s=1.0,
            ) from error
        raise


async def sleep_too(replicas: Sequence[Replica]) -> None:
    """Have those sleep that do not: one that was begun anew while others slept.

    Raises:
        FailedPrecondition, Unavailable: as `sleep_all`; others sleep.
    """
    await all_of([_fall_asleep(replica) for replica in replicas])


async def wake_all(replicas: Sequence[Replica], held: Held) -> None:
    """Have every server awake with `held`; all sleep when it raises.

    Raises:
        FailedPrecondition: the weights cannot be loaded.
        Unavailable: a server cannot be reached, or has no room.
    """
    try:
        await all_of([_wake(replica, held) for replica in replicas])
    except RegreenError:
        again = [_fall_asleep(replica) for replica in replicas]
        for replica, problem in zip(replicas, await problems(again), strict=True):
            if problem:
                get().warning("not put to sleep again", url=replica.url, problem=str(problem))
        raise


async def _check(replica: Replica) -> None:
    if not gives_back(await replica.json("GET", "/server_info")):
        raise FailedPrecondition(
            f"{replica.url} has no memory to give back; start it with --enable-memory-saver"
        )


async def _fall_asleep(replica: Replica) -> None:
    """Pause, wait until idle, and release; does nothing to a server that sleeps."""
    label = await _label(replica)
    if sleeps(label):
        return
    await _idle(replica, _LULL_S)
    try:
        await replica.json("POST", "/pause_generation", {"mode": "in_place"})
        await _idle(replica, 0.0)  # nothing came between the two
        await _name(replica, asleep(label))
    except RegreenError:
        await _go_on(replica, label)
        raise
    try:
        await _release(replica, _CACHE, _WEIGHTS)
    except Unanswered:
        raise  # it may have: it is taken for asleep
    except RegreenError:
        await _go_on(replica, label)
        raise


async def _go_on(replica: Replica, label: str) -> None:
    """Undo what was done before a release."""
    with suppress(RegreenError):
        await _name(replica, label)
        await replica.json("POST", "/continue_generation", {})


async def _wake(replica: Replica, held: Held) -> None:
    """Take memory and load weights; a server that does not sleep only loads what it lacks."""
    label = await _label(replica)
    if not sleeps(label):
        if label != held.label:
            await replica.push(held.path, held.label)
        await _put(replica, held)
        await replica.json("POST", "/continue_generation", {})
        return
    taken: list[str] = []
    try:
        await _take(replica, _WEIGHTS)
        taken.append(_WEIGHTS)
        await replica.push(held.path, asleep(held.label), paused=True)
        await _take(replica, _CACHE)
        taken.append(_CACHE)
        await _put(replica, held)
        await _name(replica, held.label)
    except RegreenError:
        with suppress(RegreenError):
            await _release(replica, *taken)
        raise
    await replica.json("POST", "/continue_generation", {})


async def _put(replica: Replica, held: Held) -> None:
    if held.adapter:
        await replica.put_adapter(*held.adapter)


async def _take(replica: Replica, tag: str) -> None:
    try:
        await replica.json("POST", "/resume_memory_occupation", {"tags": [tag]})
    except InvalidArgument as error:
        raise Unavailable(
            f"{replica.url} does not get its memory: {error.message}", retry_after_s=5.0
        ) from error


async def _release(replica: Replica, *tags: str) -> None:
    if not tags:
        return
    try:
        await replica.json("POST", "/release_memory_occupation", {"tags": list(tags)})
    except InvalidArgument as error:
        raise FailedPrecondition(
            f"{replica.url} does not give its memory back: {error.message}"
        ) from error


async def _idle(replica: Replica, wait_s: float) -> None:
    """Raises: FailedPrecondition: the server still runs requests."""
    try:
        await replica.json("POST", f"/flush_cache?timeout={wait_s:g}")
    except InvalidArgument as error:
        raise FailedPrecondition(
            f"{replica.url} runs requests of somebody else: {error.message}"
        ) from error


async def _name(replica: Replica, label: str) -> None:
    body = {"new_version": label, "abort_all_requests": False}
    await replica.json("POST", "/update_weight_version", body)


async def _label(replica: Replica) -> str:
    return str((await replica.json("GET", "/model_info")).get("weight_version"))
