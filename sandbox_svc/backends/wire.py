"""Messages between the service, its spawner and the first process of a sandbox.

- One JSON object per SOCK_SEQPACKET message, file descriptors beside it (SCM_RIGHTS).
- A body too large for one message travels in a memfd, passed as the first descriptor.
- Received descriptors are close-on-exec; the receiver owns them.
"""

import json
import os
import socket
from typing import Any

_INLINE_BYTES = 60_000
_BODY_BYTES = 32 << 20
_RECEIVE_BYTES = 1 << 16
_MAX_FDS = 8

Message = dict[str, Any]


def _memfd(data: bytes) -> int:
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
    return _memfd(data) if data else os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def send(sock: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one message; raises BlockingIOError when a non-blocking socket is full."""
    body = json.dumps(message).encode("ascii")
    if len(body) <= _INLINE_BYTES:
        socket.send_fds(sock, [body], list(fds))
        return
    memfd = _memfd(body)
    try:
        socket.send_fds(sock, [b'{"memfd": true}'], [memfd, *fds])
    finally:
        os.close(memfd)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """Receive one message with its descriptors; None at end of stream."""
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
    message: Message = json.loads(data)
    if message.get("memfd") is True and fds:
        with os.fdopen(fds.pop(0), "rb") as body:
            message = json.loads(body.read(_BODY_BYTES))
    return message, fds
