"""Conditions of a test run other than the pinned ones: what a gate learns from, never a score.

- They are brought about in the fork of one validation, after the diff, and go with it.
- The repository is moved for good, with what the environment says of its place; the user is another
  name and another home, with the same numbers; the host's name and the clock are those that Python
  code reads (`builders/inbox/elsewhere.py`): no sandbox may set the kernel's.
- A verdict under conditions is marked, and under the pinned ones nothing of this runs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from regreen.rpc.errors import InfraError, InvalidArgument
from sandbox_svc.backends.base import Box, Command
from sandbox_svc.builders.base import ENV, HOME, REPO
from sandbox_svc.builders.testrun import RunOptions

MOST_CLOCK_S = 20 * 366 * 86_400
_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_PLACE = re.compile(r"/work(/[A-Za-z0-9][A-Za-z0-9._-]{0,60}){1,4}")
_TAKEN = frozenset(("repo", "env", "home", "pycache", "wheels"))
_MOVE_S = 300.0
_MOVE = """
set -e
mkdir -p "$(dirname "$NEW")"
cp -a "$OLD" "$NEW"
rm -rf "$OLD"
grep -rlIF --include='*.pth' --include='*.egg-link' --include='__editable__*' \
  --include='direct_url.json' --include='env.json' -e "$OLD" "$ENV"/lib/python*/site-packages \
  /work/.regreen 2>/dev/null |
while IFS= read -r file; do sed -Ei "s#$OLD([^A-Za-z0-9_.-]|$)#$NEW\\1#g" "$file"; done
"""
"""Moves the repository; the kernel renames no directory of a layer below, so it is copied."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is different; zero and empty mean what is pinned."""

    order_seed: int = 0
    """Of the order of the tests."""
    hash_seed: int = 0
    clock_s: int = 0
    """How far the clock is moved."""
    host: str = ""
    user: str = ""
    repository: str = ""
    """Where the repository is, below /work."""


PINNED = Conditions()


def check_conditions(conditions: Conditions) -> None:
    """Refuse conditions that cannot be brought about.

    Raises:
        InvalidArgument: names the field.
    """
    for name in ("order_seed", "hash_seed"):
        if not 0 <= getattr(conditions, name) < 1 << 32:
            raise InvalidArgument(
                f"conditions.{name}", f"is {getattr(conditions, name)}", "give 0 to 4294967295"
            )
    if abs(conditions.clock_s) > MOST_CLOCK_S:
        raise InvalidArgument(
            "conditions.clock_offset",
            f"is {conditions.clock_s} s",
            f"give at most {MOST_CLOCK_S} s, forwards or backwards",
        )
    for name, value in (("host_name", conditions.host), ("user_name", conditions.user)):
        if value and not _NAME.fullmatch(value):
            raise InvalidArgument(
                f"conditions.{name}",
                f"{value[:80]!r} is no name",
                "give up to 31 lower-case letters, digits and hyphens",
            )
    place = conditions.repository
    if place and (not _PLACE.fullmatch(place) or place.split("/")[2] in _TAKEN):
        raise InvalidArgument(
            "conditions.repository", f"{place[:80]!r}", "give a new directory below /work"
        )


async def settle(box: Box, conditions: Conditions, options: RunOptions) -> RunOptions:
    """Bring the conditions about in a fork; the options of a run under them.

    Raises:
        InfraError: the fork cannot be changed so.
    """
    environment = dict(options.environment)
    if conditions.host:
        hosts = f"127.0.0.1\tlocalhost regreen {conditions.host}\n::1\tlocalhost\n"
        await box.write_file("/etc/hosts", hosts.encode())
        await box.write_file("/etc/hostname", f"{conditions.host}\n".encode())
        environment["HOSTNAME"] = conditions.host
    if conditions.user:
        environment.update(await _other_user(box, conditions.user))
    if conditions.repository:
        await _run(box, _MOVE, {"OLD": REPO, "NEW": conditions.repository, "ENV": ENV})
    return replace(
        options,
        environment=environment,
        seed=conditions.hash_seed or options.seed,
        root=conditions.repository or REPO,
        order_seed=conditions.order_seed,
        elsewhere=_told(conditions),
    )


def _told(conditions: Conditions) -> dict[str, object]:
    """What the runner brings about itself."""
    told = {"clock_s": conditions.clock_s, "host": conditions.host}
    return told if any(told.values()) else {}


async def _other_user(box: Box, name: str) -> Mapping[str, str]:
    """Another name and home for the one user of a sandbox; the variables that tell them."""
    home = f"/work/homes/{name}"
    await box.write_file(
        "/etc/passwd",
        f"root:x:0:0:root:/root:/bin/sh\n{name}:x:1000:1000:{name}:{home}:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n".encode(),
    )
    await box.write_file("/etc/group", f"root:x:0:\n{name}:x:1000:\nnogroup:x:65534:\n".encode())
    await _run(box, 'mkdir -p "${NEW%/*}" && cp -a "$OLD" "$NEW"', {"OLD": HOME, "NEW": home})
    return {"HOME": home, "USER": name, "LOGNAME": name}


async def _run(box: Box, script: str, variables: Mapping[str, str]) -> None:
    command = Command(("sh", "-c", script), env=variables, cwd="/work", timeout_s=_MOVE_S)
    done = await box.run(command)
    if not done.ok:
        text = done.stderr.text.strip()[-300:]
        raise InfraError(f"the conditions of a run cannot be brought about: {text}")
