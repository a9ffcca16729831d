"""Addresses that are taken: one line, ours, and nobody's socket is pulled from under them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.sandbox import StateClient
from regreen.rpc.errors import FailedPrecondition, RegreenError
from regreen.rpc.ports import check_free
from regreen.rpc.server import Server
from regreen.settings import ServiceSettings

_SERVE = """
import asyncio, sys
from regreen.rpc.errors import RegreenError
from regreen.rpc.server import Server
from regreen.settings import ServiceSettings

async def main():
    async with Server(ServiceSettings(listen=sys.argv[1]), []):
        print("serving")

try:
    asyncio.run(main())
except RegreenError as error:
    sys.exit(error.message)
"""


def _serve(address: str) -> subprocess.CompletedProcess[str]:
    """A server in a process of its own, with all that it writes."""
    words = [sys.executable, "-c", _SERVE, address]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def test_a_port_that_is_taken_is_told_in_our_words_alone():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = _serve(address)
    told = done.stderr.splitlines()
    assert done.returncode == 1
    assert len(told) == 1, done.stderr
    assert told[0].startswith(f"listen: cannot bind {address}; is another instance running? --li")


@pytest.mark.parametrize("address", ["192.0.2.1:5000", "unix:/no/such/folder/s"])
def test_an_address_that_is_not_of_this_host_is_told_in_our_words_alone(address):
    insecure = _SERVE.replace("listen=sys.argv[1]", "listen=sys.argv[1], insecure=True")
    words = [sys.executable, "-c", insecure, address]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"listen: cannot bind {address}; --listen takes another")


async def test_a_socket_file_in_use_is_taken_and_one_that_was_left_is_not(tmp_path: Path):
    path = tmp_path / "s"
    settings = ServiceSettings(listen=f"unix:{path}", drain_s=0.0)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with Server(settings, []) as server:
        with pytest.raises(FailedPrecondition, match=r"cannot bind unix:.*another instance"):
            async with Server(settings, []):
                pass
        async with connect(server.address) as channel:
            with pytest.raises(RegreenError, match="Method not found"):
                await StateClient(channel, patience_s=0.0).get_state("st_1")
    path.unlink(missing_ok=True)
    path.write_text("a file of somebody's")
    with pytest.raises(OSError, match="in use"):
        check_free(f"unix:{path}")
    assert path.read_text() == "a file of somebody's"


def test_a_port_whose_connections_are_still_closing_is_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        accepted.close()  # closed here first: it stays in TIME_WAIT
        client.close()
    check_free(address)


def test_a_look_leaves_nothing(tmp_path: Path):
    check_free(f"unix:{tmp_path}/s")
    check_free("localhost:0")
    assert os.listdir(tmp_path) == []
