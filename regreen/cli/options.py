"""Options that many commands share.

- `--home` names the directory of the local stack; the endpoints are read from it.
"""

from pathlib import Path
from typing import Annotated

import typer

from regreen.client.stack import Endpoints, Stack
from regreen.common import v1 as common_pb
from regreen.rpc.errors import InvalidArgument
from regreen.settings import default_home

Home = Annotated[
    Path | None,
    typer.Option(help="Directory of the stack's data; default REGREEN_HOME.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]

MODES = {"any_fix": common_pb.MODE_ANY_FIX, "keep_new": common_pb.MODE_KEEP_NEW}
PIPELINES = {"simplified": common_pb.PIPELINE_SIMPLIFIED, "full": common_pb.PIPELINE_FULL}
GRADERS = {
    "build": common_pb.GRADER_BUILD,
    "build+gates": common_pb.GRADER_BUILD_GATES,
    "build+gates+judge": common_pb.GRADER_BUILD_GATES_JUDGE,
}


def choose(field: str, value: str, choices: dict[str, int]) -> int:
    """The enum value that a word stands for.

    Raises:
        InvalidArgument: no such word; lists the words.
    """
    if value not in choices:
        raise InvalidArgument(field, f"{value!r} is unknown", f"give one of {', '.join(choices)}")
    return choices[value]


def open_stack(home: Path | None, *, patience_s: float = 60.0) -> Stack:
    """Clients of the running local stack.

    Raises:
        Unavailable: no stack runs from this home.
    """
    return Stack(Endpoints.load(home or default_home()), patience_s=patience_s)
