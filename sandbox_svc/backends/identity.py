"""Which user of the host sandboxes are, and why they may not be that one.

- The kernel's settings belong to user 0 of the host and ask for that number alone: who has it needs
  no capability to write them, and their read-only mounts would be all that is left. No sandbox may
  have it, by whatever name.
- A user namespace says what its parent calls a user. What the settings' owner looks like here says
  it of the host itself, through any number of namespaces.
- A user that the namespace does not know cannot be become: said before anything is made.
"""

import os
from pathlib import Path

from regreen.rpc.errors import MissingDependency

_SETTINGS = Path("/proc/sys/kernel")
_UNKNOWN = Path("/proc/sys/kernel/overflowuid")
_REMEDY = (
    "start the service outside of this user namespace or as an ordinary user, "
    "give the namespace other ids, or use --backend docker"
)


def outside(inside: int, mapping: str) -> int | None:
    """What the parent namespace calls an id, by a text such as `/proc/self/uid_map`."""
    for line in mapping.splitlines():
        first, theirs, count = map(int, line.split())
        if first <= inside < first + count:
            return theirs + inside - first
    return None


def refusal(user: int, group: int, users: str, groups: str, owner: int | None) -> str:
    """Why sandboxes may not be this user and group here; empty where they may.

    `users` and `groups` are the namespace's mappings; `owner` is whom the kernel's settings belong
    to, as seen here, None where that cannot be seen.
    """
    for kind, number, mapping in (("user", user, users), ("group", group, groups)):
        if outside(number, mapping) is None:
            return f"this user namespace has no {kind} {number}, which sandboxes would be"
    if outside(user, users) == 0 or user == owner:
        return f"sandboxes would be user {user} here, which is root of the host"
    return ""


def check(user: int | None) -> None:
    """Refuse to make sandboxes as `user`, or as the user of this process.

    Raises:
        MissingDependency: they would be the host's root, or nobody; names the remedy.
    """
    number, group = (os.geteuid(), os.getegid()) if user is None else (user, user)
    users, groups = (Path(f"/proc/self/{kind}_map").read_text("ascii") for kind in ("uid", "gid"))
    if why := refusal(number, group, users, groups, _owner()):
        raise MissingDependency(f"{why}; {_REMEDY}")


def _owner() -> int | None:
    """Whom the kernel's settings belong to; None where nobody here has that name."""
    try:
        owner, unknown = _SETTINGS.stat().st_uid, int(_UNKNOWN.read_text("ascii"))
    except OSError:
        return None
    return None if owner == unknown else owner
