"""SWE-ReX's runtime over a Regreen sandbox: sessions, commands, files.

- Raises SWE-ReX's own exceptions for what a command or a caller did; trouble of the platform stays
  a `RegreenError`, so that nobody takes it for a finding.
- A command of a session that times out is interrupted and, if need be, killed; the session goes on
  at once, and `BashInterruptAction` then returns what the command had printed.
- Everything runs on the shared loop of the adapters, whichever loop a caller brings.
"""

import asyncio
import contextlib
import errno
import io
import logging
import re
from dataclasses import dataclass, field
from typing import Any

try:
    from swerex import exceptions as rex_errors
    from swerex.runtime import abstract as rex
except ImportError as error:
    raise ImportError("swe-rex is not installed: pip install '.[adapters]'") from error

from regreen.adapters import files
from regreen.adapters.held import HeldSandbox, exit_code, output_text, stopped
from regreen.adapters.loop import hand_over
from regreen.adapters.session import BadSyntax, BashSession
from regreen.adapters.terminal import Terminal
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, RegreenError
from regreen.sandbox import v1 as pb

_START_S = 5.0
PROMPT = "SHELLPS1PREFIX"
"""What SWE-ReX reports as matched when a command ended and the shell came back."""
_CONTROL = re.compile(r"\x1B[@-_][0-?]*[ -/]*[@-~]")
_LOST = "the shell's state after this command could not be kept; the one before it holds"


def _plain(text: str) -> str:
    """`text` without terminal control sequences, as SWE-ReX gives it."""
    return _CONTROL.sub("", text).replace("\r\n", "\n")


@dataclass(slots=True)
class _Open:
    """An open session."""

    shell: BashSession
    terminal: Terminal | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class RegreenRuntime(rex.AbstractRuntime):  # type: ignore[misc]
    """Runs SWE-ReX's requests in one sandbox."""

    def __init__(self, box: HeldSandbox, *, logger: logging.Logger) -> None:
        self._box = box
        self._sessions: dict[str, _Open] = {}
        self.logger = logger

    @property
    def sandbox_id(self) -> str:
        """Id of the sandbox."""
        return self._box.id

    async def is_alive(self, *, timeout: float | None = None) -> rex.IsAliveResponse:
        """Whether the sandbox is there and its service answers."""
        return await hand_over(self._is_alive(timeout))

    async def _is_alive(self, timeout: float | None) -> rex.IsAliveResponse:
        try:
            async with asyncio.timeout(timeout):
                await self._box.client.get_sandbox(self._box.id)
        except (RegreenError, TimeoutError) as error:
            message = str(error) or f"no answer within {timeout} s"
            return rex.IsAliveResponse(is_alive=False, message=message)
        return rex.IsAliveResponse(is_alive=True)

    async def create_session(
        self, request: rex.CreateBashSessionRequest
    ) -> rex.CreateBashSessionResponse:
        """Open a bash session.

        Raises:
            SessionExistsError: there is one of that name.
            SessionNotInitializedError: the sandbox has no bash.
            CommandTimeoutError: a startup file took longer than `startup_timeout`.
        """
        return await hand_over(self._create_session(request))

    async def _create_session(
        self, request: rex.CreateBashSessionRequest
    ) -> rex.CreateBashSessionResponse:
        if request.session in self._sessions:
            raise rex_errors.SessionExistsError(f"session {request.session} already exists")
        opened = self._sessions[request.session] = _Open(BashSession(self._box))
        timeout_s = request.startup_timeout + _START_S
        try:
            ran = await opened.shell.open(request.startup_source, timeout_s=timeout_s)
            if ran.timed_out:
                raise rex_errors.CommandTimeoutError(f"no session after {timeout_s} seconds")
        except FailedPrecondition as error:
            del self._sessions[request.session]
            raise rex_errors.SessionNotInitializedError(str(error)) from error
        except BaseException:
            self._sessions.pop(request.session, None)
            raise
        return rex.CreateBashSessionResponse(output=_plain(ran.output))

    async def run_in_session(
        self, action: rex.BashAction | rex.BashInterruptAction
    ) -> rex.BashObservation:
        """Run a command in a session, or interrupt what runs there.

        Raises:
            SessionDoesNotExistError: there is no such session.
            BashIncorrectSyntaxError: bash cannot parse the command; none of it ran.
            CommandTimeoutError: the command took too long; the session can be used.
            NonZeroExitCodeError: the command failed and `check` is "raise".
        """
        return await hand_over(self._run_in_session(action))

    async def _run_in_session(
        self, action: rex.BashAction | rex.BashInterruptAction
    ) -> rex.BashObservation:
        opened = self._session(action.session)
        if isinstance(action, rex.BashInterruptAction):
            return await self._interrupt(opened, action)
        async with opened.turn:
            if action.is_interactive_command or action.is_interactive_quit:
                return await self._interactive(opened, action)
            if opened.terminal is not None:
                raise rex_errors.SwerexException(
                    f"an interactive program runs in session {action.session!r}: end it with "
                    "is_interactive_quit or a BashInterruptAction"
                )
            return await self._command(opened.shell, action)

    def _session(self, name: str) -> _Open:
        if name not in self._sessions:
            raise rex_errors.SessionDoesNotExistError(f"session {name!r} does not exist")
        return self._sessions[name]

    async def _command(self, shell: BashSession, action: rex.BashAction) -> rex.BashObservation:
        try:
            ran = await shell.run(action.command, timeout_s=action.timeout)
        except BadSyntax as error:
            raise rex_errors.BashIncorrectSyntaxError(
                f"Error while checking bash command \n{action.command!r}\n{error.message}",
                extra_info={"bash_stdout": "", "bash_stderr": error.message},
            ) from error
        if ran.timed_out:
            raise rex_errors.CommandTimeoutError(_too_long(action))
        output = _plain(ran.output)
        reason = ran.stopped or ("" if ran.kept else _LOST)
        if action.check == "raise" and (ran.exit_code != 0 or ran.stopped):
            told = f" ({ran.stopped})" if ran.stopped else ""
            message = (
                f"Command {action.command!r} failed with exit code {ran.exit_code}{told}. "
                f"Here is the output:\n{output!r}"
            )
            raise rex_errors.NonZeroExitCodeError(_prefixed(action.error_msg, message))
        code = None if action.check == "ignore" else ran.exit_code
        return rex.BashObservation(
            output=output, exit_code=code, failure_reason=reason, expect_string=PROMPT
        )

    async def _interactive(self, opened: _Open, action: rex.BashAction) -> rex.BashObservation:
        try:
            if opened.terminal is not None:
                await opened.terminal.send(action.command)
            elif action.is_interactive_command:
                opened.terminal = Terminal(self._box, action.command, opened.shell.state)
            else:
                raise rex_errors.SwerexException(
                    f"no interactive program runs in session {action.session!r}"
                )
            output, number = await opened.terminal.expect(action.expect, action.timeout)
        except TimeoutError as error:
            raise rex_errors.CommandTimeoutError(_too_long(action)) from error
        output = _plain(output)
        if action.is_interactive_command:
            output = output.lstrip().removeprefix(action.command).strip()
        matched = await self._matched(opened, action.expect, number)
        return rex.BashObservation(output=output, exit_code=0, expect_string=matched)

    async def _matched(self, opened: _Open, expect: list[str], number: int) -> str:
        """The pattern of that number; past the last the program has ended, and is forgotten."""
        if number < len(expect):
            return expect[number]
        if opened.terminal is not None:
            terminal, opened.terminal = opened.terminal, None
            await terminal.close()
        return PROMPT

    async def _interrupt(
        self, opened: _Open, action: rex.BashInterruptAction
    ) -> rex.BashObservation:
        terminal = opened.terminal
        if terminal is None:
            left = await opened.shell.interrupt(tries=action.n_retry, patience_s=action.timeout)
            return rex.BashObservation(
                output=_plain(left).strip(), exit_code=0, expect_string=PROMPT
            )
        for _ in range(max(1, action.n_retry)):
            with contextlib.suppress(TimeoutError):
                await terminal.interrupt()
                output, number = await terminal.expect(action.expect, action.timeout)
                matched = await self._matched(opened, action.expect, number)
                return rex.BashObservation(
                    output=_plain(output).strip(), exit_code=0, expect_string=matched
                )
        output, opened.terminal = terminal.take(), None
        await terminal.close()
        return rex.BashObservation(output=_plain(output).strip(), exit_code=0, expect_string=PROMPT)

    async def close_session(
        self, request: rex.CloseBashSessionRequest
    ) -> rex.CloseBashSessionResponse:
        """Close a session; an interactive program in it is killed, background ones go on.

        Raises:
            SessionDoesNotExistError: there is no such session.
        """
        return await hand_over(self._close_session(request.session))

    async def _close_session(self, name: str) -> rex.CloseBashSessionResponse:
        opened = self._session(name)
        del self._sessions[name]
        if opened.terminal is not None:
            await opened.terminal.close()
        return rex.CloseBashSessionResponse()

    async def execute(self, command: rex.Command) -> rex.CommandResponse:
        """Run a command outside of every session.

        Raises:
            CommandTimeoutError: it took longer than its `timeout`.
            NonZeroExitCodeError: it failed and `check` is set.
            FileNotFoundError: there is no such `cwd`.
        """
        return await hand_over(self._execute(command))

    async def _execute(self, command: rex.Command) -> rex.CommandResponse:
        argv = [command.command] if isinstance(command.command, str) else list(command.command)
        if command.shell:
            argv = ["/bin/sh", "-c", *argv]
        if command.merge_output_streams:
            argv = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *argv]
        cwd = self._box.path(command.cwd) if command.cwd else ""
        try:
            result = await self._box.run(
                argv, environment=command.env, cwd=cwd, timeout_s=command.timeout
            )
        except InvalidArgument as error:
            if str(error).startswith("command.cwd"):
                raise FileNotFoundError(errno.ENOENT, str(error)) from error
            raise ValueError(str(error)) from error
        if result.reason == pb.END_REASON_TIMEOUT:
            message = f"Timeout ({command.timeout}s) exceeded while running command"
            raise rex_errors.CommandTimeoutError(message)
        response = rex.CommandResponse(
            stdout=output_text(result.stdout),
            stderr=output_text(result.stderr),
            exit_code=exit_code(result),
        )
        if command.check and response.exit_code != 0:
            told = f" ({stopped(result)})" if stopped(result) else ""
            message = (
                f"Command {command.command!r} failed with exit code {response.exit_code}{told}. "
                f"Stdout:\n{response.stdout!r}\nStderr:\n{response.stderr!r}"
            )
            raise rex_errors.NonZeroExitCodeError(_prefixed(command.error_msg, message))
        return response

    async def read_file(self, request: rex.ReadFileRequest) -> rex.ReadFileResponse:
        """The text of a file, decoded as `Path.read_text` does.

        Raises:
            FileNotFoundError: there is none.
            OSError: it is no regular file, or larger than the configuration allows.
        """
        content = await hand_over(files.read_whole(self._box, request.path))
        encoding = request.encoding or "utf-8"
        with io.TextIOWrapper(
            io.BytesIO(content), encoding=encoding, errors=request.errors
        ) as text:
            return rex.ReadFileResponse(content=text.read())

    async def write_file(self, request: rex.WriteFileRequest) -> rex.WriteFileResponse:
        """Write a text file, making its directories."""
        content = request.content.encode()
        await hand_over(files.write_whole(self._box, request.path, content))
        return rex.WriteFileResponse()

    async def upload(self, request: rex.UploadRequest) -> rex.UploadResponse:
        """Copy a file or a tree of this machine into the sandbox, modes included."""
        await hand_over(files.upload(self._box, request.source_path, request.target_path))
        return rex.UploadResponse()

    async def close(self) -> rex.CloseResponse:
        """Close every session and delete the sandbox; safe to call again."""
        await hand_over(self._close())
        return rex.CloseResponse()

    async def _close(self) -> None:
        for name in list(self._sessions):
            await self._close_session(name)
        await self._box.close()


def _too_long(action: Any) -> str:
    return f"timeout after {action.timeout} seconds while running command {action.command!r}"


def _prefixed(error_msg: str, message: str) -> str:
    return f"{error_msg}: {message}" if error_msg else message
