"""Tenants are walls: every method of the contracts, tried on what is another's."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition, NotFound, ResourceExhausted
from regreen.rpc.tenants import HEADER
from regreen.sandbox import v1 as pb
from sandbox_svc.fleet.calls import METHODS
from tests.integration.sandbox import attacking
from tests.integration.sandbox.attacking import People, attack, service, settle, uses
from tests.integration.sandbox.overlay import OverlayBuilder, prepared

QUOTAS = "[default]\n[tenants.a]\n{}\n"


@pytest.fixture
async def world(tmp_path):
    """Everybody before one service, whose quotas are in a file."""
    people, quotas = People(tmp_path), tmp_path / "quotas.toml"
    quotas.write_text(QUOTAS.format(""))
    options = {"tokens": people.tokens, "quotas": quotas, "action_rerun_share": 0.0}
    async with (
        service(tmp_path / "home", f"unix:{tmp_path}/s", **options) as address,
        people.before(address) as found,
    ):
        yield found, quotas


def test_every_method_has_a_guard():
    kinds = [attacking.ABSENT, attacking.SILENT, attacking.LISTS, attacking.MAKES, attacking.OPEN]
    named = [name for kind in kinds for name in kind]
    assert sorted(named) == sorted(METHODS), "a new method needs an attack"


def test_what_serves_calls_looks_up_what_the_caller_sees():
    for path in Path("sandbox_svc").glob("servicer*.py"):
        assert not re.search(r"\.(peek|known|every|find|usable|_\w+s)\(", path.read_text()), path


async def test_what_another_tenant_has_is_as_if_it_were_not_there(world):
    people, _ = world
    a, b = people["a"], people["b"]
    await settle(a, await prepared(a.states, secret="s\n"))
    await settle(b, await prepared(b.states, other="o\n"))
    await attack(b, a)
    read = await a.sandboxes.read_file(a.named["BOX"], "/work/repo/secret")
    assert read.content == b"s\n", "nothing was written, restored or deleted"
    listed = await a.call("ExecService/ListExecs", {"sandbox_id": "MY_BOX"})
    assert [(e.id, e.HasField("result")) for e in listed.executions] == [(a.named["EXEC"], False)]
    everything = people["all"]
    seen = (await everything.sandboxes.list_sandboxes()).sandboxes
    assert {(box.id, box.tenant) for box in seen} == {
        (a.named["BOX"], "a"),
        (b.named["BOX"], "b"),
    }
    assert not (await a.sandboxes.get_sandbox(a.named["BOX"])).tenant, "told to operators alone"
    forked = await everything.sandboxes.fork_sandbox(a.named["BOX"], 1)
    with pytest.raises(NotFound):
        await a.sandboxes.get_sandbox(forked.sandboxes[0].id)
    with pytest.raises(NotFound):
        await a.states.get_state(forked.state.id)
    await everything.sandboxes.delete_sandbox(a.named["BOX"])
    with pytest.raises(NotFound):
        await a.sandboxes.get_sandbox(a.named["BOX"])


async def test_a_state_is_everybodys_who_made_it_and_built_once(world):
    people, _ = world
    a, b, everything = people["a"], people["b"], people["all"]
    before = OverlayBuilder.builds
    state = await prepared(a.states, both="x\n")
    with pytest.raises(NotFound):
        await b.states.get_state(state.id)
    assert (await prepared(b.states, both="x\n")).id == state.id
    assert OverlayBuilder.builds == before + 1
    box = await b.sandboxes.create_sandbox(state.id)
    child = await b.sandboxes.snapshot_sandbox(box.id)
    await a.states.delete_state(state.id)
    with pytest.raises(NotFound):
        await a.sandboxes.create_sandbox(state.id)
    assert list((await everything.states.get_state(state.id)).tenants) == ["b"]
    lineage = await b.call("StateService/GetLineage", {"id": child.id})
    assert list(lineage.ancestor_ids) == [state.id]
    with pytest.raises(FailedPrecondition, match="sandboxes run on"):
        await b.states.delete_state(state.id)
    await prepared(everything.states, both="x\n")
    await b.states.delete_state(child.id)
    await b.sandboxes.delete_sandbox(box.id)
    await b.states.delete_state(state.id)
    assert list((await everything.states.get_state(state.id)).tenants) == [""], "nobody made it too"
    await everything.states.delete_state(state.id)
    assert not (await everything.states.list_states()).states
    assert OverlayBuilder.builds == before + 1


async def test_an_action_that_another_ran_gives_its_state_and_no_evidence(world):
    people, _ = world
    a, b = people["a"], people["b"]
    state = await prepared(a.states, x="x\n")
    await prepared(b.states, x="x\n")
    asked = {"state_id": state.id, "command": pb.Command(argv=["touch", "y"]), "keep_state": True}
    first = await a.call("ActionService/Execute", asked)
    with pytest.raises(NotFound):
        await b.states.get_state(first.state.id)
    second = await b.call("ActionService/Execute", asked)
    assert (second.cached, second.state.id) == (True, first.state.id)
    await a.states.delete_state(first.state.id)
    await b.states.get_state(first.state.id)
    odd = {"state_id": state.id, "command": pb.Command(argv=["sh", "-c", "date +%N; echo secret"])}
    for _ in range(2):
        await a.call("ActionService/Execute", {**odd, "skip_cache_lookup": True})
    mine, theirs = [await who.call("ActionService/ListQuarantined", {}) for who in (a, b)]
    assert (len(mine.actions), len(theirs.actions)) == (1, 0)


def forged(state_id: str, archive: bytes) -> bytes:
    """An archive whose record says that it is another state."""
    target = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in old.getmembers():
            content = old.extractfile(member) if member.isreg() else None
            data = content.read() if content else b""
            if member.name == "state.json":
                record = json.loads(data)
                record.update(id=state_id, size_bytes=0, tenants=["a"], spec_sha256="")
                data = json.dumps(record).encode()
            member.size = 0 if member.name == "end" else len(data)
            new.addfile(member, io.BytesIO(data if member.size else b""))
    return target.getvalue()


async def imported(person, data: bytes) -> pb.ImportStateResponse:
    async def requests():
        yield pb.ImportStateRequest(chunk=data)

    return await pb.StateServiceStub(person.channel).ImportState(requests())


async def test_an_archive_is_no_way_to_another_tenants_state_nor_into_it(world):
    people, _ = world
    a, b, everything = people["a"], people["b"], people["all"]
    state = await prepared(a.states, secret="s\n")
    mine = await prepared(b.states, mine="m\n")
    chunks = await b.call("StateService/ExportState", {"id": mine.id})
    archive = b"".join(part.chunk for part in chunks)
    assert b'"tenants": []' in archive, "whose a state is is not told"
    taken = await imported(b, forged(state.id, archive))
    assert taken.state.id != state.id
    assert any("another state" in note for note in taken.notes)
    assert taken.state.size_bytes > 0, "counted by what is there, not by what the record says"
    with pytest.raises(NotFound):
        await b.states.get_state(state.id)
    box = await b.sandboxes.create_sandbox(taken.state.id)
    assert (await b.sandboxes.read_file(box.id, "/work/repo/mine")).content == b"m\n"
    before = OverlayBuilder.builds
    later = await prepared(everything.states, secret="s\n")
    assert (later.id, OverlayBuilder.builds) == (state.id, before), "a's is as it was"
    with pytest.raises(NotFound):
        await a.states.get_state(taken.state.id)
    assert (await imported(b, archive)).state.id == mine.id, "its own is there already"


async def test_a_tenant_has_no_more_sandboxes_than_its_quota(world):
    people, quotas = world
    a, b = people["a"], people["b"]
    state = await prepared(a.states, x="x\n")
    await prepared(b.states, x="x\n")
    quotas.write_text(QUOTAS.format("sandboxes = 2"))
    first = await a.sandboxes.create_sandbox(state.id)
    with pytest.raises(ResourceExhausted, match="quota sandboxes of tenant a is 2") as caught:
        await a.sandboxes.fork_sandbox(first.id, 2)
    assert caught.value.retry_after_s > 0
    assert not (await a.states.list_states(parent_id=state.id)).states, "refused before any work"
    await a.sandboxes.fork_sandbox(first.id, 1)
    with pytest.raises(ResourceExhausted, match="this would make 3"):
        await a.sandboxes.create_sandbox(state.id)
    for _ in range(3):
        await b.sandboxes.create_sandbox(state.id)
    assert await uses(a, "sandboxes") == {"a": (2, 2)}
    assert await uses(b, "sandboxes") == {"b": (3, None)}
    assert await uses(people["all"], "sandboxes") == {"a": (2, 2), "b": (3, None)}
    assert (await uses(b, "state_bytes"))["b"][0] > 0
    await a.sandboxes.delete_sandbox(first.id)
    assert await uses(a, "sandboxes") == {"a": (1, 2)}
    await a.sandboxes.create_sandbox(state.id)


async def test_a_tenant_has_no_more_bytes_of_states_than_its_quota(world):
    people, quotas = world
    a, b = people["a"], people["b"]
    quotas.write_text(QUOTAS.format("state_bytes = 1"))
    state = await prepared(a.states, x="x\n")
    box = await a.sandboxes.create_sandbox(state.id)
    await prepared(a.states, x="x\n")
    chunks = await a.call("StateService/ExportState", {"id": state.id})
    before = OverlayBuilder.builds
    other = await prepared(b.states, y="y\n")
    touch = pb.Command(argv=["touch", "y"])
    for refused in (
        lambda: prepared(a.states, z="z\n"),
        lambda: prepared(a.states, y="y\n"),
        lambda: a.sandboxes.snapshot_sandbox(box.id),
        lambda: a.sandboxes.fork_sandbox(box.id, 1),
        lambda: a.call(
            "ActionService/Execute", {"state_id": state.id, "command": touch, "keep_state": True}
        ),
    ):
        with pytest.raises(ResourceExhausted, match="quota state_bytes of tenant a is 1"):
            await refused()
    with pytest.raises(Exception, match="quota state_bytes of tenant a is 1"):
        await imported(a, b"".join(part.chunk for part in chunks))
    assert OverlayBuilder.builds == before + 1, "what is refused is not begun"
    assert [s.id for s in (await a.states.list_states()).states] == [state.id]
    assert other.id
    quotas.write_text(QUOTAS.format("state_bytes = 100_000_000"))
    await a.sandboxes.snapshot_sandbox(box.id)


async def test_owners_outlive_the_service_and_no_client_names_its_tenant(tmp_path):
    people, home, listen = People(tmp_path), tmp_path / "home", f"unix:{tmp_path}/s"
    async with (
        service(home, listen, tokens=people.tokens) as address,
        people.before(address) as found,
    ):
        state = await prepared(found["a"].states, x="x\n")
    async with (
        service(home, listen, tokens=people.tokens) as address,
        people.before(address) as found,
    ):
        assert (await found["a"].states.get_state(state.id)).id == state.id
        wanted = {"id": state.id}
        for said in ((), ((HEADER, "a"),), ((HEADER, "*"),)):
            with pytest.raises(NotFound):
                await found["b"].call("StateService/GetState", wanted, metadata=said)
