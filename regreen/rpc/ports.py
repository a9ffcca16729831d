"""What an address is, and whether it can be bound, found out before gRPC tries, which would print
its own words.

- The look is a bind as gRPC's own (SO_REUSEADDR, no SO_REUSEPORT) that is undone at once and never
  listens: no client can meet it.
- gRPC takes a host name that has one address to bind; so does the look. A name that is not found
  here is left to gRPC, which may know more.
- A socket file on which somebody listens is not free, though gRPC would put its own in its place.
"""

import errno
import ipaddress
import os
import socket
import stat
from contextlib import suppress

_UNIX = "unix:"


def is_local(address: str) -> bool:
    """Whether a listen address is a unix socket or on loopback."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_free(address: str) -> None:
    """Refuse a listen address that cannot be bound now.

    Raises:
        OSError: why.
    """
    if address.startswith(_UNIX):
        _check_file(address.removeprefix(_UNIX))
        return
    host, _, port = address.rpartition(":")
    if int(port) == 0:
        return
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror:
        return
    problem: OSError | None = None
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as look:
                look.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                look.bind(place)
        except OSError as error:
            problem = problem or error
        else:
            return
    if problem is not None:
        raise problem


def _check_file(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as look:
        look.setblocking(False)
        if _is_socket(path):
            with suppress(ConnectionRefusedError, FileNotFoundError, PermissionError):
                with suppress(BlockingIOError):  # so many wait there already
                    look.connect(path)
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            return
        look.bind(path)
        os.unlink(path)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
