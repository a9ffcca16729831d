"""`regreen state list|import|export`: prepared file systems, and images as such.

- A directory or archive of an image becomes a state; an archive made by `export` of any state is
  known by its first entry and read as what it is.
- A state of an image is exported as an image that engines load, any other as a state archive.
- An export is written beside its place and renamed at the end: a file that is there is whole.
"""

import os
import tarfile
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, open_stack
from regreen.client.image import directory_chunks, file_chunks
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb

app = typer.Typer(no_args_is_help=True)
_RECORD = "state.json"
_MIB = 1 << 20
Tell = Any


@app.command("list")
def list_states(
    home: Home = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most this many.")] = 1000,
    json_output: Json = False,
) -> None:
    """List states, oldest first."""
    rows = output.run(_list(home, limit))
    if json_output:
        output.print_json_lines(rows)
        return
    output.print_table(
        "",
        ["id", "made", "base", "size", "parent", "labels"],
        [
            [
                row.id,
                row.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M"),
                _short(row.base),
                f"{row.size_bytes / _MIB:.1f} MiB",
                row.parent_id,
                " ".join(f"{name}={value}" for name, value in sorted(row.labels.items())),
            ]
            for row in rows
        ],
    )


@app.command("import")
def import_state(
    source: Annotated[
        Path, typer.Argument(help="An image archive, a state archive, or a directory.")
    ],
    home: Home = None,
    reference: Annotated[
        str, typer.Option(help="Which image, where the archive holds several.")
    ] = "",
    json_output: Json = False,
) -> None:
    """Make a state of an image (docker save, OCI layout), of a root directory, or of an export."""
    with output.progress() as tell:
        found = output.run(_import(home, source, reference, tell))
    if json_output:
        output.print_json(found)
        return
    for note in found.notes:
        output.STDERR.print(f"note: {note}", highlight=False, markup=False)
    typer.echo(found.state.id)


@app.command("export")
def export_state(
    state: Annotated[str, typer.Argument(help="State id.")],
    file: Annotated[Path, typer.Argument(help="Where the archive goes.")],
    home: Home = None,
    reference: Annotated[
        str, typer.Option(help="Name of the image in the archive, for example work:latest.")
    ] = "",
    json_output: Json = False,
) -> None:
    """Write a state to an archive: an image that engines load where it stands on an image."""
    with output.progress() as tell:
        kind, size_bytes = output.run(_export(home, state, file, reference, tell))
    if json_output:
        output.print_json({"file": str(file), "kind": kind, "size_bytes": size_bytes})
        return
    typer.echo(f"{file}: {kind} archive of {size_bytes / _MIB:.1f} MiB")


def _short(base: str) -> str:
    return base if base == "host" else base.removeprefix("image:sha256:")[:12]


async def _list(home: Path | None, limit: int) -> list[pb.State]:
    rows: list[pb.State] = []
    async with open_stack(home) as stack:
        token = ""
        while len(rows) < limit:
            page = await stack.state.list_states(
                page_size=min(limit - len(rows), 1000), page_token=token
            )
            rows += page.states
            token = page.next_page_token
            if not token:
                break
    return rows


async def _import(
    home: Path | None, source: Path, reference: str, tell: Tell
) -> pb.ImportImageResponse:
    if not source.exists():
        raise InvalidArgument("source", f"{source} is not there", "give a file or a directory")
    whole = source.is_dir()
    size = 0 if whole else source.stat().st_size
    chunks = _told(directory_chunks(source) if whole else file_chunks(source), size, tell)
    try:
        async with open_stack(home) as stack:
            if not whole and _is_state_archive(source):
                return pb.ImportImageResponse(state=await stack.state.import_state(chunks))
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
        tell("send", sent // _MIB, size // _MIB, "MiB")


async def _export(
    home: Path | None, state_id: str, file: Path, reference: str, tell: Tell
) -> tuple[str, int]:
    async with open_stack(home) as stack:
        state = await stack.state.get_state(state_id)
        if state.base == "host":
            if reference:
                raise InvalidArgument(
                    "reference", "names an image, and this state stands on its host", "leave it out"
                )
            return "state", await _written(stack.state.export_state(state_id), file, tell)
        pieces = stack.images.export_image(state_id, reference=reference)
        return "image", await _written(pieces, file, tell)


async def _written(pieces: AsyncIterator[bytes], file: Path, tell: Tell) -> int:
    """Write pieces to a file; its size."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    size = 0
    try:
        with draft.open("xb") as target:
            async for piece in pieces:
                target.write(piece)
                size += len(piece)
                tell("receive", size // _MIB, 0, "MiB")
        draft.rename(file)
    except OSError as error:
        raise InvalidArgument("file", f"{file} cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
    return size
