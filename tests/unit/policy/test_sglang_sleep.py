"""Memory of SGLang servers given back and taken again: of all or of none; the right weights."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import Completion, Request, Sampling
from policy_svc.engines.sglang import SglangEngine, SglangOptions
from regreen.rpc.errors import FailedPrecondition, Unavailable
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model
from tests.fixtures.policy.sglang_standin import SglangStandIn

TOKENIZER = Tokenizer(default_model())
RELEASE, TAKE = "/release_memory_occupation", "/resume_memory_occupation"


def engine_of(*urls: str, base: Path | None = None) -> SglangEngine:
    options = SglangOptions(urls, 4096, retry_s=0.3, start_s=5.0, base=base)
    return SglangEngine(options, TOKENIZER, 2)


@asynccontextmanager
async def standins(release: str = "0.5.16") -> AsyncIterator[list[tuple[SglangStandIn, str]]]:
    """Two servers, and where they are."""
    servers = [SglangStandIn(default_model(), TOKENIZER, release=release) for _ in range(2)]
    async with (
        asyncio.timeout(60),
        serving(servers[0].app()) as first,
        serving(servers[1].app()) as second,
    ):
        yield [(servers[0], first), (servers[1], second)]
    assert [server.died_of for server in servers] == ["", ""]


@asynccontextmanager
async def replicas(
    release: str = "0.5.16", base: Path | None = None
) -> AsyncIterator[tuple[SglangEngine, list[SglangStandIn]]]:
    async with standins(release) as found:
        engine = engine_of(*(url for _, url in found), base=base)
        await engine.start()
        yield engine, [server for server, _ in found]
        await engine.close()


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another version's folder."""
    folder = tmp_path / "v7"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(default_model() / "model.safetensors")
    return folder


async def sample(engine: SglangEngine, rid: str = "r", tokens: int = 4) -> Completion:
    request = Request(rid, (1, 520), 1, Sampling(max_new_tokens=tokens, seed=9))
    (completion,) = (await engine.generate(request)).completions
    return completion


def posts(server: SglangStandIn) -> list[tuple[str, str]]:
    """What was asked about memory and weights, in order: route, and tags or version."""
    said = {RELEASE: "tags", TAKE: "tags", "/update_weights_from_disk": "weight_version"}
    said |= {"/update_weight_version": "new_version"}
    return [(route, str(body[said[route]])) for route, body in server.calls if route in said]


@pytest.mark.parametrize("release", ["0.5.16", "0.5.23"])
async def test_sleep_gives_all_memory_back_and_wake_loads_what_served(release, other: Path) -> None:
    async with replicas(release) as (engine, servers):
        await engine.load(7, other)
        before = await sample(engine)
        await engine.sleep()
        assert engine.asleep
        for server in servers:
            assert server.released == {"kv_cache", "weights"}
            assert server.weights is None
            assert server.paused
        with pytest.raises(Unavailable, match="lent") as refused:
            await sample(engine)
        assert refused.value.retry_after_s == 5.0
        with pytest.raises(FailedPrecondition, match="wake them"):
            await engine.load(8, other)
        await engine.wake(7, None)
        for server in servers:
            assert (server.released, server.weights) == (set(), str(other))
            assert (server.version, server.paused) == ("7", False)
            assert posts(server)[-6:] == [
                ("/update_weight_version", "asleep:7"),
                (RELEASE, "['kv_cache', 'weights']"),
                (TAKE, "['weights']"),
                ("/update_weights_from_disk", "asleep:7"),
                (TAKE, "['kv_cache']"),
                ("/update_weight_version", "7"),
            ]
        after = await sample(engine)
        assert (after.token_ids, after.versions) == (before.token_ids, before.versions)


async def test_wake_with_another_version_loads_that_alone(other: Path) -> None:
    async with replicas() as (engine, servers):
        await engine.sleep()
        await engine.wake(7, other)
        for server in servers:
            assert (server.version, server.weights) == ("7", str(other))
            loads = [call for call in posts(server) if call[0] == "/update_weights_from_disk"]
            assert loads == [("/update_weights_from_disk", "asleep:7")]
        assert [span.version for span in (await sample(engine)).versions] == [7]


async def test_one_that_gives_nothing_back_has_the_others_keep_theirs() -> None:
    async with replicas() as (engine, servers):
        servers[1].memory_saver = False
        with pytest.raises(FailedPrecondition, match="--enable-memory-saver"):
            await engine.sleep()
        assert not engine.asleep
        assert all(not server.released and not posts(server) for server in servers)
        await sample(engine)


@pytest.mark.parametrize("status", [400, 500])
async def test_one_that_fails_to_sleep_has_the_others_woken(status: int, other: Path) -> None:
    async with replicas() as (engine, servers):
        await engine.load(7, other)
        before = await sample(engine)
        servers[1].faults[RELEASE] = [status]
        with pytest.raises((FailedPrecondition, Unavailable), match=str(status)):
            await engine.sleep()
        assert not engine.asleep
        assert (RELEASE, "['kv_cache', 'weights']") in posts(servers[0])
        for server in servers:
            assert (server.released, server.weights) == (set(), str(other))
            assert (server.version, server.paused) == ("7", False)
        made = await asyncio.gather(sample(engine, "a"), sample(engine, "b"))
        assert [one.token_ids for one in made] == [before.token_ids] * 2
        await engine.sleep()
        await engine.wake(7, None)


async def test_others_that_do_not_wake_again_are_told_as_asleep(other: Path) -> None:
    async with replicas() as (engine, servers):
        await engine.load(7, other)
        servers[0].faults[TAKE] = [400]
        servers[1].faults[RELEASE] = [400]
        with pytest.raises(Unavailable, match="nor do all wake"):
            await engine.sleep()
        assert engine.asleep
        assert [server.released for server in servers] == [{"kv_cache", "weights"}] * 2
        await engine.wake(7, None)
        assert [server.weights for server in servers] == [str(other)] * 2


@pytest.mark.parametrize(
    ("route", "statuses"),
    [
        (TAKE, [400]),
        (TAKE, [200, 400]),
        ("/update_weights_from_disk", [400]),
        ("/update_weight_version", [500]),
    ],
)
async def test_one_that_fails_to_wake_has_all_sleep_on(
    route: str, statuses: list[int], other: Path
) -> None:
    async with replicas() as (engine, servers):
        await engine.sleep()
        servers[1].faults[route] = list(statuses)
        with pytest.raises((FailedPrecondition, Unavailable)):
            await engine.wake(7, other)
        assert engine.asleep
        assert engine.version == 0
        for server in servers:
            assert server.released == {"kv_cache", "weights"}
            assert server.paused
        await engine.wake(0, None)
        for server in servers:
            assert (server.weights, server.version) == (str(default_model()), "default")
        assert [span.version for span in (await sample(engine)).versions] == [0]


async def test_requests_of_others_keep_a_server_awake() -> None:
    async with standins() as found:
        engine = engine_of(*(url for _, url in found))
        await engine.start()
        body = {"rid": "theirs", "input_ids": [1], "return_logprob": True}
        body["sampling_params"] = {"max_new_tokens": 4000, "sampling_seed": 1, "stop_token_ids": []}
        async with httpx.AsyncClient(base_url=found[0][1], timeout=60) as client:
            theirs = asyncio.create_task(client.post("/generate", json=body))
            while not found[0][0].running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            sleeping = asyncio.create_task(engine.sleep())
            await asyncio.sleep(0.2)
            assert not found[0][0].released
            await client.post("/abort_request", json={"rid": "theirs"})
            await theirs
            await sleeping
            # What comes now waits, and does not touch memory that is gone.
            late = asyncio.create_task(client.post("/generate", json=body | {"rid": "late"}))
            await asyncio.sleep(0.1)
            assert not late.done()
            await engine.wake(0, None)
            await client.post("/abort_request", json={"rid": "late"})
            assert (await late).status_code == 200
        await engine.close()


async def test_a_service_that_begins_before_servers_that_sleep_knows(other: Path) -> None:
    async with standins() as found:
        urls, servers = [url for _, url in found], [server for server, _ in found]
        first = engine_of(*urls)
        await first.start()
        await first.load(7, other)
        await first.sleep()
        await first.close()
        for server in servers:
            server.health_samples = True  # a probe on memory that is gone would end it
        second = engine_of(*urls)
        await second.start()
        assert second.asleep
        await second.wake(7, other)
        assert [(s.weights, s.version) for s in servers] == [(str(other), "7")] * 2
        assert [span.version for span in (await sample(second)).versions] == [7]
        await second.close()


async def test_a_server_that_began_anew_while_asleep_gets_the_weights(other: Path) -> None:
    async with replicas() as (engine, servers):
        await engine.load(7, other)
        await engine.sleep()
        servers[1].restart()
        await engine.wake(7, None)
        assert [(s.weights, s.version) for s in servers] == [(str(other), "7")] * 2
        assert [s.released for s in servers] == [set(), set()]


async def test_sleeping_twice_keeps_the_name_of_the_base() -> None:
    async with replicas() as (engine, servers):
        for _ in range(2):
            await engine.sleep()
            await engine.wake(0, None)
        assert [server.version for server in servers] == ["default"] * 2
        assert [span.version for span in (await sample(engine)).versions] == [0]
