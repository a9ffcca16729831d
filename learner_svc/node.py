"""`python -m learner_svc.node`: the ranks of a further machine of a learner's runs.

- It waits for calls in the learner's home and answers each once, with the ranks of this machine;
  they end with the call, with their run, or with this process.
- It computes nothing itself, decides nothing and never ends by itself: that it was ended is no
  success, so that whatever started it starts it again.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from learner_svc import launch
from learner_svc.launch import Call
from regreen.home import default_home
from regreen.rpc import logging

_POLL_S = 0.5
_ENDED = 128 + signal.SIGTERM


class Node:
    """One machine's ranks."""

    def __init__(self, calls: Path, number: int) -> None:
        self._calls, self._number = calls, number
        self.ranks: list[subprocess.Popen[bytes]] = []
        self._answered = ""
        self._log = logging.get()

    def look(self) -> None:
        """Answer a call that is new; end the ranks of one that is over."""
        call = Call.read(self._calls)
        if call is not None and call.id == self._answered:
            return
        self.end()
        if call is None:
            return
        self._answered = call.id
        if self._number >= call.nodes:
            self._log.warning("this run takes fewer machines", nodes=call.nodes, node=self._number)
            return
        self._log.info(
            "answering a call", address=call.address, ranks=list(call.ranks(self._number))
        )
        for rank in call.ranks(self._number):
            self.ranks.append(
                subprocess.Popen(
                    launch.command(None, os.getpid()),
                    env=launch.environment(os.environ, call, rank),
                    stdin=subprocess.DEVNULL,
                )
            )

    def end(self) -> None:
        """Kill every rank and reap it."""
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
        for rank in self.ranks:
            rank.wait()
        self.ranks = []


def main(argv: list[str] | None = None) -> int:
    """Answer calls until the process is asked to end; the exit code."""
    parser = argparse.ArgumentParser(
        prog="learner_svc.node", allow_abbrev=False, description=__doc__
    )
    parser.add_argument("--home", type=Path, default=default_home(), help="the learner's home")
    parser.add_argument(
        "--follower", type=int, required=True, help="which of the further machines; 0 is the first"
    )
    options = parser.parse_args(argv)
    logging.configure("learner", "info")
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    node = Node(options.home / "learner" / launch.CALL, options.follower + 1)
    try:
        while not over.wait(_POLL_S):
            try:
                node.look()
            except OSError as error:  # of a shared volume that is away for a moment
                logging.get().warning("cannot look for calls", error=str(error))
    finally:
        node.end()
    return _ENDED


if __name__ == "__main__":
    sys.exit(main())
