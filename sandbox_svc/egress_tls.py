"""Reads which server a TLS client asks for, from the first bytes that it sends (RFC 8446, 6066).

- Only the greeting is read, nothing is decrypted; what does not begin like TLS is not looked at.
- A greeting that is split over records or reads is put together first; one that cannot be read as
  exactly one name or none is malformed, never guessed at.
"""

_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME = 22, 1, 0
_MAX_BYTES = 1 << 15


class Incomplete(Exception):
    """More bytes are needed."""


def begins_like_tls(data: bytes) -> bool:
    """Whether these first bytes could be a TLS greeting."""
    return data[:1] == b"\x16" and data[1:2] in (b"", b"\x03")


def server_name(data: bytes) -> str | None:
    """The name that a greeting asks for; None when it names none.

    Raises:
        Incomplete: the greeting goes on.
        ValueError: malformed.
    """
    hello = _Reader(_hello(data))
    hello.take(2 + 32)
    for length_bytes in (1, 2, 1):  # session, cipher suites, compression
        hello.vector(length_bytes)
    if hello.empty:
        return None
    extensions, names = _Reader(hello.vector(2)), []
    while not extensions.empty:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind == _SERVER_NAME:
            listed = _Reader(_Reader(content).vector(2))
            while not listed.empty:
                if listed.number(1) != 0:
                    raise ValueError("names a server in an unknown way")
                names.append(listed.vector(2))
    if len(names) > 1:
        raise ValueError("names several servers")
    return names[0].decode("ascii") if names else None


def _hello(data: bytes) -> bytes:
    """The body of the client's greeting, out of the records that carry it."""
    records, message = _Reader(data), b""
    while True:
        if len(message) >= 4:
            size = int.from_bytes(message[1:4], "big")
            if message[0] != _CLIENT_HELLO or size > _MAX_BYTES:
                raise ValueError("does not begin with a greeting")
            if len(message) >= 4 + size:
                return message[4 : 4 + size]
        if records.left < 5:
            raise Incomplete
        kind = records.number(1)
        records.take(2)
        size = records.number(2)
        if kind != _HANDSHAKE or size == 0:
            raise ValueError("breaks its greeting off")
        if records.left < size:
            raise Incomplete
        message += records.take(size)


class _Reader:
    """Takes numbers and vectors off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._place

    @property
    def empty(self) -> bool:
        return self.left == 0

    def take(self, size: int) -> bytes:
        if self.left < size:
            raise ValueError("is shorter than it says")
        self._place += size
        return self._data[self._place - size : self._place]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_bytes: int) -> bytes:
        return self.take(self.number(length_bytes))
