"""Tenants are walls at a front too, whose workers take its word and nobody else's."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from regreen.blobs import open_blobs
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import NotFound, ResourceExhausted
from regreen.rpc.quotas import Quotas
from regreen.rpc.server import Server
from regreen.rpc.tenants import HEADER
from regreen.sandbox import v1 as pb
from sandbox_svc.fleet.archive import Archive
from sandbox_svc.fleet.calls import SERVICES, Endpoint
from sandbox_svc.fleet.front import Front
from sandbox_svc.fleet.registry import Registry
from sandbox_svc.fleet.router import Router
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox.attacking import People, attack, service, settle, uses
from tests.integration.sandbox.overlay import OverlayBuilder, prepared

QUOTAS = "[tenants.a]\nsandboxes = 2\nstate_bytes = 100_000_000\n"


class World:
    """A front before two workers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.people = folder, People(folder)
        self.workers: list[str] = []

    @contextlib.asynccontextmanager
    async def front(self):
        """Everybody before a front that has just begun; with its registry and its router."""
        registry = Registry()
        archive = Archive(open_blobs(self.folder / "blobs", fsync=False), self.folder / "scratch")
        router = Router(registry, archive, keep="prepared")
        settings = SandboxSettings(
            listen="127.0.0.1:0", metrics="127.0.0.1:0", home=self.folder, drain_s=0.2,
            tokens=self.people.tokens,
        )  # fmt: skip
        server = Server(settings, SERVICES)
        Front(router, Quotas(self.folder / "quotas.toml")).add_to(server.grpc)
        registry.update(
            [Endpoint(f"w{n}", "1", "1", address) for n, address in enumerate(self.workers)]
        )
        try:
            async with asyncio.timeout(20):
                while len(registry.ready) < len(self.workers):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            async with server, self.people.before(server.address) as found:
                yield found, registry, router
        finally:
            await router.close()
            await registry.close()


@pytest.fixture
async def world(tmp_path):
    (tmp_path / "quotas.toml").write_text(QUOTAS)
    made = World(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        for number in range(2):
            listen = f"unix:{tmp_path}/w{number}"
            running = service(tmp_path / f"w{number}-home", listen, behind_front=True)
            made.workers.append(await stack.enter_async_context(running))
        yield made


async def test_a_front_keeps_tenants_apart_also_after_a_restart(world):
    async with world.front() as (people, _, _):
        a, b = people["a"], people["b"]
        await settle(a, await prepared(a.states, secret="s\n"))
        await settle(b, await prepared(b.states, other="o\n"))
        await attack(b, a)
    async with world.front() as (people, registry, _):
        again = people["b"]
        again.named.update(b.named)
        await attack(again, a)
        lost = next(n for n in registry.ready if registry.placed_on(n, [a.named["BOX"]]))
        registry.update([])
        told = []
        for wanted in (a.named["BOX"], "sbx_" + "7" * 32):
            with pytest.raises(NotFound) as caught:
                await again.sandboxes.get_sandbox(wanted)
            told.append(str(caught.value).replace(wanted, ""))
        assert told[0] == told[1], "what was lost is told to its tenant alone"
        with pytest.raises(NotFound, match=f"ended with its worker {lost}"):
            await people["a"].sandboxes.get_sandbox(a.named["BOX"])


async def test_a_shared_state_goes_where_its_tenants_need_it(world):
    async with world.front() as (people, registry, router):
        a, b, everything = people["a"], people["b"], people["all"]
        before = OverlayBuilder.builds
        state = await prepared(a.states, both="x\n")
        first = next(iter(registry.holders(state.id)))
        other = next(worker for name, worker in registry.ready.items() if name != first)
        await router.settled(state.id)
        await router.ensure(other, state.id)  # a copy that is a's alone
        assert (await prepared(b.states, both="x\n")).id == state.id
        assert OverlayBuilder.builds == before + 1
        await router.settled(state.id)
        stored = await router.archive.find(state.id)
        assert set(stored.tenants) == {"a", "b"}, "the blob store says so too"
        held = registry.ready.pop(first)  # what b is given comes from the blob store
        box = await b.sandboxes.create_sandbox(state.id)
        assert registry.placed_on(other.name, [box.id])
        registry.ready[first] = held
        listed = (await b.states.list_states()).states
        assert [found.id for found in listed] == [state.id]
        assert not listed[0].tenants, "told to operators alone"
        await b.sandboxes.delete_sandbox(box.id)
        await a.states.delete_state(state.id)
        for gone in (a.states.get_state(state.id), a.sandboxes.create_sandbox(state.id)):
            with pytest.raises(NotFound):
                await gone
        assert list((await everything.states.get_state(state.id)).tenants) == ["b"]
        assert (await router.archive.find(state.id)).tenants == ("b",)
        await b.states.get_state(state.id)
        await b.states.delete_state(state.id)
        assert await router.archive.find(state.id) is None
        assert not (await everything.states.list_states()).states


async def test_a_front_keeps_quotas_over_all_workers(world):
    async with world.front() as (people, registry, _):
        a, b = people["a"], people["b"]
        state = await prepared(a.states, x="x\n")
        await prepared(b.states, x="x\n")
        asked = (a.sandboxes.create_sandbox(state.id) for _ in range(4))
        made = await asyncio.gather(*asked, return_exceptions=True)
        boxes = [box for box in made if not isinstance(box, BaseException)]
        refused = [error for error in made if isinstance(error, ResourceExhausted)]
        assert (len(boxes), len(refused)) == (2, 2)
        assert await uses(a, "sandboxes") == {"a": (2, 2)}
        assert await uses(b, "sandboxes") == {"b": (0, None)}
        assert (await uses(people["all"], "state_bytes")).keys() == {"a", "b"}
        assert "quota sandboxes of tenant a is 2" in str(refused[0])
        with pytest.raises(ResourceExhausted, match="quota sandboxes"):
            await a.sandboxes.fork_sandbox(boxes[0].id, 1)
        await b.sandboxes.create_sandbox(state.id)
        (worker,) = [
            w for w in registry.ready.values() if registry.placed_on(w.name, [boxes[0].id])
        ]
        async with connect(worker.endpoint.address) as channel:
            client = SandboxClient(channel, patience_s=0.0)
            await client.delete_sandbox(boxes[0].id)  # as if it had ended by itself
        await a.sandboxes.create_sandbox(state.id)
        (world.folder / "quotas.toml").write_text("[tenants.a]\nstate_bytes = 1\n")
        builds = OverlayBuilder.builds
        for work in (prepared(a.states, y="y\n"), a.sandboxes.snapshot_sandbox(boxes[1].id)):
            with pytest.raises(ResourceExhausted, match="quota state_bytes of tenant a is 1"):
                await work
        assert OverlayBuilder.builds == builds
        await prepared(a.states, x="x\n")


async def test_no_client_of_a_front_names_its_tenant(world):
    async with world.front() as (people, _, _):
        a, b = people["a"], people["b"]
        state = await prepared(a.states, x="x\n")
        wanted = {"id": state.id}
        for said in ("a", "*", ""):
            with pytest.raises(NotFound):
                await b.call("StateService/GetState", wanted, metadata=((HEADER, said),))


async def test_a_service_without_a_front_believes_nobody(tmp_path):
    async with (
        service(tmp_path / "home", f"unix:{tmp_path}/s") as address,
        connect(address) as channel,
    ):
        client = StateClient(channel, patience_s=0.0)
        state = await prepared(client, x="x\n")
        asked = pb.StateServiceStub(channel).GetState(
            pb.GetStateRequest(id=state.id), metadata=((HEADER, "b"),)
        )
        assert list((await asked).state.tenants) == [""], "the header is nothing to it"
    for options in ({"tokens": People(tmp_path).tokens}, {"backend": "kubernetes"}):
        with pytest.raises(ValidationError, match="behind_front: whose a call is"):
            SandboxSettings(behind_front=True, **options)
