"""Sandboxes whose test run was started ahead: it has loaded its modules and waits for a request.

- A spare is used once; who lets it go on, or wants it no more, deletes it.
- Its run gets the key of the result frames only with the request, after the diff is in place.
"""

import asyncio
import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

from regreen.rpc import logging
from sandbox_svc.backends.base import Box, EndReason, ExecResult, Later
from sandbox_svc.backends.fds import write_all
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import REPO
from sandbox_svc.state_records import State

READY_S = 120.0
_PIPE_BYTES = 60_000

Names = tuple[tuple[str, str], ...]
"""Modules to load ahead; see `testrun.Survey`."""


class Miss(StrEnum):
    """Why a validation was not served by a warm sandbox."""

    OFF = "off"
    """The State differs, is not suited, or is none that a builder made."""
    OPTIONS = "options"
    """Coverage or a seed."""
    LOCK = "lock"
    SOURCE = "source"
    """The diff changes a file that is no Python source, or adds a top-level module."""
    NOT_READY = "not_ready"
    DIED = "died"
    ENDED = "ended"
    """The run was ended by a limit or a signal."""
    ANEW = "anew"
    """Something was imported under other conditions than ahead."""


class Spare:
    """One sandbox whose test run waits."""

    def __init__(self, state: State, box: Box) -> None:
        self.state, self.box = state, box
        self.memory_bytes = 0
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._go, self._key = asyncio.Event(), secrets.token_bytes(32)
        self._heard, self._skip = bytearray(), 0
        self._stdin = -1
        self._run: asyncio.Task[ExecResult] | None = None

    @property
    def alive(self) -> bool:
        """Whether the run still waits or gets ready."""
        return self._run is not None and not self._run.done()

    def start(self, options: testrun.RunOptions, names: Names, *, deep: bool) -> None:
        """Start the run; it loads these modules and waits."""
        first = {"key": self._key.hex(), "names": names, "root": REPO, "deep": deep}
        read, self._stdin = os.pipe2(os.O_CLOEXEC)
        self._later = Later(read, self._listen, self._go)
        command = testrun.run_command(options, later=self._later)

        async def run() -> ExecResult:
            try:
                return await self.box.run(command)
            finally:
                os.close(read)
                if not self.ready.done():
                    self.ready.set_result({})

        self._run = asyncio.create_task(run())
        self._feed = asyncio.create_task(self._write(json.dumps(first).encode() + b"\n"))

    async def _write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            if len(data) <= _PIPE_BYTES:
                os.write(self._stdin, data)
            else:
                await asyncio.to_thread(_write_all, os.dup(self._stdin), data)

    async def _listen(self, stream: str, chunk: bytes) -> None:
        if stream != "channel" or self.ready.done():
            return
        self._heard += chunk
        frames, _ = testrun.read_frames(bytes(self._heard), self._key)
        if frames:
            self._skip = len(self._heard)
            self.ready.set_result(frames[0])

    async def loaded(self) -> Mapping[str, Any]:
        """What the run says once it waits; empty if it ended instead."""
        async with asyncio.timeout(READY_S):
            report = await asyncio.shield(self.ready)
            await self._feed
        return report

    async def finish(self, options: testrun.RunOptions) -> testrun.TestRun | Miss:
        """Let the run go on over what the sandbox holds now; what it reported."""
        if self._run is None or not self.alive:
            return Miss.DIED
        key = secrets.token_bytes(32)
        self._later.timeout_s = options.timeout_s
        self._go.set()
        await self._write(testrun.run_request(options, key))
        self._close_stdin()
        result = await self._run
        odd = result.overruns - {EndReason.TIMEOUT}
        if odd or result.reason not in (EndReason.EXIT, EndReason.TIMEOUT):
            return Miss.ENDED
        run = testrun.read_run(replace(result, channel=result.channel[self._skip :]), key)
        if run.anew:
            logging.get().debug("warm_run_done_anew", state_id=self.state.id, reason=run.anew)
        return Miss.ANEW if run.anew else run

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    async def delete(self) -> None:
        """End the run and remove the sandbox."""
        if self._run is not None:
            self._run.cancel()
            self._feed.cancel()
            await asyncio.gather(self._run, self._feed, return_exceptions=True)
        self._close_stdin()
        await self.box.delete()


def _write_all(fd: int, data: bytes) -> None:
    """Write to a descriptor of its own, and close it."""
    try:
        write_all(fd, data)
    finally:
        os.close(fd)
