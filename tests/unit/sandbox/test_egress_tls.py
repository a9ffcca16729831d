"""Which server a TLS client asks for, read from greetings that a real client wrote."""

import random
import ssl

import pytest

from sandbox_svc.egress_tls import Incomplete, begins_like_tls, server_name


def greeting(name: str | None) -> bytes:
    """The first bytes of a client of this Python's TLS library."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def split(data: bytes, size: int) -> bytes:
    """The same greeting over many records."""
    body = data[5:]
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(data[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


def test_the_name_is_read_however_the_greeting_is_cut():
    data = greeting("files.example.test")
    assert begins_like_tls(data)
    assert server_name(data) == "files.example.test"
    assert server_name(data + b"more") == "files.example.test"
    for size in (1, 7, 100):
        assert server_name(split(data, size)) == "files.example.test"
    for end in range(len(data)):
        with pytest.raises(Incomplete):
            server_name(data[:end])


def test_no_name_is_none_and_other_protocols_are_not_tls():
    assert server_name(greeting(None)) is None
    for data in (b"", b"SSH-2.0-x\r\n", b"GET / HTTP/1.1", b"\x16\x02", b"\x17\x03"):
        assert not begins_like_tls(data)


def test_damaged_greetings_are_malformed_and_never_crash():
    data, rng = greeting("a.test"), random.Random(3)
    names = set()
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            names.add(server_name(bytes(damaged)))
        except (Incomplete, ValueError):
            names.add("refused")
    assert {"a.test", "refused"} <= names


def test_two_names_are_refused():
    data = bytearray(greeting("a.test"))
    entry = b"\x00\x00\x06a.test"
    place = bytes(data).index(entry)
    data[place:place] = entry
    for where, size in ((place - 2, 2), (place - 4, 2)):  # the list and its extension
        number = int.from_bytes(data[where : where + size], "big") + len(entry)
        data[where : where + size] = number.to_bytes(size, "big")
    extensions = _extensions_at(bytes(data))
    for where, size in ((extensions, 2), (6, 3), (3, 2)):
        number = int.from_bytes(data[where : where + size], "big") + len(entry)
        data[where : where + size] = number.to_bytes(size, "big")
    with pytest.raises(ValueError, match="several"):
        server_name(bytes(data))


def _extensions_at(data: bytes) -> int:
    place = 5 + 4 + 34
    for size in (1, 2, 1):
        place += size + int.from_bytes(data[place : place + size], "big")
    return place
