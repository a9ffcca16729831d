"""A process that follows its parent, which is killed for real."""

import os
import select
import signal
import subprocess
import sys

_PARENT = """
import asyncio, sys
from regreen.stack.follow import following
async def main():
    child = await asyncio.create_subprocess_exec(*following([sys.executable, "-c", {code!r}]))
    await child.wait()
asyncio.run(main())
"""
_CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def test_it_ends_when_its_parent_is_killed() -> None:
    command = [sys.executable, "-c", _PARENT.format(code=_CHILD)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    try:
        assert not select.select([child], [], [], 0.2)[0]
        parent.send_signal(signal.SIGKILL)
        assert select.select([child], [], [], 10.0)[0], "it lives on"
    finally:
        os.close(child)
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_it_does_not_start_where_its_parent_is_gone() -> None:
    command = [sys.executable, "-m", "regreen.stack.follow", "1", "/bin/echo", "started"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
