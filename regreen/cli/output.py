"""What commands print, and the codes they exit with.

- Results go to standard output, progress and errors to standard error.
- With `--json` a read prints one JSON object, or one per line, and nothing else.
- Exit codes are those of `regreen.client.script`: one rule for commands and short programs.
- Colours follow `NO_COLOR` and the terminal.
"""

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from regreen.client import script
from regreen.rpc.errors import NotFound, RegreenError, Unavailable
from regreen.rpc.wire import NOBODY
from regreen.train.progress import Pace

T = TypeVar("T")
FAILED, USAGE, UNAVAILABLE = script.FAILED, script.USAGE, script.UNAVAILABLE
STDOUT = Console(emoji=False, soft_wrap=False, width=None if sys.stdout.isatty() else 160)
_START = (
    "; `regreen up` starts the services, REGREEN_HOME or --home names the directory they keep, "
    "`regreen status` their addresses"
)
"""What to do about a service that does not answer."""
_LISTS = {
    "no task ": "tasks list",
    "no trajectory ": "traj list",
}
"""How messages of an id that nothing has begin, and the command that lists what there is."""
_QUIET_S = 10.0
"""Without a terminal, the longest time between two lines of a command at work."""
STDERR = Console(emoji=False, stderr=True, width=None if sys.stderr.isatty() else 240)


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
        raise typer.Exit(script.INTERRUPTED) from None


def tell(error: RegreenError) -> int:
    """Print an error; the code to exit with."""
    STDERR.print(
        f"error: {error.message}{_remedy(error)}", style="red", highlight=False, markup=False
    )
    return script.exit_code(error)


def _remedy(error: RegreenError) -> str:
    """What to do, where the one who raised the error could not know."""
    if isinstance(error, Unavailable) and error.message.startswith(NOBODY):
        return _START
    if isinstance(error, NotFound) and ";" not in error.message:
        for beginning, command in _LISTS.items():
            if error.message.startswith(beginning):
                return f"; `regreen {command}` shows those that there are"
    return ""


def tell_os(error: OSError) -> int:
    """Print what the system says of a file or a connection; the code to exit with."""
    where = f"{error.filename}: " if error.filename else ""
    text = f"error: {where}{error.strerror or error}"
    STDERR.print(text, style="red", highlight=False, markup=False)
    return USAGE if error.filename else FAILED


def fail(error: RegreenError) -> NoReturn:
    """Print an error and exit with its code."""
    raise typer.Exit(tell(error)) from None


def as_dict(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON-able values with the names of the contract."""
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def print_deleted(id: str, json_output: bool) -> None:
    """That something is no more."""
    if json_output:
        print_json({"deleted": id})
    else:
        typer.echo(f"deleted {id}")


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
        table.add_row(*(Text(str(cell)) for cell in row))
    STDOUT.print(table)


@dataclass(slots=True)
class _Stage:
    """One stage as it is shown; stages may alternate and each keeps its own clock."""

    began_s: float
    pace: Pace
    done: float
    task: Any = None
    """Its bar, on a terminal."""


class ProgressPrinter:
    """Shows `(stage, done, total, message)` on standard error: a bar on a terminal, lines else."""

    def __init__(self, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._start_s = clock()
        self._latest, self._last_s = "", self._start_s
        self._stages: dict[str, _Stage] = {}
        self._bar: Progress | None = None
        self._lock = threading.Lock()
        self._told: tuple[float, tuple[str, float, float, str, float | None, bool]] | None = None
        """When this was called last, and with what."""

    def __call__(
        self,
        stage: str,
        done: float,
        total: float,
        message: str = "",
        *,
        left_s: float | None = None,
        due: bool = False,
        paced: bool = True,
    ) -> None:
        """Show how far `stage` is; `left_s` is a better estimate than the mean rate, if known.

        What is `due` is shown however short a time ago the last line was. Of a stage that is not
        `paced` the mean rate tells nothing, and none is shown.
        """
        with self._lock:
            self._told = self._clock(), (stage, done, total, message, left_s, paced)
            self._show(stage, done, total, message, left_s, paced, due)

    def tick(self) -> None:
        """Repeat the latest line, with what has become of its times, if all was quiet for long."""
        with self._lock:
            now_s = self._clock()
            if self._bar or self._told is None or now_s - self._last_s < _QUIET_S:
                return
            told_s, (stage, done, total, message, left_s, paced) = self._told
            if total and done >= total:
                message = f"done {now_s - told_s:.0f} s ago; going on"
            elif left_s is not None:
                left_s = max(0.0, left_s - (now_s - told_s))
            self._latest = ""  # a line is due
            self._show(stage, done, total, message, left_s, paced)

    def _show(
        self,
        stage: str,
        done: float,
        total: float,
        message: str,
        left_s: float | None,
        paced: bool,
        due: bool = False,
    ) -> None:
        now_s = self._clock()
        before = at = self._stages.get(stage)
        if at is None or done < at.done:  # a new stage, or the next round of one
            if self._bar and at:
                self._bar.remove_task(at.task)
            at = self._stages[stage] = _Stage(now_s, Pace(done, now_s), done)
        at.done = done
        if left_s is None and paced:
            left_s = at.pace.left_s(done, total, now_s)
        left = _left(left_s) if done < total else ""
        amount = f" {done:g}/{total:g}" if total else ""
        if self._bar:
            if at.task is None:
                at.task = self._bar.add_task(stage, total=total or None, amount=amount)
            text = f"{stage}: {message}" if message else stage
            self._bar.update(
                at.task,
                completed=done,
                total=total or None,
                description=text + left,
                amount=amount.strip(),
            )
            return
        fresh = due or at is not before or stage != self._latest or (total and done >= total)
        if not fresh and now_s - self._last_s < self._every_s:
            return
        self._latest, self._last_s = stage, now_s
        tail = f"  {message}" if message else ""
        spent = f"({now_s - at.began_s:.0f} s{left})"
        line = f"[{now_s - self._start_s:6.1f}s] {stage}{amount} {spent}{tail}"
        STDERR.print(line, highlight=False, markup=False)


def _left(seconds: float | None) -> str:
    """Nothing is said of an estimate that has run out."""
    return "" if seconds is None or seconds < 0.5 else f", about {seconds:.0f} s left"


@contextmanager
def progress() -> Any:
    """A progress printer for the length of a command."""
    printer = ProgressPrinter()
    if not STDERR.is_terminal:
        ended = threading.Event()

        def keep_on() -> None:
            while not ended.wait(1.0):
                printer.tick()

        ticker = threading.Thread(target=keep_on, name="progress", daemon=True)
        ticker.start()
        try:
            yield printer
        finally:
            ended.set()
            ticker.join()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=STDERR, transient=False) as bar:
        printer._bar = bar
        yield printer
