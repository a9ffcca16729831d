"""What a validation is asked for: its key, its part of the tests, and its diff in a fork.

- Equal requests have equal keys; a request that may stop early knows that of the whole one too.
- A diff is written into a fork file by file; what cannot be written is reported, not fatal. No
  link is followed, for a path that is not protected might lead to one that is.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace
from typing import Any

from regreen.rpc.errors import (
    DiskFull,
    FailedPrecondition,
    InvalidArgument,
    NoSuchFile,
    ResourceExhausted,
)
from sandbox_svc.backends.base import Box, Command
from sandbox_svc.builders.base import REPO, FileChange
from sandbox_svc.builders.protect import Reverted
from sandbox_svc.conditions import PINNED, check_conditions
from sandbox_svc.verdicts import Plan, ValidationOptions, chosen_ids


def changes_sha256(changes: Iterable[FileChange]) -> str:
    """Digest of the canonical form of a diff."""
    rows = [
        [c.path, c.mode, None if c.content is None else hashlib.sha256(c.content).hexdigest()]
        for c in sorted(changes, key=lambda c: c.path)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def check_part(options: ValidationOptions) -> None:
    """Refuse a choice of tests, or conditions of a run, that cannot be followed.

    Raises:
        InvalidArgument: names the field.
    """
    for entry in options.only_tests:
        if not entry.strip("/") or "\0" in entry:
            raise InvalidArgument(
                "only_tests", f"{entry[:80]!r} is no test", "give ids, files or folders of tests"
            )
    if options.coverage and (options.only_tests or options.stop_early):
        raise InvalidArgument(
            "coverage", "cannot be measured on a part of the tests", "ask for the whole"
        )
    if options.conditions == PINNED:
        return
    check_conditions(options.conditions)
    if options.coverage or options.only_tests or options.stop_early:
        raise InvalidArgument(
            "conditions", "come with coverage or a part of the tests", "ask for a whole run"
        )


def part_of(plan: Plan) -> Mapping[str, Any] | None:
    """What the runner is told of a part; None for a whole run."""
    options, found = plan.options, dict[str, Any]()
    if options.only_tests:
        found["only"] = list(options.only_tests)
    if options.stop_early:
        found["required"] = sorted(chosen_ids(plan.facts, options))
    return found or None


def key_of(plan: Plan, *, whole: bool = False) -> str:
    """What a verdict depends on; `whole` as if it could not stop early."""
    options = plan.options
    parts = [
        plan.state.id,
        plan.state.created_s,
        plan.sha256,
        plan.under,
        [[r.path, r.reason] for r in plan.reverted],
        sorted(options.held_pins.items()),
        sorted(options.required_tests),
        options.coverage,
        options.timeout_s,
        options.seed,
        options.repeat,
        options.stop_early and not whole,
        sorted(options.only_tests),
        astuple(options.conditions),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def placed(plan: Plan) -> list[str]:
    """The paths in a fork that a diff's own changes have."""
    changes = [*plan.changes, *([plan.lock] if plan.lock is not None else [])]
    return [f"{REPO}/{change.path}" for change in changes]


async def _is_there(box: Box, path: str) -> bool:
    """Whether there is something at a path itself, not below a link."""
    try:
        await box.read_range(path, max_bytes=0, follow=False)
    except NoSuchFile:
        return False
    except (InvalidArgument, FailedPrecondition):  # something else than a file, or unreadable
        return True
    return True


async def apply(plan: Plan, box: Box) -> Plan:
    """Write the kept changes into the fork; one that cannot be written is reported.

    Raises:
        DiskFull: the host has no space left; says nothing about the diff.
    """
    deleted = [f"{REPO}/{c.path}" for c in plan.changes if c.content is None]
    deleted = [path for path in deleted if await _is_there(box, path)]
    if deleted:
        await box.run(Command(("rm", "-f", "--", *deleted), cwd="/"))
    reverted = list(plan.reverted)
    applied: list[FileChange] = []
    for change in plan.changes:
        if change.content is None:
            applied.append(change)
            continue
        mode = 0o755 if change.mode & 0o100 else 0o644
        try:
            await box.write_file(f"{REPO}/{change.path}", change.content, mode, follow=False)
            applied.append(change)
        except (InvalidArgument, NoSuchFile, ResourceExhausted) as error:
            if isinstance(error, DiskFull) or error.retry_after_s is not None:
                raise
            reverted.append(Reverted(change.path, f"unwritable: {error}"))
    return replace(plan, changes=tuple(applied), reverted=tuple(reverted))
