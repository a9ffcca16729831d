"""What a service logs of a failed call: where it failed, and nothing of what the caller sent."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_SERVICE = """
import asyncio, sys
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient
from regreen.rpc import logging
from regreen.rpc.errors import InfraError, RegreenError
from regreen.rpc.server import Server
from regreen.sandbox import v1 as pb
from regreen.settings import ServiceSettings

NAME = "regreen.sandbox.v1.SandboxService"

class Sandboxes(pb.SandboxServiceServicer):
    async def Run(self, request, context):
        command, argv = request.command, list(request.command.argv)
        if "bug" in argv:
            return self.deeper(command, argv)
        raise InfraError("the sandbox has lost its processes")

    def deeper(self, command, argv):
        text = command.stdin.decode()
        raise ZeroDivisionError

async def main():
    server = Server(ServiceSettings(drain_s=0.2), [NAME])
    pb.add_SandboxServiceServicer_to_server(Sandboxes(), server.grpc)
    async with server, connect(server.address) as channel:
        client = SandboxClient(channel, patience_s=0.0)
        for word in ("bug", "ours"):
            for request_id in ("r-" + word, ""):
                try:
                    await client.run("sbx_1", [word, "HUNTER2"], environment={"A": "HUNTER2"},
                                     stdin=b"HUNTER2", request_id=request_id)
                except RegreenError as error:
                    print(error)

logging.configure("sandbox", sys.argv[1])
asyncio.run(main())
"""


@pytest.mark.parametrize("level", ["debug", "error"])
def test_a_log_holds_nothing_of_what_callers_send(level: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_SERVICE), level],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.count("ZeroDivisionError") == 2
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    failed = [line for line in lines if line["event"] == "call failed"]
    bugs = [line for line in failed if "exception" in line]
    assert len(failed) == 4
    assert len(bugs) == 2
    assert {frame["name"] for line in bugs for frame in line["exception"][0]["frames"]} > {
        "Run",
        "deeper",
    }
    ours = [line["error"] for line in failed if line not in bugs]
    assert ours == ["the sandbox has lost its processes"] * 2
    assert "HUNTER2" not in ended.stderr
