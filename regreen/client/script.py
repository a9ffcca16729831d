"""For short programs: their words with defaults, and errors as one line with an exit code.

- Exit codes are those of the command line: 0 done, 1 the thing that was asked for is not so or was
  refused, 2 wrong usage, 3 a service is not available, 130 interrupted.
- An error that is none of a service or of the system stays a traceback: it is a bug.
"""

import sys
from types import TracebackType
from typing import Any

import grpc

from regreen.rpc.errors import (
    DeadlineExceeded,
    InvalidArgument,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from regreen.rpc.wire import from_rpc_error

OK, FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130


def exit_code(error: RegreenError) -> int:
    """The exit code that stands for an error."""
    if isinstance(error, InvalidArgument):
        return USAGE
    if isinstance(error, Unavailable | DeadlineExceeded | ResourceExhausted):
        return UNAVAILABLE
    return FAILED


def words(*defaults: str | None) -> list[str]:
    """The program's words, each with its default; from here on errors end it with one line.

    A word whose default is None must be given.
    """
    sys.excepthook = _end
    given = sys.argv[1:]
    least = sum(default is None for default in defaults)
    if not least <= len(given) <= len(defaults):
        told = str(sys.modules["__main__"].__doc__ or "").strip().partition("\n")[0]
        print(f"error: {len(given)} words given, {least} to {len(defaults)} are taken. {told}",  # noqa: T201
              file=sys.stderr)  # fmt: skip
        sys.exit(USAGE)
    rest = defaults[len(given) :]
    return [*given, *(default for default in rest if default is not None)]


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the program as the command line would."""
    if isinstance(error, grpc.RpcError):
        call: Any = error  # of either interface of gRPC: both tell code and details
        error = from_rpc_error(call)
    if isinstance(error, RegreenError):
        text, code = error.message, exit_code(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        code = USAGE
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", INTERRUPTED
    else:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {text}", file=sys.stderr)  # noqa: T201
    sys.exit(code)
