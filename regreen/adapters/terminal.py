"""One interactive program on a pseudo-terminal of a sandbox, driven line by line.

- The program lives as long as the `Exec` stream that carries its output; closing kills it.
- Its input comes through a named pipe under `/tmp`, and `script` (util-linux) makes the terminal.
- It starts in the shell state of a session and changes nothing of it.
- Unread output is bounded: the oldest is dropped.
"""

import asyncio
import codecs
import contextlib
import re
import secrets
from collections.abc import Sequence

from regreen.adapters.held import HeldSandbox
from regreen.rpc.errors import RegreenError
from regreen.sandbox import v1 as pb

_START = r"""
IFS= read -r -d '' state
IFS= read -r -d '' command
umask 077
mkdir "$1" && mkfifo "$1/in" &&
  printf 'stty -echo\n%s\n%s\n' "$state" "$command" >"$1/run" || exit 125
exec 3<>"$1/in" </dev/null
exec script -qfec "exec bash --noprofile --norc $1/run" /dev/null <"$1/in" 2>&1
"""
_SEND = 'exec cat >"$1/in"'
_SEND_S = 10.0
_CLOSE_S = 10.0


class Terminal:
    """A running interactive program."""

    def __init__(self, box: HeldSandbox, command: str, state: bytes) -> None:
        self._box = box
        self._directory = f"/tmp/.regreen-{secrets.token_hex(8)}"
        self._unread = ""
        self._news = asyncio.Event()
        self.ended = False
        """Whether the program has ended."""
        self._reader = asyncio.create_task(self._read(command, state))

    async def _read(self, command: str, state: bytes) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        config = self._box.config
        request = pb.Command(
            argv=["bash", "--noprofile", "--norc", "-c", _START, "bash", self._directory],
            environment=config.env,
            cwd="/",
            stdin=state + b"\0" + command.encode("utf-8", "surrogateescape") + b"\0",
        )
        stream = self._box.client.exec(self._box.id, request, timeout_s=config.max_command_s)
        try:
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for event in stream:
                    text = decoder.decode(event.stdout or event.stderr)
                    self._unread = (self._unread + text)[-config.output_bytes :]
                    self._news.set()
        except RegreenError as error:
            self._unread += f"\n[the program was lost: {error}]\n"
        finally:
            self.ended = True
            self._news.set()

    async def send(self, line: str) -> None:
        """Give a line to the program.

        Raises:
            TimeoutError: it does not read its input.
        """
        await self._give(line.encode("utf-8", "surrogateescape") + b"\n")

    async def interrupt(self) -> None:
        """Press Ctrl-C."""
        await self._give(b"\x03")

    async def _give(self, data: bytes) -> None:
        argv = ["sh", "-c", _SEND, "sh", self._directory]
        result = await self._box.run(argv, cwd="/", stdin=data, timeout_s=_SEND_S)
        if result.reason == pb.END_REASON_TIMEOUT:
            raise TimeoutError("the program does not read its input")

    async def expect(self, patterns: Sequence[str], timeout_s: float | None) -> tuple[str, int]:
        """What the program printed before the first match, and which pattern it was.

        The number is that of no pattern (their count) where the program ended instead.

        Raises:
            TimeoutError: nothing matched in time; what was printed stays unread.
        """
        compiled = [re.compile(pattern, re.DOTALL) for pattern in patterns]
        async with asyncio.timeout(timeout_s):
            while True:
                self._news.clear()
                found = [(m.start(), n, m) for n, p in enumerate(compiled)
                         if (m := p.search(self._unread))]  # fmt: skip
                if found:
                    start, number, match = min(found, key=lambda one: one[:2])
                    before, self._unread = self._unread[:start], self._unread[match.end() :]
                    return before, number
                if self.ended:
                    return self.take(), len(compiled)
                await self._news.wait()

    def take(self) -> str:
        """Everything unread."""
        text, self._unread = self._unread, ""
        return text

    async def close(self) -> None:
        """Kill the program and remove its pipe."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        with contextlib.suppress(RegreenError):  # the sandbox may be gone already
            await self._box.run(["rm", "-rf", self._directory], cwd="/", timeout_s=_CLOSE_S)
