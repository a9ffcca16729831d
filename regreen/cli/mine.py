"""`regreen tasks mine`: find broken builds among public releases, gate them, write them out.

- A work directory holds everything: stopped or killed, the same command goes on from there.
- Without `--sandbox` the running local stack's sandbox service is used.
"""

from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, sandbox_place
from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.home import default_home
from regreen.mine.culprits import (
    CulpritFacts,
    bugfix_candidates,
    in_turn,
    parse_culprits,
    shipped_culprits,
    upgrade_candidates,
)
from regreen.mine.kinds import MORE_KINDS, more_candidates
from regreen.mine.miner import MAX_BASE_S
from regreen.mine.report import lines_of, report
from regreen.mine.store import Journal, shipped_decisions
from regreen.mine.work import Bounds, Mine, export
from regreen.rpc.errors import InvalidArgument
from regreen.tasks.jsonl import shipped_tasks

_ENDED = ("failed", "rejected")
KINDS = ("dependency-upgrade", "release-bugfix", *MORE_KINDS)


def register(app: typer.Typer) -> None:
    """Add the command to `regreen tasks`."""
    app.command()(mine)


def mine(
    packages: Annotated[
        list[str] | None,
        typer.Argument(help="Only these packages; default: all of the list.", show_default=False),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Work directory; default: `mine` under the home.")
    ] = None,
    home: Home = None,
    sandbox: Annotated[str, typer.Option(help="Address of a sandbox service.")] = "",
    kind: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(KINDS)}; default: all.")
    ] = None,
    culprits: Annotated[
        Path | None, typer.Option(help="JSON Lines of culprits; default: the list that ships.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Candidates at most; 0: all.")] = 0,
    hours: Annotated[float, typer.Option(min=0, help="Hours at most; 0: no bound.")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Candidates at a time.")] = 1,
    requests: Annotated[
        int, typer.Option(min=1, help="Pages and files to ask the package index for, at most.")
    ] = 5000,
    repeats: Annotated[int, typer.Option(min=2, max=10, help="Runs of each gate check.")] = 2,
    pause_file: Annotated[
        Path | None, typer.Option(help="While it exists, no candidate is begun.")
    ] = None,
    suite_seconds: Annotated[
        float, typer.Option(min=1, max=600, help="Longer test suites are not mined.")
    ] = MAX_BASE_S,
    debian: Annotated[
        bool, typer.Option("--debian", help="Take sources from Debian where it has a release.")
    ] = False,
    again: Annotated[
        list[str] | None,
        typer.Option(help="Take candidates again that ended so: failed, or rejected=REASON."),
    ] = None,
    anew: Annotated[
        bool,
        typer.Option(
            "--anew", help="Take also what was decided while the set that ships was mined."
        ),
    ] = False,
    only_report: Annotated[
        bool, typer.Option("--report", help="Mine nothing; say what there is.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the admitted records into this directory.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Mine broken builds; what was done is kept, and the next call goes on."""
    wanted = tuple(kind or KINDS)
    if unknown := set(wanted) - set(KINDS):
        known = ", ".join(KINDS)
        output.fail(InvalidArgument("kind", f"{min(unknown)!r} is unknown", f"give one of {known}"))
    folder = work or (home or default_home()) / "mine"
    journal = Journal(folder / "journal.db")
    try:
        for word in again or []:
            status, _, reason = word.partition("=")
            if status not in _ENDED:
                known = " or ".join(_ENDED)
                raise InvalidArgument("again", f"{status!r} is unknown", f"give {known}")
            journal.forget([status], reason)
        if not only_report:
            facts = _culprits(culprits) if culprits else shipped_culprits()
            candidates = in_turn(
                upgrade_candidates(facts, packages=packages or ()),
                bugfix_candidates(facts, packages=packages or ()),
                *more_candidates(facts, packages=packages or ()),
            )
            journal.enqueue(candidates)
            if not (packages or anew):
                journal.adopt(shipped_decisions())
            bounds = Bounds(limit, hours, workers, requests, repeats, pause_file, suite_seconds)
            keys = [candidate.key for candidate in candidates] if packages else []
            place = output.run(sandbox_place(home, sandbox))
            names = {f.name for f in facts} | {n for f in facts for n in f.dependents}
            breaks = {f.name: [event.version for event in f.breaks] for f in facts}
            ended = output.run(
                _mine(journal, folder, bounds, wanted, keys, place, names, breaks, debian)
            )
            output.STDERR.print(f"ended: {ended}", highlight=False, markup=False)
        found = report(journal)
        written = export(journal, out) if out else None
    finally:
        journal.close()
    if json_output:
        output.print_json(found.as_dict())
        return
    output.print_table("", ["what", "found"], [list(row) for row in lines_of(found)])
    if written:
        output.STDERR.print(f"{written[0]} tasks and {written[1]} releases written to {out}")


def _culprits(path: Path) -> list[CulpritFacts]:
    """Those of a file.

    Raises:
        InvalidArgument: it holds none.
    """
    try:
        return parse_culprits(path.read_text("utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{path} is no list of culprits ({type(error).__name__}: {error})"
        raise InvalidArgument("culprits", problem, "give JSON Lines") from error


async def _mine(
    journal: Journal,
    folder: Path,
    bounds: Bounds,
    kinds: tuple[str, ...],
    keys: list[str],
    place: tuple[str, Access | None],
    names: set[str],
    breaks: dict[str, list[str]],
    debian: bool,
) -> str:
    channel = connect(*place)
    done: set[str] = set()
    try:
        with output.progress() as show:

            def say(key: str, text: str) -> None:
                if text.partition(":")[0] in ("mined", "rejected", "failed", "waiting"):
                    done.add(key)
                    output.STDERR.print(f"{key} {text}", highlight=False, markup=False)
                show("mine", len(done), bounds.limit, f"{key}: {text[:120]}")

            run = Mine(
                StateClient(channel, patience_s=120.0),
                SandboxClient(channel, patience_s=120.0),
                journal,
                folder,
                bounds,
                names=names,
                breaks=breaks,
                shipped=shipped_tasks(),
                debian=debian,
                say=say,
            )
            return await run.run(kinds, keys)
    finally:
        await channel.close()
