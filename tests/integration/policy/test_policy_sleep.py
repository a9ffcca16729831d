"""Sleep and wake over the wire before SGLang servers: states, refusals, a service begun anew."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from policy_svc.__main__ import Running, running
from policy_svc.chat import Tokenizer
from policy_svc.settings import PolicySettings
from regreen.client.channel import connect
from regreen.client.policy import PolicyClient
from regreen.policy import v1 as pb
from regreen.rpc.errors import FailedPrecondition, NotFound, Unavailable
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model
from tests.fixtures.policy.sglang_standin import SglangStandIn

PROMPT = (1, 520, 9531, 198)


@pytest.fixture
async def servers() -> AsyncIterator[list[tuple[SglangStandIn, str]]]:
    tokenizer = Tokenizer(default_model())
    found = [SglangStandIn(default_model(), tokenizer, release="0.5.16") for _ in range(2)]
    async with serving(found[0].app()) as one, serving(found[1].app()) as two:
        yield [(found[0], one), (found[1], two)]
    assert [server.died_of for server in found] == ["", ""]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "v7"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(default_model() / "model.safetensors")
    return folder


@asynccontextmanager
async def service(
    tmp_path: Path, servers: list[tuple[SglangStandIn, str]], **values: Any
) -> AsyncIterator[tuple[Running, PolicyClient]]:
    settings = {
        "home": tmp_path,
        "listen": "127.0.0.1:0",
        "metrics": "127.0.0.1:0",
        "http": "127.0.0.1:0",
        "engine": "sglang",
        "sglang_urls": ",".join(url for _, url in servers),
        "model": default_model(),
        "drain_s": 1.0,
    }
    async with (
        asyncio.timeout(120),
        running(PolicySettings(**(settings | values))) as found,
        connect(found.server.address) as channel,
    ):
        yield found, PolicyClient(channel, patience_s=0.0)


async def sample(policy: PolicyClient, tokens: int = 4) -> pb.Completion:
    sampling = pb.Sampling(temperature=1.0, max_new_tokens=tokens)
    (completion,) = (await policy.generate(PROMPT, sampling=sampling)).completions
    return completion


async def test_a_sleep_is_told_and_refuses_until_it_is_woken(
    tmp_path: Path, servers: list[tuple[SglangStandIn, str]], other: Path
) -> None:
    async with service(tmp_path, servers) as (found, policy):
        told = await policy.get_policy()
        assert (told.sleep, told.can_sleep) == (pb.SLEEP_STATE_AWAKE, True)
        await policy.sleep()
        await policy.sleep()
        assert [server.released for server, _ in servers] == [{"kv_cache", "weights"}] * 2
        told = await policy.get_policy()
        assert (told.sleep, told.policy.version) == (pb.SLEEP_STATE_ASLEEP, 0)
        with pytest.raises(Unavailable, match="asleep: its memory is lent") as refused:
            await sample(policy)
        assert refused.value.retry_after_s == 5.0
        base_url = f"http://127.0.0.1:{found.http_port}/v1/"
        async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            answer = await client.post("chat/completions", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        asked = pb.PolicyVersion(version=7, uri=str(other))
        with pytest.raises(FailedPrecondition, match="wake"):
            await policy.load_version(asked)
        with pytest.raises(FailedPrecondition, match="wake"):
            await policy.pause()
        nowhere = pb.PolicyVersion(version=8, uri="/nowhere")
        with pytest.raises(NotFound):
            await policy.wake(nowhere)
        assert (await policy.get_policy()).sleep == pb.SLEEP_STATE_ASLEEP
        woken = await policy.wake(asked)
        assert (woken.policy.version, woken.pause.ToNanoseconds() > 0) == (7, True)
        told = await policy.get_policy()
        assert (told.sleep, told.policy.version) == (pb.SLEEP_STATE_AWAKE, 7)
        assert [server.weights for server, _ in servers] == [str(other)] * 2
        assert [span.version for span in (await sample(policy)).versions] == [7]
        assert (await policy.wake(pb.PolicyVersion(version=9, uri=str(other)))).policy.version == 9
        assert (await policy.wake()).policy.version == 9


async def test_what_runs_ends_before_the_policy_sleeps(
    tmp_path: Path, servers: list[tuple[SglangStandIn, str]]
) -> None:
    async with service(tmp_path, servers) as (_, policy):
        call = asyncio.create_task(sample(policy, tokens=1500))
        while not any(server.running for server, _ in servers):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="1 requests still run"):
            await policy.sleep(timeout_s=1.0)
        assert (await policy.get_policy()).sleep == pb.SLEEP_STATE_AWAKE
        sleep = asyncio.create_task(policy.sleep())
        while (await policy.get_policy()).sleep == pb.SLEEP_STATE_AWAKE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="falling asleep"):
            await sample(policy)
        assert len((await call).token_ids) == 1500
        await sleep
        assert (await policy.get_policy()).sleep == pb.SLEEP_STATE_ASLEEP
        await policy.wake()


async def test_a_request_that_waits_for_a_resume_is_refused_when_the_policy_sleeps(
    tmp_path: Path, servers: list[tuple[SglangStandIn, str]]
) -> None:
    async with service(tmp_path, servers) as (_, policy):
        await policy.pause()
        waiting = asyncio.create_task(sample(policy))
        await asyncio.sleep(0.2)
        await policy.sleep()
        with pytest.raises(Unavailable, match="asleep"):
            await waiting
        await policy.resume()
        with pytest.raises(Unavailable, match="asleep"):
            await sample(policy)
        await policy.wake()
        await sample(policy)
        await policy.pause(pb.PAUSE_MODE_IN_PLACE)
        with pytest.raises(FailedPrecondition, match="resume"):
            await policy.sleep()
        await policy.resume()


async def test_a_service_that_begins_anew_lets_its_servers_sleep(
    tmp_path: Path, servers: list[tuple[SglangStandIn, str]], other: Path
) -> None:
    async with service(tmp_path, servers) as (_, policy):
        await policy.load_version(pb.PolicyVersion(version=7, uri=str(other)))
        await policy.sleep()
    for server, _ in servers:
        server.calls.clear()
    async with service(tmp_path, servers) as (_, policy):
        told = await policy.get_policy()
        assert (told.sleep, told.policy.version) == (pb.SLEEP_STATE_ASLEEP, 7)
        with pytest.raises(Unavailable, match="asleep"):
            await sample(policy)
        asked = {route for server, _ in servers for route, _ in server.calls}
        assert "/resume_memory_occupation" not in asked, "a learner may have that memory"
        await policy.wake()
        assert [(s.weights, s.version) for s, _ in servers] == [(str(other), "7")] * 2
        assert [span.version for span in (await sample(policy)).versions] == [7]


async def test_a_sleep_reaches_servers_that_were_begun_anew_meanwhile(
    tmp_path: Path, servers: list[tuple[SglangStandIn, str]], other: Path
) -> None:
    async with service(tmp_path, servers) as (_, policy):
        await policy.load_version(pb.PolicyVersion(version=7, uri=str(other)))
        await policy.sleep()
        servers[1][0].restart()
        await policy.sleep()
        assert [server.version.startswith("asleep") for server, _ in servers] == [True, True]
        servers[0][0].restart()
    async with service(tmp_path, servers) as (_, policy):  # of a service that was killed, too
        assert (await policy.get_policy()).sleep == pb.SLEEP_STATE_ASLEEP
        await policy.sleep()
        assert [server.version.startswith("asleep") for server, _ in servers] == [True, True]
        await policy.wake()
        assert [(s.weights, s.version) for s, _ in servers] == [(str(other), "7")] * 2
        assert [span.version for span in (await sample(policy)).versions] == [7]


async def test_engines_with_nothing_to_give_back_say_so(
    tmp_path: Path, servers: list[tuple[SglangStandIn, str]]
) -> None:
    script = tmp_path / "script.json"
    script.write_text('{"responses": [{"text": "Hello."}]}')
    async with service(tmp_path, servers, engine="scripted", script=script) as (_, policy):
        assert not (await policy.get_policy()).can_sleep
        with pytest.raises(FailedPrecondition, match="scripted engine has no accelerator's memory"):
            await policy.sleep()
        await sample(policy)
        await policy.wake()
    servers[0][0].memory_saver = False
    async with service(tmp_path, servers) as (_, policy):
        assert not (await policy.get_policy()).can_sleep
        with pytest.raises(FailedPrecondition, match="--enable-memory-saver"):
            await policy.sleep()
        await sample(policy)
