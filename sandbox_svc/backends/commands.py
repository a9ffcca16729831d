"""What every backend asks of a command and of a path before it looks at them.

- The bounds keep a request below what one message to a sandbox's first process may hold.
- Every command starts from the same small environment; nothing of the service's own is in it.
"""

import os

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.backends.base import Command

ENVIRONMENT = {
    "PATH": "/work/env/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/work/home",
    "USER": "regreen",
    "LOGNAME": "regreen",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TMPDIR": "/tmp",
    "TERM": "dumb",
}
_MAX_ARGUMENT_BYTES = 2 << 20
"""Of arguments and environment together; the kernel takes no more."""
_MAX_PATH_CHARS = 4096


def check_command(command: Command) -> None:
    """Refuse a command that makes no sense.

    Raises:
        InvalidArgument: names the field.
    """
    if not command.argv or not command.argv[0]:
        raise InvalidArgument("command.argv", "is empty", "give the program and its arguments")
    variables = [*command.env, *command.env.values()]
    for name, held in (("argv", command.argv), ("cwd", [command.cwd]), ("environment", variables)):
        if any("\0" in text for text in held):
            raise InvalidArgument(f"command.{name}", "contains a NUL character", "leave it out")
    texts = [*command.argv, command.cwd, *variables]
    if sum(len(os.fsencode(text)) + 1 for text in texts) > _MAX_ARGUMENT_BYTES:
        raise InvalidArgument(
            "command.argv",
            f"with the environment is over {_MAX_ARGUMENT_BYTES} bytes",
            "give the rest on standard input or in a file",
        )
    if not command.cwd.startswith("/"):
        raise InvalidArgument("command.cwd", "is not absolute", "give a path such as /work/repo")
    if any(not name or "=" in name for name in command.env):
        raise InvalidArgument(
            "command.environment", "has an empty name or one with '='", "name it as a shell would"
        )
    if command.timeout_s <= 0:
        raise InvalidArgument("command.timeout", "is not positive", "give more than 0 s")


def absolute(path: str, field: str = "path") -> str:
    """The normal form of an absolute path.

    Raises:
        InvalidArgument: it is relative or malformed.
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(
            field, f"is not an absolute path: {path[:200]!r}", "give one such as /work/repo/file"
        )
    if len(path) > _MAX_PATH_CHARS:
        raise InvalidArgument(
            field, f"has {len(path)} characters", f"give at most {_MAX_PATH_CHARS}"
        )
    return os.path.normpath("/" + path.lstrip("/"))
