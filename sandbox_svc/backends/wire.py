"""Messages between the service, its spawner and the first process of a sandbox.

- A request is a list of fields, each ended by a NUL, in one SOCK_SEQPACKET message, file
  descriptors beside it (SCM_RIGHTS): what reads it needs no parser (`spawner/wire.c`).
- An answer is one JSON object.
- A request too large for one message travels in a memfd, passed as the first descriptor.
- Received descriptors are close-on-exec; the receiver owns them.
"""

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

_INLINE_BYTES = 60_000
_RECEIVE_BYTES = 1 << 16
_MAX_FDS = 8

Message = dict[str, Any]
Field = str | int


def memfd(data: bytes) -> int:
    """A descriptor of a file in memory that holds `data`, to be read from its beginning."""
    fd = os.memfd_create("regreen", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def bytes_fd(data: bytes) -> int:
    """A descriptor from which exactly `data` can be read."""
    return memfd(data) if data else os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def counted(fields: Sequence[Field]) -> list[Field]:
    """A list as fields: how many, then each."""
    return [len(fields), *fields]


def encoded(fields: Sequence[Field]) -> bytes:
    """The bytes of a request.

    Raises:
        ValueError: a field holds a NUL.
    """
    body = os.fsencode("\0".join(map(str, fields))) + b"\0"
    if body.count(b"\0") != len(fields):
        raise ValueError("a field holds a NUL")
    return body


def send(sock: socket.socket, fields: Sequence[Field], fds: tuple[int, ...] = ()) -> None:
    """Send one request; raises BlockingIOError when a non-blocking socket is full."""
    body = encoded(fields)
    if len(body) <= _INLINE_BYTES:
        if fds:
            socket.send_fds(sock, [body], list(fds))
        else:
            sock.send(body)
        return
    large = memfd(body)
    try:
        socket.send_fds(sock, [b"memfd\0"], [large, *fds])
    finally:
        os.close(large)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """Receive one answer with its descriptors; None at end of stream."""
    space = socket.CMSG_SPACE(_MAX_FDS * 4)
    data, ancillary, _, _ = sock.recvmsg(_RECEIVE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(payload) // 4
            fds.extend(
                int.from_bytes(payload[4 * i : 4 * i + 4], "little", signed=True)
                for i in range(count)
            )
    if not data:
        return None
    message: Message = json.loads(data.decode("utf-8", "replace"))  # it may quote any bytes
    return message, fds
