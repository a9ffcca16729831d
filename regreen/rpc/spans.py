"""One span per call: trace, span and parent ids (W3C trace context), duration, and what it was of.

- A span is a log line, so that traces need no collector: any log store joins them by `trace_id`.
- What a call was of (state, sandbox, trajectory ...) is read from the id fields of its messages;
  nothing else of a message is ever logged.
- A call that belongs to a sampled trace is logged as `info`, any other as `debug`.
- Calls that this one makes carry its span as their parent (`regreen.client.channel`).
"""

import re
import secrets
from collections.abc import Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_PARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_SUBJECTS = (
    *("state_id", "sandbox_id", "exec_id", "task_id", "run_id", "group_id", "lease_id"),
    *("checkpoint_id", "parent_id"),
)
_NESTED = ("state", "sandbox", "execution")
_BY_PREFIX = {"st": "state_id", "sbx": "sandbox_id", "exe": "exec_id", "run": "run_id"}
_MAX_CHARS = 100
_SAMPLED = 1
SAMPLED: ContextVar[bool] = ContextVar("sampled", default=True)
"""Whether the trace that is open is one whose spans are kept."""


@lru_cache(maxsize=1024)
def _fields_of(kind: Hashable) -> tuple[Sequence[str], bool, Sequence[str]]:
    """Of a message type: its id fields, whether it has an id of its own, its nested messages.

    What is no message, such as a stream of them, has none.
    """
    descriptor = getattr(kind, "DESCRIPTOR", None)
    if not isinstance(descriptor, Descriptor):
        return (), False, ()
    fields = {
        name: field for name, field in descriptor.fields_by_name.items() if not field.is_repeated
    }
    texts = {name for name, field in fields.items() if field.type == FieldDescriptor.TYPE_STRING}
    ids = tuple(name for name in _SUBJECTS if name in texts)
    nested = tuple(name for name in _NESTED if name in fields and fields[name].message_type)
    return ids, "id" in texts, nested


@dataclass(slots=True)
class Span:
    """One call on its way."""

    trace_id: str = ""
    parent_id: str = ""
    sampled: bool = False
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))
    subjects: dict[str, str] = field(default_factory=dict)

    @classmethod
    def after(cls, traceparent: str) -> "Span":
        """The span of a call that came with this header; a malformed one is as none."""
        found = _PARENT.fullmatch(traceparent)
        if found is None:
            return cls()
        trace_id, parent_id, flags = found.groups()
        return cls(trace_id, parent_id, bool(int(flags, 16) & _SAMPLED))

    def saw(self, message: Any) -> None:
        """Note the ids in a request or response; the first of each kind stays."""
        for name in self._note(message):
            self._note(getattr(message, name))

    def _note(self, message: Any) -> Sequence[str]:
        """Note the ids of a message itself; its fields that may hold more."""
        ids, own, nested = _fields_of(cast(Hashable, type(message)))
        for name in ids:
            self._keep(name, getattr(message, name))
        if own:
            prefix = message.id.partition("_")[0]
            self._keep(_BY_PREFIX.get(prefix, ""), message.id)
        return nested

    def _keep(self, name: str, value: Any) -> None:
        if name and isinstance(value, str) and value:
            self.subjects.setdefault(name, value[:_MAX_CHARS])

    def fields(self) -> Mapping[str, str]:
        """What the log line holds beside the call's own context."""
        return {"span_id": self.span_id, "parent_span_id": self.parent_id, **self.subjects}
