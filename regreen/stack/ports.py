"""The ports of a stack, chosen before its services, which start later, bind them.

- No two stacks of a machine choose the same, while both live: a stack holds an abstract socket that
  is named after each of its ports, and chooses none whose name is held.
- Nobody else gets one without asking for it, where there are such ports: the kernel gives them to
  no one who connects.
"""

import contextlib
import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LEAST_PORT, _PORT_TRIES = 20_000, 16


class Ports:
    """Ports of one stack; closed, others may have them."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._names = contextlib.ExitStack()

    def pick(self, preferred: int = 0) -> int:
        """`preferred` if it can be bound now and is no stack's, else a free port.

        Raises:
            OSError: there is none.
        """
        for candidate in (*filter(None, [preferred]), *_unasked(), 0, 0, 0, 0):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self._host, candidate))
                except OSError:
                    continue
                port: int = probe.getsockname()[1]
            if self._hold(port):
                return port
        raise OSError(f"no free port on {self._host}")

    def close(self) -> None:
        """Give them back."""
        self._names.close()

    def _hold(self, port: int) -> bool:
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            name.bind(f"\0regreen-port-{port}")
        except OSError:
            name.close()
            return False
        self._names.callback(name.close)
        return True


def _unasked() -> list[int]:
    """Some ports, in any order, that the kernel does not choose by itself."""
    try:
        low, high = map(int, _EPHEMERAL.read_text("ascii").split())
    except (OSError, ValueError):
        return []
    ports = [*range(_LEAST_PORT, low), *range(max(high + 1, _LEAST_PORT), 1 << 16)]
    return random.sample(ports, min(len(ports), _PORT_TRIES))
