"""A bash session over commands that end: what one command leaves in the shell, the next one finds.

- Every command runs in a bash of its own, over unary `Run`. Between them the shell's state (working
  directory, variables, functions, aliases, options, umask) is held here, never in the sandbox: it
  survives a fork, snapshot or restore of the sandbox, and a killed command leaves the old one.
- Where a command ends is told by its process, never by what it prints; a state is taken only
  whole, between two marks that no command can know beforehand.
- A command is checked for syntax before any of it runs.
- Not kept: positional parameters, traps, open descriptors, the directory stack, the job table.
  Background processes go on, `exit` and `exec` end only their command, standard input is empty.
"""

import asyncio
import contextlib
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from regreen.adapters.held import HeldSandbox, exit_code, output_text, stopped
from regreen.rpc.errors import FailedPrecondition, RegreenError
from regreen.sandbox import v1 as pb

_GRACE_S = 2.0
_KILL_S = 10.0
_NO_DIRECTORY = 252

# Descriptor 87 is the command's standard error as `Run` sees it; the command itself has 1 and 2 in
# one stream. `$1` is the mark, standard input the state, the command and a NUL after each.
_WRAPPER = r"""
__regreen_variables() {
  builtin compgen -A variable | while IFS= builtin read -r __regreen_name; do
    case $__regreen_name in
      __regreen_*|BASH|BASHOPTS|BASHPID|BASH_*|COMP_*|DIRSTACK|EPOCH*|EUID|FUNCNAME|GROUPS) ;;
      HISTCMD|LINENO|PIPESTATUS|PPID|RANDOM|SRANDOM|SECONDS|SHELLOPTS|UID|_) ;;
      *) builtin declare -p "$__regreen_name" ;;
    esac
  done
}
__regreen_functions() {
  builtin declare -F | while IFS=' ' builtin read -r __regreen_word __regreen_flags __regreen_name
  do
    case $__regreen_name in __regreen_*) continue ;; esac
    builtin declare -f "$__regreen_name"
    case $__regreen_flags in *x*) builtin printf 'declare -fx %q\n' "$__regreen_name" ;; esac
  done
}
__regreen_end() {
  __regreen_set=$SHELLOPTS
  builtin set +eux
  builtin trap - EXIT INT DEBUG ERR RETURN
  builtin printf '# %s begin\n' "$__regreen_mark"
  __regreen_variables
  builtin shopt -p
  __regreen_functions
  builtin alias -p
  builtin umask -p
  builtin printf 'cd -- %q || { cd /; builtin echo %q" is gone; this is /"; }\n' "$PWD" "$PWD"
  builtin declare -p OLDPWD  # after the cd, which sets it
  builtin printf '__regreen_set=%q\n' "$__regreen_set"
  builtin printf '# %s end\n' "$__regreen_mark"
  builtin exit "$1"
}
{
  __regreen_mark=$1
  IFS= builtin read -r -d '' __regreen_state
  IFS= builtin read -r -d '' __regreen_command
  exec 87>&2 2>&1 </dev/null
  builtin shopt -s expand_aliases
  builtin set --
  case $__regreen_state in *'shopt -s extglob'*) builtin set -- -O extglob ;; esac
  if ! __regreen_syntax=$(builtin printf '%s\n' "$__regreen_command" | "$BASH" "$@" -n 2>&1); then
    builtin printf '# %s syntax\n%s\n' "$__regreen_mark" "$__regreen_syntax" >&87
    builtin exit 2
  fi
  builtin set --
  builtin trap '{ __regreen_end 130; } 2>/dev/null >&87' INT
  builtin trap '{ __regreen_end $?; } 2>/dev/null >&87' EXIT
  if [ -n "$__regreen_state" ]; then
    for __regreen_name in $(builtin compgen -e); do builtin unset -- "$__regreen_name"; done
    builtin eval "$__regreen_state"
  fi 2>/dev/null
  if [ -n "$__regreen_set" ]; then  # on the command's first line, or the eval would be traced
    __regreen_command="set -o ${__regreen_set//:/; set -o }; $__regreen_command"
    for __regreen_name in interactive-comments hashall braceexpand; do
      case :$__regreen_set: in *:$__regreen_name:*) ;;
        *) __regreen_command="set +o $__regreen_name; $__regreen_command" ;;
      esac
    done
  fi
  builtin eval "$__regreen_command"
  { __regreen_end $?; } 2>/dev/null >&87
}
"""

# Signals the process group of the bash whose last word is the mark on standard input; with KILL
# all of it but that bash itself. Its exit code says whether there was one.
_SIGNAL = r"""
IFS= read -r mark
for entry in /proc/[0-9]*; do
  mapfile -d '' -t words <"$entry/cmdline" && [ ${#words[@]} -gt 0 ] || continue
  [ "${words[-1]}" = "$mark" ] && read -r line <"$entry/stat" || continue
  fields=(${line##*) })
  leader=${fields[2]}  # its group: a subshell has the same words
  break
done 2>/dev/null
[ -n "$leader" ] || exit 3
[ "$1" = KILL ] || { kill -s "$1" -- "-$leader"; exit 0; }
for entry in /proc/[0-9]*; do
  read -r line <"$entry/stat" || continue
  fields=(${line##*) })
  pid=${entry#/proc/}
  [ "${fields[2]}" = "$leader" ] && [ "$pid" != "$leader" ] && kill -KILL "$pid"
done 2>/dev/null
exit 0
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """How one command of a session ended."""

    output: str
    """Both output streams in the order written, bounded."""
    exit_code: int
    timed_out: bool = False
    stopped: str = ""
    """Which limit stopped it; empty where none did."""
    kept: bool = True
    """Whether the shell's state after the command was taken over."""


class BadSyntax(Exception):
    """bash cannot parse a command; none of it ran."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BashSession:
    """One shell; commands take turns."""

    def __init__(self, box: HeldSandbox) -> None:
        self._box = box
        self._turn = asyncio.Lock()
        self._state = b""
        self._mark = ""
        self._left = ""

    @property
    def state(self) -> bytes:
        """The shell's state as a script that makes it; empty before the first command."""
        return self._state

    async def open(self, source: Sequence[str] = (), *, timeout_s: float | None = None) -> Ran:
        """Start the shell and read the files of `source` in it.

        Raises:
            FailedPrecondition: the sandbox has no bash, or not the configured directory.
        """
        begin = f"cd -- {shlex.quote(self._box.config.cwd)} || exit {_NO_DIRECTORY}; unset OLDPWD"
        lines = [begin, *(f"source {shlex.quote(path)}" for path in source)]
        ran = await self.run("\n".join(lines), timeout_s=timeout_s)
        if not ran.timed_out and (not self._state or ran.exit_code == _NO_DIRECTORY):
            raise FailedPrecondition(
                f"no bash session in {self._box.id} (exit code {ran.exit_code}): {ran.output}"
            )
        return ran

    async def run(self, command: str, *, timeout_s: float | None = None) -> Ran:
        """Run a command to its end; at `timeout_s` it is interrupted, then killed.

        Raises:
            BadSyntax: bash cannot parse it.
            ValueError: it holds a NUL.
        """
        if "\0" in command:
            raise ValueError("a command cannot hold a NUL character")
        async with self._turn:
            mark = self._mark = f"regreen-{secrets.token_hex(12)}"
            self._left = ""
            call = asyncio.create_task(self._call(mark, command, timeout_s))
            try:
                timed_out = await self._until(call, timeout_s)
                result = await call
            finally:
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError, RegreenError):
                    await call
                self._mark = ""
            ran = self._take(mark, result, timed_out)
            self._left = ran.output if ran.timed_out else ""
            return ran

    async def _call(self, mark: str, command: str, timeout_s: float | None) -> pb.CommandResult:
        limit_s = self._box.config.max_command_s
        if timeout_s is not None:
            limit_s = min(limit_s, timeout_s + _GRACE_S)
        argv = ["bash", "--noprofile", "--norc", "-c", _WRAPPER, "bash", mark]
        stdin = self._state + b"\0" + command.encode("utf-8", "surrogateescape") + b"\0"
        return await self._box.run(argv, cwd="/", stdin=stdin, timeout_s=limit_s)

    async def _until(self, call: "asyncio.Task[pb.CommandResult]", timeout_s: float | None) -> bool:
        if timeout_s is None:
            return False
        done, _ = await asyncio.wait({call}, timeout=timeout_s)
        if done:
            return False
        await self._signal("INT")  # so that the shell says in which state it is; else it is killed
        return True

    def _take(self, mark: str, result: pb.CommandResult, timed_out: bool) -> Ran:
        told = result.stderr.head + result.stderr.tail
        _, found, syntax = told.partition(f"# {mark} syntax\n".encode())
        if found:
            raise BadSyntax(syntax.decode("utf-8", "backslashreplace").rstrip("\n"))
        noise, begun, rest = told.rpartition(f"# {mark} begin\n".encode())
        state, whole, _ = rest.rpartition(f"# {mark} end\n".encode())
        kept = bool(whole) and result.stderr.total_bytes == len(told)
        if kept:
            self._state = state
        limit = stopped(result)
        timed_out = timed_out or result.reason == pb.END_REASON_TIMEOUT
        note = "" if kept else (noise if begun else told).decode("utf-8", "backslashreplace")
        text = output_text(result.stdout)
        return Ran(text + note, exit_code(result), timed_out, limit, kept)

    async def interrupt(self, *, tries: int = 3, patience_s: float = 0.2) -> str:
        """Interrupt what runs, and kill it if it does not end; what a timed-out command printed.

        Raises:
            TimeoutError: it could not even be killed.
        """
        mark = self._mark
        for _ in range(max(1, tries) if mark else 0):
            await self._signal("INT", mark)
            if await self._ended(patience_s):
                break
        else:
            if mark:
                await self._signal("KILL", mark)
                if not await self._ended(_KILL_S):
                    raise TimeoutError("the command could not be killed")
        left, self._left = self._left, ""
        return left

    async def _ended(self, patience_s: float) -> bool:
        try:
            async with asyncio.timeout(patience_s), self._turn:
                return True
        except TimeoutError:
            return False

    async def _signal(self, name: str, mark: str = "") -> None:
        argv = ["bash", "--noprofile", "--norc", "-c", _SIGNAL, "bash", name]
        stdin = f"{mark or self._mark}\n".encode()
        await self._box.run(argv, cwd="/", stdin=stdin, timeout_s=_KILL_S)
