"""What libraries log has the form of our own lines."""

import json
import subprocess
import sys

_SCRIPT = """
import asyncio, gc, logging
from regreen.rpc.logging import configure, get
configure("sandbox", "debug")
try:
    raise ValueError("of a servicer")
except ValueError:
    logging.getLogger("grpc._cython.cygrpc").exception("Unexpected [%s] raised", "ValueError")

async def forgotten():
    asyncio.get_running_loop().create_future().set_exception(KeyError("nobody asked"))
    gc.collect()

asyncio.run(forgotten())
logging.getLogger("quiet").info("not told")
get().info("ours")
"""


def test_every_line_is_an_object():
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["event"].splitlines()[0], line["level"]) for line in lines] == [
        ("Unexpected [ValueError] raised", "error"),
        ("Future exception was never retrieved", "error"),
        ("ours", "info"),
    ]
    assert {line["service"] for line in lines} == {"sandbox"}
    assert lines[0]["exception"][0]["exc_value"] == "of a servicer"
    assert all("timestamp" in line for line in lines)
