"""One event loop in a thread, for callers that have none or many.

- gRPC channels belong to one loop, while callers use `asyncio.run` once per call, or no loop at
  all; so every call of an adapter runs on this one.
- One thread per process, made at the first call; it never keeps the process from ending.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}


def shared_loop() -> asyncio.AbstractEventLoop:
    """The running loop of this process's adapters."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="regreen-adapters", daemon=True).start()
        return loop


def inside() -> bool:
    """Whether this is the thread of the shared loop, which must not wait for itself."""
    try:
        return asyncio.get_running_loop() is _loops.get(os.getpid())
    except RuntimeError:
        return False


def call(work: Coroutine[Any, Any, T], *, timeout_s: float | None = None) -> T:
    """Run `work` on the shared loop and wait for it.

    Raises:
        TimeoutError: it took longer than `timeout_s`; it is cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(work, shared_loop())
    try:
        return future.result(timeout_s)
    except BaseException:
        future.cancel()  # an interrupted caller leaves nothing running
        raise


async def hand_over(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` on the shared loop from any loop; cancelling the caller cancels it."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, shared_loop()))
