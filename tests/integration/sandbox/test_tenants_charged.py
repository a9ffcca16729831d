"""What a worker for everybody makes for a tenant is charged to it; nobody else is believed."""

import contextlib

import pytest

from regreen.rpc.errors import NotFound, PermissionDenied, ResourceExhausted
from regreen.rpc.tenants import CHARGED, charging
from tests.integration.sandbox.attacking import People, service
from tests.integration.sandbox.overlay import prepared
from tests.integration.sandbox.test_tenants_fleet import World

QUOTAS = "[default]\n[tenants.a]\nsandboxes = 2\n"


@pytest.fixture(params=["service", "front"])
async def people(request, tmp_path):
    """Everybody before one service, or before a front with two workers."""
    (tmp_path / "quotas.toml").write_text(QUOTAS)
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "service":
            made = People(tmp_path)
            options = {"tokens": made.tokens, "quotas": tmp_path / "quotas.toml"}
            running = service(tmp_path / "home", f"unix:{tmp_path}/s", **options)
            address = await stack.enter_async_context(running)
            yield await stack.enter_async_context(made.before(address))
            return
        world = World(tmp_path)
        for number in range(2):
            listen = f"unix:{tmp_path}/w{number}"
            running = service(tmp_path / f"w{number}-home", listen, behind_front=True)
            world.workers.append(await stack.enter_async_context(running))
        found, _, _ = await stack.enter_async_context(world.front())
        yield found


async def test_what_is_made_for_a_tenant_is_its_own_and_within_its_quota(people):
    a, b, worker = people["a"], people["b"], people["all"]
    state = await prepared(worker.states, x="x\n")  # nobody's: a alone could not use it
    with charging("a"):
        first = await worker.sandboxes.create_sandbox(state.id)
        assert (await worker.sandboxes.get_sandbox(first.id)).tenant == "a"
        second = (await worker.sandboxes.fork_sandbox(first.id, 1)).sandboxes[0]
        for more in (
            worker.sandboxes.create_sandbox(state.id),
            worker.sandboxes.fork_sandbox(first.id, 1),
        ):
            with pytest.raises(ResourceExhausted, match="quota sandboxes of tenant a is 2"):
                await more
    made = await prepared(a.states, y="y\n")
    with pytest.raises(ResourceExhausted, match="quota sandboxes of tenant a is 2"):
        await a.sandboxes.create_sandbox(made.id)  # what is made for it and by it is one sum
    assert {box.id for box in (await a.sandboxes.list_sandboxes()).sandboxes} == {
        first.id,
        second.id,
    }
    with pytest.raises(NotFound):
        await b.sandboxes.get_sandbox(first.id)
    await worker.sandboxes.create_sandbox(state.id)  # the platform's own has no bound
    with charging("b"):
        await worker.sandboxes.create_sandbox(state.id)  # nor has b
    await a.sandboxes.delete_sandbox(second.id)
    with charging("a"):
        child = await worker.sandboxes.snapshot_sandbox(first.id)
        await worker.sandboxes.create_sandbox(state.id)
    assert (await a.states.get_state(child.id)).id == child.id
    with pytest.raises(NotFound):
        await b.states.get_state(child.id)


async def test_a_tenant_charges_no_other(people):
    """An attacker's word for whom its work is counts as little as its word for who it is."""
    a, b = people["a"], people["b"]
    state = await prepared(a.states, x="x\n")
    for said in ("b", "*", "nobody"):
        with charging(said):
            for call in (
                a.sandboxes.create_sandbox(state.id),
                a.sandboxes.list_sandboxes(),
                a.states.get_state(state.id),
            ):
                with pytest.raises(PermissionDenied, match="may charge no other"):
                    await call
    with charging("a"):  # its own is its own
        box = await a.sandboxes.create_sandbox(state.id)
    assert not (await b.sandboxes.list_sandboxes()).sandboxes
    assert [one.id for one in (await a.sandboxes.list_sandboxes()).sandboxes] == [box.id]
    wanted = {"id": box.id}
    with pytest.raises(PermissionDenied):
        await b.call("SandboxService/GetSandbox", wanted, metadata=((CHARGED, "a"),))
