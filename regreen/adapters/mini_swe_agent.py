"""A mini-swe-agent environment: its agents run in a Regreen sandbox, unchanged.

- Chosen as `environment_class: regreen.adapters.mini_swe_agent.RegreenEnvironment`.
- Every action runs in a fresh shell, as in mini-swe-agent's own environments.
- What a command does is an output, time and memory limits included; trouble of the platform is a
  `RegreenError` that ends the agent's run, so that nobody takes it for a finding.
- The sandbox is deleted by `cleanup`, when the object goes away and when the process ends.
"""

import asyncio
import platform
import weakref
from typing import Any

from pydantic import Field

from regreen.adapters import loop
from regreen.adapters.held import HeldSandbox, SandboxConfig, exit_code, output_text, stopped
from regreen.rpc.errors import InvalidArgument, RegreenError
from regreen.sandbox import v1 as pb

SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
"""First line of the output of a command that submits."""
_CLOSE_S = 10.0
_UNAME = "for flag in s n r v m; do uname -$flag; done"
_MERGED = 'exec "$@" 2>&1'


class RegreenEnvironmentConfig(SandboxConfig):
    """Configuration of a `RegreenEnvironment`."""

    timeout: float = Field(default=30, gt=0)
    """Seconds that one command may take."""
    interpreter: list[str] = Field(default=["bash", "-c"], min_length=1)
    """What runs a command, which is its last argument."""


class RegreenEnvironment:
    """One sandbox as mini-swe-agent's `Environment`."""

    def __init__(
        self,
        *,
        config_class: type[RegreenEnvironmentConfig] = RegreenEnvironmentConfig,
        **kwargs: Any,
    ) -> None:
        try:
            from minisweagent.exceptions import Submitted
        except ImportError as error:
            message = "mini-swe-agent is not installed: pip install '.[adapters]'"
            raise ImportError(message) from error
        self._submitted: type[Exception] = Submitted
        self.config = config_class(**kwargs)
        self._box = loop.call(HeldSandbox.open(self.config))
        self._uname: dict[str, str] = {}
        self._finalizer = weakref.finalize(self, _delete, self._box)

    @property
    def sandbox_id(self) -> str:
        """Id of the sandbox, with which any client can fork, snapshot or diff it."""
        return self._box.id

    def execute(
        self, action: dict[str, Any] | str, cwd: str = "", *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Run an action's command and say what came of it.

        Raises:
            Submitted: the command was the agent's submission.
            RegreenError: the platform failed.
        """
        command = action if isinstance(action, str) else action.get("command", "")
        timeout_s = timeout or self.config.timeout
        argv = ["sh", "-c", _MERGED, "sh", *self.config.interpreter, command]
        directory = self._box.path(cwd) if cwd else ""
        try:
            result = loop.call(self._box.run(argv, cwd=directory, timeout_s=timeout_s))
        except (InvalidArgument, UnicodeError) as error:
            return _failed("", error)
        output = _observation(result, timeout_s)
        self._check_finished(output)
        return output

    def _check_finished(self, output: dict[str, Any]) -> None:
        lines = output["output"].lstrip().splitlines(keepends=True)
        if lines and lines[0].strip() == SUBMIT and output["returncode"] == 0:
            submission = "".join(lines[1:])
            extra = {"exit_status": "Submitted", "submission": submission}
            raise self._submitted({"role": "exit", "content": submission, "extra": extra})

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        """The configuration, `uname` of the sandbox, and what the caller adds."""
        from minisweagent.utils.serialize import recursive_merge

        if not self._uname:
            result = loop.call(self._box.run(["sh", "-c", _UNAME], timeout_s=_CLOSE_S))
            names = ("system", "node", "release", "version", "machine")
            told = output_text(result.stdout).splitlines()
            self._uname = dict(zip(names, told, strict=False)) or platform.uname()._asdict()
        merged: dict[str, Any] = recursive_merge(self.config.model_dump(), self._uname, kwargs)
        return merged

    def serialize(self) -> dict[str, Any]:
        """What is written into a trajectory of this environment."""
        kind = f"{type(self).__module__}.{type(self).__name__}"
        environment = {**self.config.model_dump(mode="json"), "sandbox_id": self._box.id}
        return {"info": {"config": {"environment": environment, "environment_type": kind}}}

    def cleanup(self) -> None:
        """Delete the sandbox; safe to call again."""
        self._finalizer()


def _delete(box: HeldSandbox) -> None:
    if loop.inside():  # the garbage collector may call from there
        asyncio.run_coroutine_threadsafe(box.close(), loop.shared_loop())
        return
    try:
        loop.call(box.close(), timeout_s=_CLOSE_S)
    except (RegreenError, TimeoutError):
        pass  # its time to live ends it


def _observation(result: pb.CommandResult, timeout_s: float) -> dict[str, Any]:
    text = output_text(result.stdout, "replace") + output_text(result.stderr, "replace")
    if result.reason == pb.END_REASON_TIMEOUT:
        return _failed(text, TimeoutError(f"Command timed out after {timeout_s:g} seconds"))
    limit = stopped(result)
    if limit and (result.signal or not result.exit_code):
        return _failed(text, ResourceWarning(f"the command was stopped: {limit}"))
    return {"output": text, "returncode": exit_code(result), "exception_info": ""}


def _failed(text: str, error: Exception) -> dict[str, Any]:
    return {
        "output": text,
        "returncode": -1,
        "exception_info": f"An error occurred while executing the command: {error}",
        "extra": {"exception_type": type(error).__name__, "exception": str(error)},
    }
