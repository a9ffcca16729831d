"""What a hostile state archive may make the service hold, and what a damaged one says."""

import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterator

import pytest

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.state_records import State
from tests.integration.sandbox.overlay import prepared

_MIB = 1 << 20


def _header(kind: bytes, size: int) -> Iterator[bytes]:
    member = tarfile.TarInfo("header")
    member.type, member.size = kind, size
    yield member.tobuf(tarfile.USTAR_FORMAT)
    start = b"%d comment=" % size if kind in (b"x", b"g") else b""
    yield start.ljust(_MIB, b"a")
    for _ in range(size // _MIB - 1):
        yield b"a" * _MIB
    yield bytes(1024)


async def _peak_of(work) -> int:
    """Bytes that were held at a time during a call, by Python's account."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        await work
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
async def test_a_large_header_is_refused_unread(service, kind):
    states, _, _ = service

    async def send() -> None:
        with pytest.raises(InvalidArgument, match="header that is too large"):
            await states.import_state(_header(kind, 96 * _MIB))

    assert await _peak_of(send()) < 24 * _MIB


async def _archive(states, **files: str) -> bytes:
    state = await prepared(states, **files)
    return b"".join([chunk async for chunk in states.export_state(state.id)])


def _members(archive: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as source:
        return [
            (member, source.extractfile(member).read() if member.isreg() else b"")
            for member in source
        ]


def _packed(members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as target:
        for member, content in members:
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.DIRTYPE])
async def test_entries_that_were_unpacked_are_not_held(service, kind):
    states, _, _ = service
    archive = await _archive(states, a="1")
    (record, text), *_ = _members(archive)

    def entries() -> Iterator[bytes]:
        yield record.tobuf() + text + bytes(-len(text) % 512)
        top = tarfile.TarInfo("layers/0")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        yield top.tobuf()
        for start in range(0, 10_000, 500):
            members = []
            for number in range(start, start + 500):
                member = tarfile.TarInfo(f"layers/0/l{number}")
                member.type, member.mode = kind, 0o755
                member.linkname = "x" if kind == tarfile.SYMTYPE else ""
                members.append(member.tobuf(tarfile.USTAR_FORMAT))
            yield b"".join(members)
        yield tarfile.TarInfo("nonsense").tobuf() + bytes(1024)

    async def send() -> None:
        with pytest.raises(InvalidArgument, match="out of place: 'nonsense'"):
            await states.import_state(entries())

    assert await _peak_of(send()) < 4 * _MIB  # removing a directory lists it


async def test_a_flipped_bit_anywhere_is_refused(service):
    states, _, _ = service
    archive = await _archive(states, a="1" * 5000, b="2")
    end = archive.index(b"end\0") + 512 + len('{"sha256": ""}') + 64
    taken = []
    for place in range(0, end, 97):
        flipped = bytearray(archive)
        flipped[place] ^= 1 << place % 8
        try:
            await states.import_state([bytes(flipped)])
        except InvalidArgument:
            continue
        taken.append((place, archive[place - 20 : place + 20]))
    assert taken == []
    assert (await states.import_archive([archive])).notes == []


async def test_an_archive_from_before_digests_is_taken_and_says_so(service):
    states, _, _ = service
    *members, (end, content) = _members(await _archive(states, a="1"))
    assert (end.name, len(json.loads(content)["sha256"])) == ("end", 64)
    old = _packed([*members, (end, b"")])
    found = await states.import_archive([old])
    assert [note for note in found.notes if "no digest" in note]
    for wrong in (b"{}", b"nonsense", b'{"sha256": 5}', b"x" * 5000):
        with pytest.raises(InvalidArgument, match="end"):
            await states.import_state([_packed([*members, (end, wrong)])])


@pytest.mark.parametrize(
    "changed",
    [
        {"env": {"A": "b\0c"}},
        {"env": {"A=B": "c"}},
        {"env": {"": "c"}},
        *(
            {"mounts": [["@tools", target, True]]}
            for target in ("/proc", "/", "/a/../../x", "x", "/proc/self", "/sys/x", "/dev", "/a//b")
        ),
    ],
)
async def test_a_record_that_no_sandbox_could_stand_on_is_refused(service, changed):
    states, _, _ = service
    (record, text), *members = _members(await _archive(states, a="1"))
    fields = {**json.loads(text), **changed}
    archive = _packed([(record, json.dumps(fields).encode()), *members[:-1], _old_end()])
    with pytest.raises(InvalidArgument, match="|".join(changed)):
        await states.import_state([archive])
    with pytest.raises(ValueError, match="|".join(changed)):
        State.decode(json.dumps(fields).encode())


def _old_end() -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo("end"), b""
