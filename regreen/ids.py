"""Typed ids: a short prefix that says what the thing is, and a UUIDv7 that sorts by time.

- `new_id("trj")` gives `trj_0193...`; ids are opaque to everyone but this module.
- The clock and the random source are arguments, so that a replay can reproduce ids.
- Names of runs are words that are safe in a path, a command and a URL.
- Seeds derive from what they are for, never from the clock: `derive_seed`.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable

from regreen.rpc.errors import InvalidArgument

_ID = re.compile(r"[a-z]{2,4}_[0-9a-f]{32}")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RUN_NAME_RULE = "give 1 to 100 letters, digits, '.', '_' or '-', the first a letter or a digit"
_BASE = "base"
"""Means the model before any training wherever a run can be named."""


def new_id(
    prefix: str,
    *,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> str:
    """A fresh id: `prefix`, an underscore and a UUIDv7 (RFC 9562) as 32 hex digits."""
    body = bytearray(now_ms().to_bytes(6, "big") + random_bytes(10))
    body[6] = (body[6] & 0x0F) | 0x70
    body[8] = (body[8] & 0x3F) | 0x80
    return f"{prefix}_{body.hex()}"


def check_id(value: str, prefix: str, field: str) -> str:
    """`value` if it is an id of this kind.

    Raises:
        InvalidArgument: it is not; names `field`.
    """
    if not value:
        raise InvalidArgument(field, "is empty", f"give an id like {prefix}_...")
    if not _ID.fullmatch(value) or not value.startswith(prefix + "_"):
        raise InvalidArgument(
            field, f"{value[:80]!r} is no {prefix}_ id", f"give {prefix}_<32 hex>"
        )
    return value


def check_run_name(name: str, field: str = "name") -> str:
    """`name` if a run may be called so.

    Raises:
        InvalidArgument: it may not; names `field` and the rule.
    """
    if name == _BASE or _ID.fullmatch(name):
        problem = "means the untrained model" if name == _BASE else "looks like an id"
        raise InvalidArgument(field, f"{name!r} {problem}", "choose another name")
    if not _RUN_NAME.fullmatch(name):
        problem = "is empty" if not name else f"{name[:80]!r} is no name of a run"
        raise InvalidArgument(field, problem, RUN_NAME_RULE)
    return name


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on all `parts` and nothing else."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
