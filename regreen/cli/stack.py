"""`regreen up|down|status|logs`: the local integrated stack."""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json
from regreen.home import default_home
from regreen.rpc.errors import InvalidArgument, RegreenError
from regreen.stack import control
from regreen.stack.layout import ELSEWHERE, SERVICES, Layout


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(logs)


def up(
    home: Home = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Policy engine: auto (default), openvino, torch, scripted, sglang, openai."
        ),
    ] = None,
    ports: Annotated[
        str | None, typer.Option(help="fixed (default: 5005x where free) or any (free ports).")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Start this service and no other; repeat it.", show_default=False),
    ] = None,
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Certificates for the services and their clients; made and renewed by themselves.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        bool | None,
        typer.Option(
            "--tokens/--no-tokens",
            help="Ask every caller for a token; the commands of this home have one.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Start the five services on this machine, or some, and wait until they serve."""
    layout = Layout(home or default_home())
    if ports not in (None, "fixed", "any"):
        output.fail(InvalidArgument("ports", f"{ports!r} is unknown", "give fixed or any"))
    arguments = {}
    if engine is not None:
        arguments["policy"] = [] if engine == "auto" else ["--engine", engine]
    fixed_ports = None if ports is None else ports == "fixed"
    with output.progress() as show:
        rows = output.run(
            control.up(
                layout,
                arguments=arguments,
                fixed_ports=fixed_ports,
                only=only or (),
                tls=tls,
                tokens=tokens,
                progress=show,
            )
        )
    layout.borrowed.unlink(missing_ok=True)  # asked for by name: it stays up
    _print(rows, json_output)
    if json_output:
        return
    if by := (control.describe(layout) or {}).get(ELSEWHERE):
        output.STDERR.print(f"these are run by {by}", highlight=False)
    else:
        usual = {item.name: f"127.0.0.1:{item.port}" for item in SERVICES}
        if fixed_ports is not False and any(row.address != usual[row.name] for row in rows):
            told = "other programs have some of the usual ports: give these addresses to clients"
            output.STDERR.print(told, highlight=False)
        stop = f"regreen down --home {shlex.quote(str(layout.home))}"
        output.STDERR.print(f"stop it, and keep its data, with `{stop}`", highlight=False)


def down(home: Home = None, json_output: Json = False) -> None:
    """Stop the services; nothing that was committed is lost."""
    layout = Layout(home or default_home())
    ran = output.run(control.down(layout))
    if json_output:
        output.print_json({"stopped": bool(ran)})
        return
    output.STDERR.print("stack is down" if ran else "no stack was running")


def status(home: Home = None, json_output: Json = False) -> None:
    """Show each service; exits with 3 unless all serve."""
    rows = output.run(control.status(Layout(home or default_home())))
    _print(rows, json_output)
    if any(row.state != "serving" for row in rows):
        raise typer.Exit(output.UNAVAILABLE)


def logs(
    service: Annotated[str, typer.Argument(help="Service, or supervisor; empty for all.")] = "",
    home: Home = None,
    lines: Annotated[
        int, typer.Option("-n", "--lines", min=1, max=1_000_000, help="Lines of each log.")
    ] = 20,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing.")] = False,
    json_output: Json = False,
) -> None:
    """Print the ends of the services' logs."""
    layout = Layout(home or default_home())
    known = [*(item.name for item in SERVICES), "supervisor"]
    if service and service not in known:
        output.fail(
            InvalidArgument("service", f"{service!r} is unknown", f"give one of {', '.join(known)}")
        )
    names = [service] if service else known
    show = _echo_json if json_output else _echo
    try:
        for name in names:
            for line in control.tail(layout, name, lines).splitlines():
                show(name, line)
    except RegreenError as error:
        output.fail(error)
    if follow:
        _follow(layout, names, show)


def _echo(service: str, line: str) -> None:
    typer.echo(f"{service:10} {line}")


def _echo_json(service: str, line: str) -> None:
    output.print_json_lines([{"service": service, "line": line}])


def _follow(layout: Layout, names: list[str], show: Callable[[str, str], None]) -> None:
    positions = {name: _size(layout, name) for name in names}
    try:
        while True:
            for name in names:
                size = _size(layout, name)
                if size < positions[name]:  # a new log began
                    positions[name] = 0
                if size > positions[name]:
                    with layout.log(name).open("rb") as log:
                        log.seek(positions[name])
                        for line in (
                            log.read(size - positions[name]).decode(errors="replace").splitlines()
                        ):
                            show(name, line)
                positions[name] = size
            time.sleep(0.5)
    except KeyboardInterrupt:
        raise typer.Exit from None


def _size(layout: Layout, name: str) -> int:
    path = layout.log(name)
    return path.stat().st_size if path.exists() else 0


def _print(rows: list[control.ServiceStatus], json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    output.print_table(
        "",
        ["service", "state", "gRPC", "metrics", "HTTP"],
        [
            [row.name, row.state, row.address, row.metrics and f"{row.metrics}/metrics", row.http]
            for row in rows
        ],
    )
