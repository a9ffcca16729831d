"""`regreen quotas list`: what tenants have of what their quotas bound.

- Asked are the sandbox, dataset and policy services, those that are run; of several replicas of the
  policy, and of several fronts of a fleet, the one that answers.
- What a token does not cover is said on standard error and left out; the exit code is 1 then.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, open_stack
from regreen.common.v1 import QuotaUse
from regreen.rpc.errors import PermissionDenied

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at what tenants have of what their quotas bound."""


@app.command("list")
def list_quotas(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.", show_default=False)] = "",
    home: Home = None,
    json_output: Json = False,
) -> None:
    """List what each tenant has and may have; a tenant's token shows that tenant's alone."""
    found, left_out = output.run(_list(home))
    rows = [_row(use) for use in found if tenant in ("", use.tenant)]
    if json_output:
        output.print_json_lines(rows)
    elif rows:
        names = ["tenant", "quota", "has", "bound", "share"]
        output.print_table("", names, [_cells(**row) for row in rows])
    else:
        typer.echo("No tenant has anything, and none is named in a file of quotas.")
    for problem in left_out:
        typer.echo(problem, err=True)
    if left_out:
        raise typer.Exit(1)


def _row(use: QuotaUse) -> dict[str, Any]:
    bound = use.bound if use.HasField("bound") else None
    return {"tenant": use.tenant, "quota": use.quota, "used": use.used, "bound": bound}


def _cells(tenant: str, quota: str, used: int, bound: int | None) -> list[object]:
    share = f"{100 * used / bound:.0f} %" if bound else ""
    return [tenant, quota, used, "none" if bound is None else bound, share]


async def _list(home: Path | None) -> tuple[list[QuotaUse], list[str]]:
    """What was found, and which services did not say and why."""
    found: list[QuotaUse] = []
    left_out: list[str] = []
    async with open_stack(home) as stack:
        asked = {
            "sandbox": stack.sandbox.list_quotas,
            "dataset": stack.archive.list_quotas,
            "policy": stack.policy.list_quotas,
        }
        for name, ask in asked.items():
            if not stack.endpoints.addresses[name]:
                continue
            try:
                found += await ask()
            except PermissionDenied as error:
                left_out.append(f"{name}: {error.message}")
    return sorted(found, key=lambda use: use.tenant), left_out
