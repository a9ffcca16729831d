"""Options that many commands share.

- `--home` names the directory of the local stack; the endpoints are read from it.
- `--address` names a sandbox service that runs alone; then no stack is needed.
"""

import difflib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.client.access import Access
from regreen.client.channel import check_answers
from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from regreen.home import default_home
from regreen.rollout.context import check_settings
from regreen.rpc.errors import InvalidArgument, NotFound, RegreenError, Unavailable
from regreen.stack.layout import Layout
from regreen.train.names import split_of

Home = Annotated[
    Path | None,
    typer.Option(help="Directory of the stack's data; default REGREEN_HOME.", show_default=False),
]
Address = Annotated[
    str,
    typer.Option(
        help="Address of a sandbox service; default that of the stack.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
_PATIENCE_S = 2.0
"""How long a service may be away that nothing would start again."""
_PAGE = 1000


@asynccontextmanager
async def open_stack(
    home: Path | None, *, address: str = "", patience_s: float = 60.0
) -> AsyncIterator[Stack]:
    """Clients of the running local stack, or of the one sandbox service at `address`.

    Raises:
        InvalidArgument: the address is none.
        Unavailable: no stack runs from this home, or nothing answers at the address.
    """
    if address:
        check_typed(address, "--address")
        # Another service at the same place is none of this command's.
        only = Endpoints(dataset="", sandbox=address, policy="", judge="", learner="")
        async with Stack(only, patience_s=_PATIENCE_S) as stack:
            await check_answers(stack.sandbox.channel, address)
            try:
                yield stack
            except RegreenError as error:
                if type(error) is not RegreenError:
                    raise
                told = f"what answers at {address} is no sandbox service ({error.message})"
                raise Unavailable(told) from error
        return
    from regreen.stack import control  # only here are services looked for

    where = home or default_home()
    endpoints = Endpoints.load(where)
    # What is gone of a stack of this home's own will not come back; what others run may.
    if control.describe(Layout(where)) is None:
        patience_s = min(patience_s, _PATIENCE_S)
    async with Stack(endpoints, patience_s=patience_s) as stack:
        yield stack


async def sandbox_place(home: Path | None, given: str) -> tuple[str, Access | None]:
    """`given`, else the address of the stack's sandbox service, and what to show there; somebody
    answers at it.

    Raises:
        As `open_stack`.
    """
    if given:
        check_typed(given, "--sandbox")
    async with Stack(
        Endpoints(sandbox=given) if given else Endpoints.load(home or default_home())
    ) as stack:
        address = stack.endpoints.sandbox
        await check_answers(stack.sandbox.channel, address)
    return address, stack.endpoints.access


def check_typed(address: str, field: str) -> None:
    """Refuse what is no address.

    Raises:
        InvalidArgument: names `field` and what to give.
    """
    from regreen.settings import check_address

    try:
        check_address(field, address, unix=True)
    except ValueError as error:
        named, _, problem = str(error).partition(": ")
        raise InvalidArgument(named, problem) from None


async def read_pages(
    ask: Callable[[int, str], Awaitable[Any]], field: str, limit: int
) -> list[Any]:
    """Entries of a list, at most `limit`; `ask` takes the size and the token of a page."""
    rows: list[Any] = []
    token = ""
    while len(rows) < limit:
        page = await ask(min(limit - len(rows), _PAGE), token)
        rows += getattr(page, field)
        token = page.next_page_token
        if not token:
            break
    return rows


def parse_age(text: str) -> float | None:
    """Seconds of an age such as 7d; None where it is none."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        return None
    return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}[found[2]]


def parse_labels(values: list[str], field: str = "set") -> dict[str, str]:
    """`name=value` words as a mapping.

    Raises:
        InvalidArgument: a word without an equals sign.
    """
    labels: dict[str, str] = {}
    for value in values:
        name, sign, setting = value.partition("=")
        if not sign or not name:
            raise InvalidArgument(field, f"{value!r} has no name or no =", "write name=value")
        labels[name] = setting
    return labels


def parse_settings(values: list[str]) -> dict[str, str]:
    """`group.name=value` words as episode settings.

    Raises:
        InvalidArgument: a word without an equals sign, an unknown setting, or a wrong value.
    """
    labels = parse_labels(values)
    for name, value in labels.items():
        try:
            check_settings({name: value})
        except InvalidArgument as error:
            raise InvalidArgument(f"set {name}", error.problem, error.remedy) from error
    check_settings(labels)
    return labels


def parse_numbers(values: list[str], field: str = "hyper") -> dict[str, float | int | str]:
    """`name=value` words as a mapping, numbers as numbers."""
    return {name: _number(text) for name, text in parse_labels(values, field).items()}


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_split(word: str) -> str:
    """The split of tasks that a word names; none is every split.

    Raises:
        InvalidArgument: there is none of that name.
    """
    return split_of(word) if word else ""


def nothing_of(field: str, value: str, known: Iterable[str]) -> NotFound:
    """That nothing has `value`, with what comes close to it, or else some that there are."""
    there = sorted(name for name in known if name)
    near = difflib.get_close_matches(value, there, n=5, cutoff=0.5) or there[:10]
    more = f", ... ({len(there)} in all)" if len(there) > len(near) else ""
    told = f"there are {', '.join(near)}{more}" if near else "there is none yet"
    return NotFound(f"{field}: nothing here has {value!r}; {told}")


def task_status(word: str) -> pb.TaskStatus.ValueType:
    """The status of tasks that a word names.

    Raises:
        InvalidArgument: there is none of that name.
    """
    try:
        return pb.TaskStatus.Value(f"TASK_STATUS_{word.upper()}")
    except ValueError as error:
        raise InvalidArgument(
            "status",
            f"{word!r} is unknown",
            "give new, admitted, rejected, quarantined, waiting or unverified",
        ) from error
