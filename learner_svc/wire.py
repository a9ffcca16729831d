"""Frames between the service and its worker: four bytes of length, then JSON.

- No pickle: a damaged or hostile frame can at worst fail to parse.
- Errors cross as status, reason and message, and come back as the same class.
"""

import json
import socket
from collections.abc import Mapping
from typing import Any

from regreen.rpc.errors import InfraError, InvalidArgument, RegreenError, error_classes

MAX_FRAME_BYTES = 64 << 20


def encode(message: Mapping[str, Any]) -> bytes:
    """One frame."""
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


class Pipe:
    """The worker's blocking end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one frame."""
        self._sock.sendall(encode(message))

    def receive(self) -> dict[str, Any] | None:
        """The next frame; None when the service has gone."""
        head = self._file.read(4)
        if len(head) < 4:
            return None
        message: dict[str, Any] = json.loads(self._file.read(int.from_bytes(head, "big")))
        return message


def error_to_json(error: RegreenError) -> dict[str, Any]:
    """What crosses of an error."""
    raw: dict[str, Any] = {
        "status": error.status,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "retry_after_s": error.retry_after_s,
    }
    if isinstance(error, InvalidArgument):
        raw |= {"field": error.field, "problem": error.problem, "remedy": error.remedy}
    return raw


def error_from_json(raw: Mapping[str, Any]) -> RegreenError:
    """The error that `error_to_json` described."""
    if "field" in raw:
        return InvalidArgument(raw["field"], raw["problem"], raw["remedy"])
    kind = error_classes().get((raw["status"], raw["reason"]), InfraError)
    if kind is InvalidArgument:
        kind = RegreenError
    return kind(
        raw["message"], metadata=raw.get("metadata"), retry_after_s=raw.get("retry_after_s")
    )
