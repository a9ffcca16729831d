"""What commands print, and the codes they exit with.

- Results go to standard output, progress and errors to standard error.
- With `--json` a read prints one JSON object, or one per line, and nothing else.
- Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a service is not available.
- Colours follow `NO_COLOR` and the terminal.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from regreen.rpc.errors import (
    DeadlineExceeded,
    InvalidArgument,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)

T = TypeVar("T")
OK, FAILED, USAGE, UNAVAILABLE = 0, 1, 2, 3
STDOUT = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160)
STDERR = Console(stderr=True, width=None if sys.stderr.isatty() else 240)


def exit_code(error: RegreenError) -> int:
    """The exit code that stands for an error."""
    if isinstance(error, InvalidArgument):
        return USAGE
    if isinstance(error, Unavailable | DeadlineExceeded | ResourceExhausted):
        return UNAVAILABLE
    return FAILED


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; a `RegreenError` becomes one line and an exit code."""
    # A terminated command ends like an interrupted one: what it started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return asyncio.run(work)
    except RegreenError as error:
        fail(error)
    except KeyboardInterrupt:
        STDERR.print("interrupted; what was committed is kept", style="yellow")
        raise typer.Exit(130) from None


def fail(error: RegreenError) -> NoReturn:
    """Print an error and exit with its code."""
    STDERR.print(f"error: {error.message}", style="red", highlight=False, markup=False)
    raise typer.Exit(exit_code(error)) from None


def as_dict(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON-able values with the names of the contract."""
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def print_json(value: Message | Mapping[str, Any] | Sequence[Any]) -> None:
    """One JSON object on standard output."""
    data = as_dict(value) if isinstance(value, Message) else value
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_json_lines(values: Iterable[Message | Mapping[str, Any]]) -> None:
    """One JSON object a line on standard output."""
    for value in values:
        data = as_dict(value) if isinstance(value, Message) else value
        typer.echo(json.dumps(data, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output."""
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    STDOUT.print(table)


class ProgressPrinter:
    """Shows `(stage, done, total, message)` on standard error: a bar on a terminal, lines else."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._start_s = time.monotonic()
        self._stage, self._stage_start_s, self._last_s = "", self._start_s, 0.0
        self._bar: Progress | None = None
        self._task: Any = None

    def __call__(self, stage: str, done: float, total: float, message: str = "") -> None:
        """Show how far `stage` is."""
        now_s = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_start_s, self._last_s = stage, now_s, 0.0
            if self._bar:
                self._task = self._bar.add_task(stage, total=total or None)
        if self._bar:
            text = f"{stage}: {message}" if message else stage
            self._bar.update(self._task, completed=done, total=total or None, description=text)
            return
        if now_s - self._last_s < self._every_s and (not total or done < total):
            return
        self._last_s = now_s
        STDERR.print(self._line(stage, done, total, message, now_s), highlight=False, markup=False)

    def _line(self, stage: str, done: float, total: float, message: str, now_s: float) -> str:
        elapsed_s = now_s - self._stage_start_s
        left = ""
        if total and 0 < done < total:
            left = f", about {elapsed_s / done * (total - done):.0f} s left"
        amount = f" {done:g}/{total:g}" if total else ""
        tail = f"  {message}" if message else ""
        return f"[{now_s - self._start_s:6.1f}s] {stage}{amount} ({elapsed_s:.0f} s{left}){tail}"


@contextmanager
def progress() -> Any:
    """A progress printer for the length of a command."""
    printer = ProgressPrinter()
    if not STDERR.is_terminal:
        yield printer
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:g}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=STDERR, transient=False) as bar:
        printer._bar = bar
        yield printer
