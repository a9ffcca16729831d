"""Another clock and another host name for one run: what Python code reads, nothing else.

- Standard library only, Python 3.7 and newer.
- The clock moves by a fixed time: `time.time` and its relatives, and `now`, `utcnow` and `today` of
  the very `datetime` types, so that identity, pickling and subclasses stay what they are.
- Time that only passes (`monotonic`, `perf_counter`, `sleep`), time limits, file times, other
  programs and native code that asks the kernel itself keep the true clock.
- The host name is that of `socket.gethostname`, `os.uname` and what is built on them; it resolves.
  With it comes another number of processors, of `os.cpu_count` and `os.sched_getaffinity`.
- What cannot be brought about is told, and left as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

_UTCNOW = (
    "datetime.datetime.utcnow() is deprecated and scheduled for removal in a future version. "
    "Use timezone-aware objects to represent datetimes in UTC: "
    "datetime.datetime.now(datetime.UTC)."
)
_OWN_CLOCKS = ("time_machine", "libfaketime")
"""Packages that exchange the clock's functions below Python, and would end the process here."""


def apply(setup: dict[str, Any]) -> dict[str, str]:
    """Bring about what `setup` asks for; what could not be, and why."""
    unmet = {}
    if setup.get("clock_s"):
        problem = _move_clock(setup["clock_s"])
        if problem:
            unmet["clock_offset"] = problem
    if setup.get("host"):
        _rename_host(setup["host"])
    return unmet


def _move_clock(offset_s: float) -> str:
    own = [name for name in _OWN_CLOCKS if importlib.util.find_spec(name) is not None]
    if own:
        return own[0] + " is installed, which moves the clock itself"
    try:
        _move_datetime(offset_s)
    except (ImportError, AttributeError, TypeError, IndexError) as error:
        return f"the clock of datetime cannot be moved here: {error}"
    _move_time(offset_s)
    return ""


def _move_time(offset_s: float) -> None:
    """The functions of `time` that tell what time it is."""
    import time

    real = {name: getattr(time, name) for name in dir(time)}
    moved: dict[str, Any] = {
        "time": lambda: real["time"]() + offset_s,
        "time_ns": lambda: real["time_ns"]() + int(offset_s) * 10**9,
        "clock_gettime": lambda clock: (
            real["clock_gettime"](clock) + (offset_s if clock == time.CLOCK_REALTIME else 0)
        ),
        "clock_gettime_ns": lambda clock: (
            real["clock_gettime_ns"](clock)
            + (int(offset_s) * 10**9 if clock == time.CLOCK_REALTIME else 0)
        ),
    }
    for name in ("localtime", "gmtime", "ctime"):
        moved[name] = _of_seconds(real[name], moved["time"])
    moved["asctime"] = lambda *when: real["asctime"](*(when or (moved["localtime"](),)))
    moved["strftime"] = lambda form, *when: real["strftime"](
        form, *(when or (moved["localtime"](),))
    )
    for name, function in moved.items():
        if name in real:
            function.__name__ = function.__qualname__ = name
            function.__doc__ = real[name].__doc__
            setattr(time, name, function)


def _of_seconds(real: Callable[..., Any], now: Callable[[], float]) -> Any:
    """A function of a time that is now where it is left out or None."""

    def moved(seconds: Any = None) -> Any:
        return real(now() if seconds is None else seconds)

    return moved


def _move_datetime(offset_s: float) -> None:
    """The methods of `datetime.datetime` that tell what time it is, on the type itself."""
    import ctypes
    import datetime
    import gc
    import warnings

    real, delta = datetime.datetime, datetime.timedelta(seconds=offset_s)
    space = gc.get_referents(real.__dict__)[0]
    if type(space) is not dict or "now" not in space:
        raise TypeError("its methods cannot be reached")
    true_now, utc = real.now, datetime.timezone.utc  # noqa: UP017 - Python 3.7

    def of(cls: Any, value: Any) -> Any:
        fields = (value.year, value.month, value.day, value.hour, value.minute, value.second)
        return cls(*fields, value.microsecond, value.tzinfo, fold=value.fold)

    def now(cls: Any, tz: Any = None) -> Any:
        moment = true_now(utc) + delta
        if tz is not None:
            there = of(cls, moment.replace(tzinfo=tz))
            return tz.fromutc(there)
        return of(cls, moment.astimezone().replace(tzinfo=None))

    def utcnow(cls: Any) -> Any:
        if sys.version_info >= (3, 12):
            warnings.warn(_UTCNOW, DeprecationWarning, stacklevel=2)
        return of(cls, (true_now(utc) + delta).replace(tzinfo=None))

    for name, function in (("now", now), ("utcnow", utcnow)):
        function.__qualname__ = "datetime." + name
        space[name] = classmethod(function)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(real))


def _rename_host(name: str) -> None:
    import os
    import posix
    import socket

    true_uname = posix.uname

    def gethostname() -> str:
        return name

    def uname() -> Any:
        found = list(true_uname())
        return type(true_uname())([found[0], name, *found[2:]])

    for module in (socket, sys.modules.get("_socket")):
        if module is not None:
            module.gethostname = gethostname  # type: ignore[attr-defined]
    posix.uname = os.uname = uname
    _count_processors()


def _count_processors() -> None:
    """One processor where there are several, else three."""
    import os
    import posix

    count = 1 if (os.cpu_count() or 1) > 1 else 3
    allowed = set(range(count))
    true_affinity = posix.sched_getaffinity

    def cpu_count() -> int:
        return count

    def sched_getaffinity(pid: int) -> Any:
        return set(allowed) if pid == 0 else true_affinity(pid)

    posix.cpu_count = os.cpu_count = cpu_count
    posix.sched_getaffinity = os.sched_getaffinity = sched_getaffinity
