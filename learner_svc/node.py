"""`python -m learner_svc.node`: the ranks of a further machine of a learner's runs.

- It waits for calls in the learner's home and answers each over a link to the service's machine.
  Its ranks begin when all machines are there; they end with the link, with this process, and
  together: when one is lost, the service is told which, and calls anew if the run is to go on.
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
from learner_svc.link import Link, LinkEnded
from regreen.home import default_home
from regreen.rpc import logging

_POLL_S = 0.2
_ENDED = 128 + signal.SIGTERM


class Node:
    """One machine's ranks."""

    def __init__(self, calls: Path, number: int) -> None:
        self._calls, self._number = calls, number
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._call: Call | None = None
        self._link: Link | None = None
        self._over = ""
        self._warned = ""
        self._log = logging.get()

    def look(self) -> None:
        """Answer a call that is new; keep up the link of one that was answered."""
        if self._call is None or self._link is None:
            self._answer()
            return
        try:
            if self._link.exchange() and not self.ranks:
                self._start(self._call)
            codes = {n: code for n, rank in self.ranks.items() if (code := rank.poll()) is not None}
            if codes:
                self._link.lost(launch.how_ended(codes))
                self._leave(launch.how_ended(codes))
        except LinkEnded as error:
            self._leave(str(error))

    def _answer(self) -> None:
        call = Call.read(self._calls)
        if call is None or call.id == self._over:
            return
        if self._number >= call.nodes:
            self._log.warning("this run takes fewer machines", nodes=call.nodes, node=self._number)
            self._over = call.id
            return
        try:
            self._call, self._link = call, Link(call, self._number)
        except OSError as error:
            self._warn(call, f"cannot reach {call.address}:{call.link}: {error}")

    def _start(self, call: Call) -> None:
        self._log.info(
            "answering a call", address=call.address, ranks=list(call.ranks(self._number))
        )
        for rank in call.ranks(self._number):
            self.ranks[rank] = subprocess.Popen(
                launch.command(None, os.getpid()),
                env=launch.environment(os.environ, call, rank),
                stdin=subprocess.DEVNULL,
            )

    def _leave(self, why: str) -> None:
        """End this machine's part of a call; one whose ranks never began may be answered again."""
        if self._call is not None:
            if self.ranks:
                self._over = self._call.id
            self._warn(self._call, why)
        self.end()

    def _warn(self, call: Call, why: str) -> None:
        """Once a call: it is tried again as long as it stands."""
        if self._warned != call.id:
            self._warned = call.id
            self._log.warning("not in the call", why=why, address=call.address, node=self._number)

    def end(self) -> None:
        """Kill every rank, reap it, and leave the call."""
        for rank in self.ranks.values():
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
        for rank in self.ranks.values():
            rank.wait()
        self.ranks = {}
        if self._link is not None:
            self._link.close()
        self._call = self._link = None


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
