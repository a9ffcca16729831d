"""`regreen state list|show|tree|delete|import|export`: prepared file systems, and images as such.

- What a state was made from is told over gaps that deleted ones leave.
- A directory or archive of an image becomes a state; an archive made by `export` of any state is
  known by its first entry and read as what it is.
- A state of an image is exported as an image that engines load, any other as a state archive.
- An export replaces no file unasked, and a file that is there is whole (`targets`).
"""

import contextlib
import tarfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.options import Address, Home, Json, open_stack, read_pages
from regreen.cli.sandbox import read_sandboxes
from regreen.cli.targets import Force, check_target, written
from regreen.client.image import directory_chunks, file_chunks
from regreen.client.stack import Stack
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.sandbox import v1 as pb

app = typer.Typer(no_args_is_help=True)
_RECORD = "state.json"
_IMAGE_FILES = ("index.json", "manifest.json")
"""One of which an image has at its top, in either form."""
_MIB = 1 << 20
_MOST = 100_000
Tell = Any
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="At most this many.")]
_COLUMNS = ("id", "made", "base", "size", "parent", "labels")


@dataclass(frozen=True, slots=True)
class Shown:
    """Everything the service knows of one state."""

    state: pb.State
    ancestors: Sequence[tuple[pb.State, bool]]
    """The root first; of those that were deleted the id alone, and True."""
    children: Sequence[pb.State]
    sandboxes: Sequence[pb.Sandbox]

    @property
    def valid_on(self) -> str:
        """Which hosts can run it."""
        host = self.state.host
        return f"hosts like {host}" if self.state.base == "host" else f"every host of {host}"

    def facts(self) -> list[tuple[str, str]]:
        """Its facts for people, name and value."""
        state, whole = self.state, sum(one.size_bytes for one, _ in self.ancestors)
        baseline = state.baseline
        told = f"{len(baseline.passing)} tests pass, {len(baseline.failing)} fail"
        facts = [
            ("id", state.id),
            ("made", _made(state)),
            ("base", state.base),
            ("valid on", self.valid_on),
            ("python", state.python),
            ("spec", state.spec_sha256),
            ("size", f"{_mib(state.size_bytes)} of its own, {_mib(whole)} of its ancestors"),
            ("layers", f"{len(state.layers)}: {' '.join(state.layers)}"),
            ("baseline", told if state.HasField("baseline") else ""),
            *(("note", note) for note in baseline.notes),
            ("labels", _labels(state)),
            ("sandboxes", " ".join(box.id for box in self.sandboxes)),
        ]
        return [(name, value) for name, value in facts if value]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        line = [
            {"id": one.id, "deleted": True} if gone else {**output.as_dict(one), "deleted": False}
            for one, gone in self.ancestors
        ]
        return {
            "state": output.as_dict(self.state),
            "valid_on": self.valid_on,
            "ancestors": line,
            "children": [output.as_dict(child) for child in self.children],
            "sandboxes": [box.id for box in self.sandboxes],
        }


@app.command("list")
def list_states(
    home: Home = None,
    address: Address = "",
    limit: Limit = 1000,
    json_output: Json = False,
) -> None:
    """List states, oldest first."""
    rows = output.run(_list(home, address, limit))
    if json_output:
        output.print_json_lines(rows)
        return
    output.print_table("", _COLUMNS, [_row(row) for row in rows])


@app.command("show")
def show_state(
    id: Annotated[str, typer.Argument(help="State id.")],
    home: Home = None,
    address: Address = "",
    json_output: Json = False,
) -> None:
    """Print what a state is, what it was made from, what was made of it, and what runs on it."""
    found = output.run(_show(home, address, id))
    if json_output:
        output.print_json(found.as_dict())
        return
    for name, value in found.facts():
        typer.echo(f"{name:10} {value}")
    if found.ancestors:
        output.print_table("made from", _COLUMNS, [_row(*one) for one in found.ancestors])
    if found.children:
        output.print_table("children", _COLUMNS, [_row(child) for child in found.children])


@app.command("tree")
def show_tree(
    id: Annotated[str, typer.Argument(help="State at the top; default: every root.")] = "",
    home: Home = None,
    address: Address = "",
    limit: Limit = 1000,
    json_output: Json = False,
) -> None:
    """Print which states were made from which, each below the one that it was made from."""
    rows = output.run(_tree(home, address, id, limit))
    if json_output:
        output.print_json_lines(
            {"depth": depth, **output.as_dict(row), "deleted": gone} for depth, row, gone in rows
        )
        return
    for depth, row, gone in rows:
        told = "deleted" if gone else f"{_made(row)}  {_mib(row.size_bytes)}"
        typer.echo(f"{'  ' * depth}{row.id}  {told}")


@app.command("delete")
def delete_state(
    id: Annotated[str, typer.Argument(help="State id.")],
    home: Home = None,
    address: Address = "",
    json_output: Json = False,
) -> None:
    """Delete a state that no sandbox runs on; states made from it go on."""
    output.run(_delete(home, address, id))
    output.print_deleted(id, json_output)


@app.command("import")
def import_state(
    source: Annotated[
        Path, typer.Argument(help="An image archive, a state archive, or a directory.")
    ],
    home: Home = None,
    address: Address = "",
    reference: Annotated[
        str, typer.Option(help="Which image, where the archive holds several.")
    ] = "",
    json_output: Json = False,
) -> None:
    """Make a state of an image (docker save, OCI layout), of a root directory, or of an export."""
    with output.progress() as tell:
        found = output.run(_import(home, address, source, reference, tell))
    if json_output:
        output.print_json({"state": output.as_dict(found.state), "notes": list(found.notes)})
        return
    for note in found.notes:
        output.STDERR.print(f"note: {note}", highlight=False, markup=False)
    typer.echo(found.state.id)


@app.command("export")
def export_state(
    state: Annotated[str, typer.Argument(help="State id.")],
    file: Annotated[Path, typer.Argument(help="Where the archive goes.")],
    home: Home = None,
    address: Address = "",
    reference: Annotated[
        str, typer.Option(help="Name of the image in the archive, for example work:latest.")
    ] = "",
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Write a state to an archive: an image that engines load where it stands on an image."""
    with output.progress() as tell:
        work = _export(home, address, state, file, reference, tell, force=force)
        kind, size_bytes = output.run(work)
    if json_output:
        output.print_json({"file": str(file), "kind": kind, "size_bytes": size_bytes})
        return
    typer.echo(f"{file}: {kind} archive of {size_bytes / _MIB:.1f} MiB")


def _row(row: pb.State, deleted: bool = False) -> list[str]:
    if deleted:
        return [row.id, "deleted", "", "", "", ""]
    base = row.base if row.base == "host" else row.base.removeprefix("image:sha256:")[:12]
    return [row.id, _made(row), base, _mib(row.size_bytes), row.parent_id, _labels(row)]


def _made(row: pb.State) -> str:
    return row.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f} MiB"


def _labels(row: pb.State) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(row.labels.items()))


async def _read(stack: Stack, limit: int, parent_id: str = "") -> list[pb.State]:
    return await read_pages(
        lambda size, token: stack.state.list_states(
            page_size=size, page_token=token, parent_id=parent_id
        ),
        "states",
        limit,
    )


async def _list(home: Path | None, address: str, limit: int) -> list[pb.State]:
    async with open_stack(home, address=address) as stack:
        return await _read(stack, limit)


async def _show(home: Path | None, address: str, id: str) -> Shown:
    async with open_stack(home, address=address) as stack:
        lineage = await stack.state.lineage(id)
        children = await _read(stack, _MOST, id)
        boxes = await read_sandboxes(stack, _MOST)
    *above, state = lineage.states
    there = {one.id: one for one in above}
    ids = lineage.ancestor_ids or list(there)  # a service from before it named the deleted ones
    ancestors = [(there.get(one) or pb.State(id=one), one not in there) for one in ids]
    return Shown(state, ancestors, children, [box for box in boxes if box.state_id == id])


async def _tree(
    home: Path | None, address: str, id: str, limit: int
) -> list[tuple[int, pb.State, bool]]:
    """States in the order of a tree, each with its depth and whether it was deleted."""
    async with open_stack(home, address=address) as stack:
        rows, gone = await _with_gaps(stack, await _read(stack, limit))
        tops = [row for row in rows if row.id == id]
        if id and not tops:
            tops = [await stack.state.get_state(id)]
    ids = {row.id for row in rows}
    below: dict[str, list[pb.State]] = defaultdict(list)
    for row in rows:
        below[row.parent_id if row.parent_id in ids else ""].append(row)
    found: list[tuple[int, pb.State, bool]] = []
    waiting = [(0, row) for row in reversed(tops or below[""])]
    while waiting:
        depth, row = waiting.pop()
        found.append((depth, row, row.id in gone))
        waiting += [(depth + 1, child) for child in reversed(below[row.id])]
    return found


async def _with_gaps(
    stack: Stack, rows: Sequence[pb.State]
) -> tuple[list[pb.State], frozenset[str]]:
    """States with, before each, what it was made from, and which of these were deleted."""
    known, found, gone = {row.id for row in rows}, list[pb.State](), set[str]()
    for row in rows:
        if row.parent_id and row.parent_id not in known:
            lineage = pb.GetLineageResponse()
            with contextlib.suppress(NotFound):  # deleted just now; its own parent is known
                lineage = await stack.state.lineage(row.id)
            there = {one.id: one for one in lineage.states}
            line = list(lineage.ancestor_ids) or [row.parent_id]
            for above, one in zip(["", *line], line, strict=False):
                if one not in known:
                    known.add(one)
                    found.append(there.get(one) or pb.State(id=one, parent_id=above))
                    gone |= {one} - there.keys()
        found.append(row)
    return found, frozenset(gone)


async def _delete(home: Path | None, address: str, id: str) -> None:
    async with open_stack(home, address=address) as stack:
        await stack.state.get_state(id)  # the service takes one that is absent as deleted
        await stack.state.delete_state(id)


async def _import(
    home: Path | None, address: str, source: Path, reference: str, tell: Tell
) -> pb.ImportImageResponse:
    if not source.exists():
        raise InvalidArgument("source", f"{source} is not there", "give a file or a directory")
    if source.is_block_device() or source.is_char_device():
        raise InvalidArgument("source", f"{source} is a device", "give a file or a directory")
    whole = source.is_dir()
    if reference and whole and not any((source / name).exists() for name in _IMAGE_FILES):
        problem = f"names an image, and {source} holds the files of a root directory"
        raise InvalidArgument("reference", problem, "leave it out")
    size = 0 if whole else source.stat().st_size
    chunks = _told(directory_chunks(source) if whole else file_chunks(source), size, tell)
    try:
        async with open_stack(home, address=address) as stack:
            if not whole and _is_state_archive(source):
                found = await stack.state.import_archive(chunks)
                return pb.ImportImageResponse(state=found.state, notes=found.notes)
            return await stack.images.import_image(chunks, reference=reference)
    except OSError as error:
        raise InvalidArgument(
            "source", f"{error.filename or source} cannot be read: {error.strerror}"
        ) from error


def _is_state_archive(path: Path) -> bool:
    """Whether a file was written by `export` of a state that is no image."""
    try:
        with tarfile.open(path, mode="r:") as archive:
            first = archive.next()
    except (tarfile.TarError, EOFError, ValueError):
        return False
    return first is not None and first.name == _RECORD


def _told(chunks: Iterable[bytes], size: int, tell: Tell) -> Iterator[bytes]:
    """The chunks, with a word on how far it is."""
    sent = 0
    for chunk in chunks:
        yield chunk
        sent += len(chunk)
        done, whole = round(sent / _MIB, 1), round(size / _MIB, 1)
        amount = f"{done} MiB" if sent >= _MIB else f"{sent} bytes"
        tell("send", done, whole, "MiB" if whole else amount)


async def _export(
    home: Path | None,
    address: str,
    state_id: str,
    file: Path,
    reference: str,
    tell: Tell,
    *,
    force: bool,
) -> tuple[str, int]:
    check_target(file, "file", force=force)
    async with open_stack(home, address=address) as stack:
        state = await stack.state.get_state(state_id)
        if state.base == "host":
            if reference:
                raise InvalidArgument(
                    "reference", "names an image, and this state stands on its host", "leave it out"
                )
            return "state", await _written(
                stack.state.export_state(state_id), file, tell, force=force
            )
        pieces = stack.images.export_image(state_id, reference=reference)
        return "image", await _written(pieces, file, tell, force=force)


async def _written(pieces: AsyncIterator[bytes], file: Path, tell: Tell, *, force: bool) -> int:
    """Write pieces to a file; its size."""
    size = 0
    with written(file, "file", force=force) as target:
        async for piece in pieces:
            target.write(piece)
            size += len(piece)
            tell("receive", size // _MIB, 0, f"{size // _MIB} MiB")
    return size
