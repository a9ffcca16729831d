"""What a soak does with a sandbox: random operations, each with a check of its own.

- A sandbox is one lane's own while it lives, so what it shows is known; States are everybody's, and
  any lane may delete one that another is about to name.
- While something may be killed, an operation may fail only in the ways that the contract names for
  a service or a sandbox that went away; every other error is a fault, and so is a wrong answer.
- While nothing is killed, it may fail only because of what the soak itself does beside it: another
  lane has deleted the State, or stands on it, or the sandbox's own time is over. And each operation
  has to work: one that is refused as often as it is done is a fault.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from regreen.client.actions import ActionClient
from regreen.client.exec import ExecClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InfraError,
    NotFound,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.sandbox import v1 as pb

ALLOWED = (DeadlineExceeded, FailedPrecondition, InfraError, NotFound, ResourceExhausted)
"""What an operation may end with when something was killed; `Unavailable` is waited out."""
CALM = {
    **dict.fromkeys(("create", "create brief", "restore", "execute"), (NotFound,)),
    "delete state": (FailedPrecondition, NotFound),
}
"""What an operation may end with when nothing is killed: a State is another lane's too."""
EXPIRED = (NotFound,)
"""What an operation on a sandbox whose time is over may end with."""
OPERATIONS = (
    *("create", "create brief", "delete", "delete state", "write", "daemon", "mark", "snapshot"),
    *("fork", "restore", "read", "exec", "attach", "attach again", "execute"),
)
"""What has to have worked when a soak is over."""
_WORK_SHARE = 0.5
"""Of the tries of an operation when nothing is killed, and of those that the platform failed or
not, whatever is killed."""
_ENOUGH = 10
"""Tries from which that share tells more than chance."""
MARK = "/work/mark"
BRIEF = {"brief": "1"}
"""Label of sandboxes that nobody deletes."""
_BRIEF_S = 1.0
_PATIENCE_S = 120.0
_MOST_STATES = 40
_DAEMON = "nohup sleep 1000 >/dev/null 2>&1 & echo started"
_LINES = 300
_COUNT = f"i=0; while [ $i -lt {_LINES} ]; do echo $i; i=$((i+1)); done; sleep 0.02; echo over"
_COUNTED = "".join(f"{number}\n" for number in range(_LINES)) + "over\n"
_ACTIONS = 3
"""Different actions on a State, so that answers are found in the cache, also by a new service."""


@dataclass
class Record:
    """What was done, and what came of it."""

    made: int = 0
    """Sandboxes that were answered."""
    tries: int = 0
    """Lives that were begun."""
    states: dict[str, str] = field(default_factory=dict)
    """Answered States and the content of their mark."""
    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    calm: bool = False
    """Whether nothing is killed any more."""
    calm_done: Counter[str] = field(default_factory=Counter)
    calm_refused: Counter[str] = field(default_factory=Counter)
    brief: set[str] = field(default_factory=set)
    """Sandboxes whose time is short."""

    async def attempt(self, name: str, call: Callable[[], Awaitable[Any]], box: str = "") -> Any:
        """What a call, perhaps on a sandbox, gave; None where it failed, be it a fault or not."""
        calm, brief = self.calm, box in self.brief
        allowed = (*CALM.get(name, ()), *(EXPIRED if brief else ())) if calm else ALLOWED
        try:
            found = await call()
        except RegreenError as error:
            if isinstance(error, allowed):
                self.refused[f"{name}: {type(error).__name__}"] += 1
                self.calm_refused[name] += calm and not brief
            else:
                when = " while nothing is killed" if calm else ""
                self.faults.append(f"{name}{when}: {type(error).__name__}: {error}"[:300])
            return None
        self.done[name] += 1
        self.calm_done[name] += calm
        return found

    def check_work(self) -> None:
        """A fault for every operation that has hardly ever worked."""
        for name in OPERATIONS:
            done, refused = self.calm_done[name], self.calm_refused[name]
            failed = self.refused[f"{name}: {InfraError.__name__}"]
            if not self.done[name]:
                self.faults.append(f"{name}: it has never worked")
            elif done + refused >= _ENOUGH and done < _WORK_SHARE * (done + refused):
                self.faults.append(
                    f"{name}: {refused} of {done + refused} were refused while nothing was killed"
                )
            elif failed >= _ENOUGH and self.done[name] < _WORK_SHARE * (self.done[name] + failed):
                tries = self.done[name] + failed
                self.faults.append(f"{name}: the platform failed {failed} of {tries}")

    def check(self, name: str, found: object, wanted: object) -> None:
        """A fault where an answer is not what it has to be."""
        if found != wanted:
            self.faults.append(f"{name}: {found!r:.150}, not {wanted!r:.150}")


class Operations:
    """Operations on sandboxes of one service."""

    def __init__(self, channel: grpc.aio.Channel, record: Record, rng: random.Random) -> None:
        self.record, self._rng = record, rng
        self.sandboxes = SandboxClient(channel, patience_s=_PATIENCE_S)
        self.state = StateClient(channel, patience_s=_PATIENCE_S)
        self._execs = ExecClient(channel, patience_s=_PATIENCE_S)
        self._actions = ActionClient(channel, patience_s=_PATIENCE_S)
        self._quick = (
            self._write,
            self._daemon,
            self._snapshot,
            self._fork,
            self._restore,
            self._execute,
        )
        self._all = (*self._quick, self._exec)  # a command that was started makes a box linger

    async def life(self, root: str) -> None:
        """One sandbox from its start, by a State of any, to its end, by us or by its time."""
        brief = self._rng.random() < 0.1
        start = self._rng.choice([root, *self.record.states])
        name, ttl_s = ("create brief", _BRIEF_S) if brief else ("create", None)
        labels = BRIEF if brief else {}
        box = await self.record.attempt(
            name, lambda: self.sandboxes.create_sandbox(start, ttl_s=ttl_s, labels=labels)
        )
        if box is None:
            return
        self.record.made += 1
        if brief:
            self.record.brief.add(box.id)
        for _ in range(self._rng.randrange(4)):
            await self._rng.choice(self._quick if brief else self._all)(box.id)
        if not brief:
            await self._delete(box.id)

    async def _delete(self, box: str) -> None:
        await self.record.attempt("delete", lambda: self.sandboxes.delete_sandbox(box))

    async def _run(self, name: str, box: str, script: str) -> None:
        await self.record.attempt(
            name, lambda: self.sandboxes.run(box, ["sh", "-c", script], cwd="/"), box
        )

    async def _write(self, box: str) -> None:
        await self._run("write", box, f"echo {self._rng.randrange(1 << 30)} > {MARK}")

    async def _daemon(self, box: str) -> None:
        await self._run("daemon", box, _DAEMON)

    async def _snapshot(self, box: str) -> None:
        content, states = str(self._rng.randrange(1 << 40)), self.record.states
        wrote = await self.record.attempt("mark", lambda: self._marked(box, content.encode()), box)
        if wrote is None:
            return
        state = await self.record.attempt(
            "snapshot", lambda: self.sandboxes.snapshot_sandbox(box), box
        )
        if state is not None:
            states[state.id] = content
        if len(states) > _MOST_STATES:
            old = self._rng.choice(list(states))
            del states[old]
            await self._delete_state(old)

    async def _delete_state(self, state: str) -> None:
        await self.record.attempt("delete state", lambda: self.state.delete_state(state))

    async def _marked(self, box: str, data: bytes) -> bool:
        await self.sandboxes.write_file(box, MARK, data)
        return True

    async def _fork(self, box: str) -> None:
        forked = await self.record.attempt("fork", lambda: self.sandboxes.fork_sandbox(box, 2), box)
        if forked is None:
            return
        self.record.made += len(forked.sandboxes)
        for fork in forked.sandboxes:
            await self._delete(fork.id)
        await self._delete_state(forked.state.id)

    async def _restore(self, box: str) -> None:
        """Put it on a State of any, whose content it then shows."""
        if not self.record.states:
            return
        state, content = self._rng.choice(list(self.record.states.items()))
        restored = await self.record.attempt(
            "restore", lambda: self.sandboxes.restore_sandbox(box, state), box
        )
        if restored is None:
            return
        found = await self.record.attempt("read", lambda: self.sandboxes.read_file(box, MARK), box)
        if found is not None:
            self.record.check(f"restored to {state}", found.content.decode(), content)

    async def _exec(self, box: str) -> None:
        """Start a command, stop listening in the middle, and take it up again where it was."""
        started = await self.record.attempt(
            "exec", lambda: self._execs.start_exec(box, ["sh", "-c", _COUNT], cwd="/")
        )
        if started is None or self._rng.random() < 0.2:  # it is left running, for the end to end
            return
        heard = await self.record.attempt("attach", lambda: self._begun(box, started.id))
        if heard is None:
            return
        told = await self.record.attempt(
            "attach again", lambda: self._ended(box, started.id, len(heard))
        )
        if told is not None and told[1].reason == pb.END_REASON_EXIT:
            self.record.check("attached", (heard + told[0]).decode(), _COUNTED)

    async def _begun(self, box: str, one: str) -> bytes:
        """The first output of a command; the stream is dropped there."""
        async with contextlib.aclosing(self._execs.follow_exec(box, one)) as events:
            async for event in events:
                if event.HasField("stdout"):
                    return bytes(event.stdout.data)
        return b""

    async def _ended(self, box: str, one: str, offset: int) -> tuple[bytes, pb.CommandResult]:
        rest = b""
        events = self._execs.follow_exec(box, one, stdout_offset=offset)
        async with contextlib.aclosing(events):
            async for event in events:
                rest += event.stdout.data
                if event.HasField("ended"):
                    return rest, event.ended
        raise Unavailable("the stream ended without an end")

    async def _execute(self, box: str) -> None:
        """An action on a State of any: run now, or known before to whichever service."""
        if not self.record.states:
            return
        state, content = self._rng.choice(list(self.record.states.items()))
        keep, number = self._rng.random() < 0.3, self._rng.randrange(_ACTIONS)
        argv = ["sh", "-c", f"cat {MARK}; echo {number} > /work/number"]
        answer = await self.record.attempt(
            "execute", lambda: self._actions.execute(state, argv, cwd="/", keep_state=keep)
        )
        if answer is None or answer.result.reason != pb.END_REASON_EXIT:
            return
        self.record.done["execute: cached"] += answer.cached
        self.record.check(f"action on {state}", answer.result.stdout.head.decode(), content)
        self.record.check(f"action on {state} differs", answer.quarantined, False)
        if answer.HasField("state"):
            await self._delete_state(answer.state.id)
