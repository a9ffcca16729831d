"""`python -m regreen.stack.follow PID COMMAND...`: become a command that ends with its parent.

- The parent-death signal outlives the exec, so a parent that is killed leaves nothing behind.
- For parents with threads, which cannot run code of their own between fork and exec.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def following(command: Sequence[str]) -> list[str]:
    """A command line that runs `command` for as long as this process lives."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def main() -> None:
    """Set the signal, see that the parent still lives, exec."""
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(parent):
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
