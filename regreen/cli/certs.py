"""`regreen certs init|issue|renew|retire|show`: an authority of one's own for mutual TLS.

- Nothing that runs is restarted: services and clients take new files up by themselves.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.certs import authority as x
from regreen.certs.folder import LOCAL, CertFolder, Entry
from regreen.cli import output
from regreen.cli.options import Home, Json
from regreen.home import default_home
from regreen.rpc.errors import InvalidArgument, RegreenError
from regreen.stack.layout import Layout

app = typer.Typer(no_args_is_help=True)
Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of certificates; default HOME/certs.", show_default=False),
]
Days = Annotated[float, typer.Option(min=1 / 24, max=3650, help="Days that it lives.")]
_LEAF_DAYS, _AUTHORITY_DAYS = 30.0, 730.0


@app.command()
def init(
    home: Home = None,
    folder: Folder = None,
    days: Days = _AUTHORITY_DAYS,
    json_output: Json = False,
) -> None:
    """Make an authority."""
    found = _folder(home, folder)
    _try(lambda: found.init(timedelta(days=days), _now()))
    _print(found, json_output)


@app.command()
def issue(
    name: Annotated[str, typer.Argument(help="Name of a service or a client.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address that the service is called by, beside NAME and this machine's; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    client: Annotated[
        bool, typer.Option("--client", help="A client's, which can serve nothing.")
    ] = False,
    home: Home = None,
    folder: Folder = None,
    days: Days = _LEAF_DAYS,
    json_output: Json = False,
) -> None:
    """Make a certificate and its key, in the place of former ones of that name."""
    if client and host:
        output.fail(InvalidArgument("host", "a client serves none", "leave out --host or --client"))
    found = _folder(home, folder)
    hosts = [] if client else list(dict.fromkeys([name, *LOCAL, *(host or [])]))
    _try(lambda: found.issue(name, hosts, timedelta(days=days), _now()))
    _print(found, json_output, only=[name])


@app.command()
def renew(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which; default those that are due.")
    ] = None,
    ca: Annotated[
        bool,
        typer.Option("--ca", help="A new authority instead, trusted beside the present one."),
    ] = False,
    home: Home = None,
    folder: Folder = None,
    days: Annotated[
        float | None,
        typer.Option(min=1 / 24, max=3650, help="Days that it lives; default 30, 730 with --ca."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Renew certificates with their keys, or the authority."""
    if ca and names:
        output.fail(InvalidArgument("ca", "renews the authority alone", "leave out the names"))
    found = _folder(home, folder)
    life = timedelta(days=days or (_AUTHORITY_DAYS if ca else _LEAF_DAYS))
    if ca:
        _try(lambda: found.renew_authority(life, _now()))
        _print(found, json_output)
        return
    renewed = _try(lambda: found.renew(names or [], life, _now()))
    if not renewed and not json_output:
        first = min(found.entries(), key=lambda entry: entry.end, default=None)
        told = "there are no certificates yet: `regreen certs issue NAME` makes one"
        if first:
            left = (first.end - _now()).total_seconds() / 86_400
            told = f"nothing is due; {first.name} ends first, in {left:.1f} days"
        sys.stdout.write(f"{told}\n")
        return
    _print(found, json_output, only=[entry.name for entry in renewed])


@app.command()
def retire(home: Home = None, folder: Folder = None, json_output: Json = False) -> None:
    """Trust the former authority no more, once nothing is of it."""
    found = _folder(home, folder)
    _try(found.retire)
    _print(found, json_output)


@app.command()
def show(home: Home = None, folder: Folder = None, json_output: Json = False) -> None:
    """Show authorities and certificates; exits with 1 if one has ended."""
    rows = _print(_folder(home, folder), json_output)
    if any(row["state"] == "ended" for row in rows):
        raise typer.Exit(output.FAILED)


def _folder(home: Path | None, folder: Path | None) -> CertFolder:
    return CertFolder(folder or Layout(home or default_home()).certs)


def _now() -> datetime:
    return datetime.now(UTC)


def _try(work: Any) -> Any:
    try:
        return work()
    except RegreenError as error:
        output.fail(error)
    except OSError as error:
        raise typer.Exit(output.tell_os(error)) from None


def _print(
    folder: CertFolder, json_output: bool, only: list[str] | None = None
) -> list[dict[str, Any]]:
    """Print certificates; the rows."""
    now = _now()
    rows = _try(lambda: _rows(folder, now))
    shown = [row for row in rows if only is None or row["name"] in only]
    if json_output:
        output.print_json_lines(shown)
        return shown
    output.print_table(
        "",
        ["name", "kind", "state", "ends", "days left", "hosts", "fingerprint"],
        [
            [
                row["name"],
                row["kind"],
                row["state"],
                row["ends"][:16],
                f"{row['days_left']:.1f}",
                " ".join(row["hosts"]),
                row["fingerprint"],
            ]
            for row in shown
        ],
    )
    return shown


def _rows(folder: CertFolder, now: datetime) -> list[dict[str, Any]]:
    rows = []
    for number, cert in enumerate(folder.authorities()):
        kind = "former authority" if number else "authority"
        rows.append(_row("authority", kind, Entry("authority", cert, True), now))
    for entry in folder.entries():
        rows.append(_row(entry.name, "service" if entry.hosts else "client", entry, now))
    return rows


def _row(name: str, kind: str, entry: Entry, now: datetime) -> dict[str, Any]:
    state = "ended" if entry.end <= now else "due" if entry.due(now) else "holds"
    return {
        "name": name,
        "kind": kind,
        "state": state,
        "ends": entry.end.isoformat(),
        "days_left": round((entry.end - now).total_seconds() / 86_400, 2),
        "hosts": entry.hosts,
        "fingerprint": x.fingerprint(entry.cert),
    }
