"""Recorded conversations of HTTP clients: the exact ids that were shown and sampled.

- A branch is one unbroken token sequence; each new turn appends to it and changes nothing before.
- A request whose messages do not continue a recorded branch (rewritten history) starts a new one.
- Every completion is on disk (written whole, renamed) before the client gets the end of it.
"""

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from policy_svc import metrics
from policy_svc.chat import ChatMl, Message
from policy_svc.engines.base import Completion
from regreen.rpc.errors import InvalidArgument, NotFound


@dataclass(slots=True)
class Branch:
    """One token sequence; `mask` is 1 for sampled ids, whose `logprobs` and `versions` count."""

    messages: list[Message] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    parent: int | None = None
    """Branch that it shares its beginning with, when a turn was sampled more than once."""
    token_exact: bool = True

    def extend(self, turn: "Turn") -> "Branch":
        """Return a new branch: this one, then the turn."""
        done = turn.completion
        per_token = [s.version for s in done.versions for _ in range(s.start, s.end)]
        added = [*turn.delta_ids, *done.token_ids]
        quiet = len(turn.delta_ids)
        return Branch(
            [*self.messages, *turn.messages, Message("assistant", done.text)],
            [*self.token_ids, *added],
            [*self.mask, *([0] * quiet), *([1] * len(done.token_ids))],
            [*self.logprobs, *([0.0] * quiet), *done.logprobs],
            [*self.versions, *([-1] * quiet), *per_token],
            [*self.finish_reasons, done.finish_reason.value],
            self.parent,
            self.token_exact and done.token_exact,
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """New messages, the ids that they added to the prompt, and what was sampled."""

    messages: tuple[Message, ...]
    delta_ids: tuple[int, ...]
    completion: Completion


@dataclass(frozen=True, slots=True)
class Prompt:
    """Where a request continues: a branch (None starts one), what is new, and all its ids."""

    branch: int | None
    base: Branch
    """What was recorded when the ids were made; samples extend this and nothing else."""
    messages: tuple[Message, ...]
    delta_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Session:
    """All branches of one client session."""

    session_id: str
    branches: list[Branch] = field(default_factory=list)

    def prompt(self, messages: Sequence[Message], chat: ChatMl) -> Prompt:
        """Find the longest recorded branch that the messages continue."""
        best, length = None, 0
        for at, branch in enumerate(self.branches):
            count = len(branch.messages)
            if length < count < len(messages) and _continues(branch.messages, messages):
                best, length = at, count
        if best is None:
            ids = chat.render(messages)
            return Prompt(None, Branch(), tuple(messages), tuple(ids), tuple(ids))
        branch = self.branches[best]
        new = messages[length:]
        delta = chat.continue_turns(new, branch.token_ids[-1])
        return Prompt(best, branch, tuple(new), tuple(delta), (*branch.token_ids, *delta))

    def add(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        """Record samples: the first grows the branch it continues, others fork from it.

        A branch that has grown since the prompt was made is left alone: the first forks too.
        """
        first = prompt.branch
        for completion in completions:
            grown = prompt.base.extend(Turn(prompt.messages, prompt.delta_ids, completion))
            if first is not None and self.branches[first] is prompt.base:
                self.branches[first] = grown
                continue
            if first is not None:
                grown.parent = first
            self.branches.append(grown)
            if first is None:
                first = len(self.branches) - 1

    def to_json(self) -> dict[str, Any]:
        """Return the whole record."""
        return {"session_id": self.session_id, "branches": [asdict(b) for b in self.branches]}


class Sessions:
    """Sessions by id: in memory up to a number, all of them on disk."""

    def __init__(self, folder: Path, max_sessions: int) -> None:
        self._folder, self._max = folder, max_sessions
        self._open: OrderedDict[str, Session] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, session_id: str) -> Session:
        """Return a session, empty when it is new.

        Raises:
            InvalidArgument: the id is empty or longer than 200 characters.
        """
        if not 1 <= len(session_id) <= 200:
            raise InvalidArgument("session_id", "is empty or long", "use 1 to 200 characters")
        session = self._open.get(session_id)
        if session is None:
            session = self._read(session_id) or Session(session_id)
            self._open[session_id] = session
        self._open.move_to_end(session_id)
        while len(self._open) > self._max:
            self._open.popitem(last=False)
        metrics.SESSIONS.set(len(self._open))
        return session

    def find(self, session_id: str) -> Session:
        """Return a session that exists. Raises: NotFound."""
        session = self._open.get(session_id) or self._read(session_id)
        if session is None:
            raise NotFound(f"no session {session_id[:80]!r} is recorded")
        return session

    def delete(self, session_id: str) -> None:
        """Forget a session; an absent one is ignored."""
        self._open.pop(session_id, None)
        self._path(session_id).unlink(missing_ok=True)
        metrics.SESSIONS.set(len(self._open))

    def write(self, session: Session) -> None:
        """Put a session's record on disk; atomic."""
        path = self._path(session.session_id)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w") as handle:
            json.dump(session.to_json(), handle)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)

    def prune(self, keep_s: float) -> int:
        """Delete records older than `keep_s`; how many."""
        limit_s = time.time() - keep_s
        old = [p for p in self._folder.iterdir() if p.stat().st_mtime < limit_s]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _read(self, session_id: str) -> Session | None:
        try:
            value = json.loads(self._path(session_id).read_bytes())
        except (OSError, ValueError):
            return None
        branches = []
        for item in value["branches"]:
            item["messages"] = [Message(**message) for message in item["messages"]]
            branches.append(Branch(**item))
        return Session(session_id, branches)

    def _path(self, session_id: str) -> Path:
        return self._folder / f"{hashlib.sha256(session_id.encode()).hexdigest()}.json"


def _continues(recorded: Sequence[Message], asked: Sequence[Message]) -> bool:
    """Whether `asked` begins with `recorded`; clients may trim what the assistant said."""
    for old, new in zip(recorded, asked, strict=False):
        if old.role != new.role:
            return False
        if old.content != new.content and (
            old.role != "assistant" or old.content.strip() != new.content.strip()
        ):
            return False
    return True
