"""`regreen tokens create|list|revoke`: who may call which services.

- A new token goes to a file that its owner alone may read, never to the terminal.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json
from regreen.home import default_home
from regreen.rpc.errors import InvalidArgument, RegreenError
from regreen.rpc.tokens import Token
from regreen.stack.layout import Layout
from regreen.tokens import DEFAULT_TENANT, TokenFile, write_private

app = typer.Typer(no_args_is_help=True)
File = Annotated[
    Path | None,
    typer.Option("--file", help="File of hashes; default HOME/tokens.json.", show_default=False),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    out: Annotated[
        Path, typer.Option(help="File that the token is written to; must not be there.")
    ],
    scope: Annotated[
        list[str], typer.Option(help="SERVICE:LEVEL, level read, write or admin; repeatable.")
    ],
    tenant: Annotated[
        str, typer.Option(help="Whose it is; * is the platform's own, which sees every tenant's.")
    ] = DEFAULT_TENANT,
    days: Annotated[float, typer.Option(min=1 / 24, max=3650, help="Days that it holds.")] = 90.0,
    home: Home = None,
    file: File = None,
    json_output: Json = False,
) -> None:
    """Make a token."""
    if out.exists():
        output.fail(InvalidArgument("out", f"{out} is there already", "name another"))
    tokens, now = _tokens(home, file), datetime.now(UTC)
    try:
        token, text = tokens.create(name, scope, tenant, timedelta(days=days), now)
        try:
            write_private(out, text + "\n")
        except OSError:
            tokens.revoke(token.id, now)  # nobody has it
            raise
    except RegreenError as error:
        output.fail(error)
    except OSError as error:
        raise typer.Exit(output.tell_os(error)) from None
    _print([token], json_output)


@app.command("list")
def list_tokens(home: Home = None, file: File = None, json_output: Json = False) -> None:
    """List tokens, oldest first."""
    try:
        found = _tokens(home, file).list()
    except RegreenError as error:
        output.fail(error)
    _print(found, json_output)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="Id of the token.")],
    home: Home = None,
    file: File = None,
    json_output: Json = False,
) -> None:
    """Let a token hold no more: its next call is refused."""
    try:
        token = _tokens(home, file).revoke(id, datetime.now(UTC))
    except RegreenError as error:
        output.fail(error)
    _print([token], json_output)


def _tokens(home: Path | None, file: Path | None) -> TokenFile:
    return TokenFile(file or Layout(home or default_home()).tokens)


def _print(tokens: list[Token], json_output: bool) -> None:
    rows = [_row(token) for token in tokens]
    if json_output:
        output.print_json_lines(rows)
        return
    names = ["id", "name", "tenant", "scopes", "state", "expires"]
    output.print_table(
        "",
        names,
        [
            [row["id"], row["name"], row["tenant"], " ".join(row["scopes"]), row["state"],
             row["expires"][:16]]
            for row in rows
        ],
    )  # fmt: skip


def _row(token: Token) -> dict[str, Any]:
    holds = token.holds(datetime.now(UTC))
    return {
        "id": token.id,
        "name": token.name,
        "tenant": token.tenant,
        "scopes": list(token.scopes),
        "state": "holds" if holds else "revoked" if token.revoked else "ended",
        "created": token.created,
        "expires": token.expires,
        "revoked": token.revoked,
    }
