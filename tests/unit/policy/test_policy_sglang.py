"""The SGLang client against a stand-in that is as strict and as faulty as the real server."""

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import FinishReason, PauseMode, Request, Sampling
from policy_svc.engines.sglang import SglangEngine, SglangOptions
from policy_svc.engines.sglang_wire import sampling_params
from policy_svc.settings import PolicySettings
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model
from tests.fixtures.policy.sglang_standin import SAMPLING_KEYS, SglangStandIn

TOKENIZER = Tokenizer(default_model())
PROMPT = (1, 520, 9531, 198)


def options(*urls: str, retry_s: float = 2.0, **values: Any) -> SglangOptions:
    return SglangOptions(urls, context_length=4096, retry_s=retry_s, **values)


@asynccontextmanager
async def replicas(
    count: int = 1, release: str = "0.5.23"
) -> AsyncIterator[tuple[SglangEngine, list[SglangStandIn]]]:
    servers = [SglangStandIn(default_model(), TOKENIZER, release=release) for _ in range(count)]
    async with asyncio.timeout(60), serving(servers[0].app()) as first:
        if count == 1:
            engine = SglangEngine(options(first), TOKENIZER, 2)
            await engine.start()
            yield engine, servers
            await engine.close()
            return
        async with serving(servers[1].app()) as second:
            engine = SglangEngine(options(first, second), TOKENIZER, 2)
            await engine.start()
            yield engine, servers
            await engine.close()


def ask(rid: str = "r", n: int = 1, tokens: int = 6) -> Request:
    return Request(rid, PROMPT, n, Sampling(max_new_tokens=tokens, seed=9, top_k=5, stop=("zzz",)))


def test_only_known_sampling_keys_are_sent() -> None:
    sampling = Sampling(top_k=3, stop=("a",), regex="b", stop_token_ids=(7,))
    params = sampling_params(sampling, 2, 1)
    assert set(params) <= SAMPLING_KEYS
    assert params["stop_token_ids"] == [2, 7]
    assert params["regex"] == "b"
    other = sampling_params(Sampling(json_schema="{}"), 2, 0)
    assert set(other) <= SAMPLING_KEYS
    assert other["json_schema"] == "{}"
    assert sampling_params(Sampling(), 2, 0)["top_k"] == -1


async def test_server_refusals_are_typed() -> None:
    async with replicas() as (engine, (server,)):
        server.faults["/generate"] = [400]
        with pytest.raises(InvalidArgument, match="400"):
            await engine.generate(ask())
        server.faults["/generate"] = [500]
        with pytest.raises(Unavailable, match="500"):
            await engine.generate(ask())


async def test_busy_answers_are_retried_within_the_deadline() -> None:
    async with replicas() as (engine, (server,)):
        server.faults["/generate"] = [503, 429, 503]
        made = await engine.generate(ask())
        assert len(made.completions[0].token_ids) == 6
        server.faults["/generate"] = [503] * 500
        with pytest.raises(Unavailable, match="503"):
            await engine.generate(ask())


async def test_start_waits_for_servers_that_load_their_model(capsys) -> None:
    server = SglangStandIn(default_model(), TOKENIZER)
    server.faults["/health"] = [503] * 5
    async with serving(server.app()) as url:
        engine = SglangEngine(options(url, retry_s=0.0, start_s=60.0), TOKENIZER, 2)
        await engine.start()
        await engine.close()
    assert not server.faults["/health"]
    told = [line for line in capsys.readouterr().out.splitlines() if "waiting for SGLang" in line]
    assert len(told) == 1
    assert "health says 503" in told[0]


async def test_an_absent_server_is_named() -> None:
    engine = SglangEngine(options("http://127.0.0.1:9", start_s=0.3), TOKENIZER, 2)
    with pytest.raises(Unavailable, match=r"sglang_urls: http://127.0.0.1:9/? is not healthy"):
        await engine.start()
    await engine.close()


async def test_samples_of_a_request_go_to_one_replica() -> None:
    async with replicas(2) as (engine, servers):
        await asyncio.gather(engine.generate(ask("a", n=3)), engine.generate(ask("b", n=3)))
        owners = [{b["rid"][0] for route, b in s.calls if route == "/generate"} for s in servers]
        assert sorted(map(sorted, owners)) == [["a"], ["b"]]


async def test_a_push_reaches_all_replicas_or_none() -> None:
    async with replicas(2) as (engine, servers):
        await engine.load(1, default_model())
        assert [server.version for server in servers] == ["1", "1"]
        servers[1].faults["/update_weights_from_disk"] = [400]
        with pytest.raises(FailedPrecondition, match="not loaded"):
            await engine.load(2, default_model())
        assert [server.version for server in servers] == ["1", "1"]
        assert engine.version == 1


async def test_native_spans_follow_a_switch() -> None:
    async with replicas() as (engine, _):
        call = asyncio.create_task(engine.generate(ask(tokens=300)))
        await asyncio.sleep(0.05)
        await engine.load(5, default_model())
        (completion,) = (await call).completions
        assert [span.version for span in completion.versions] == [0, 5]
        assert completion.versions[-1].end == 300


async def test_without_native_spans_a_push_waits_for_requests() -> None:
    async with replicas(release="0.5.16") as (engine, (server,)):
        call = asyncio.create_task(engine.generate(ask("old", tokens=100)))
        await asyncio.sleep(0.05)
        load = asyncio.create_task(engine.load(5, default_model()))
        await asyncio.sleep(0)
        late = asyncio.create_task(engine.generate(ask("new")))
        (old,) = (await call).completions
        await load
        (new,) = (await late).completions
        assert [span.version for span in old.versions] == [0]
        assert [span.version for span in new.versions] == [5]
        assert "keep_pause" not in next(b for r, b in server.calls if r.startswith("/update"))


async def test_spans_with_gaps_are_refused() -> None:
    async with replicas() as (engine, (server,)):
        server.broken_spans = True
        with pytest.raises(Unavailable, match="gaps"):
            await engine.generate(ask())


async def test_abort_and_cancel_reach_the_server() -> None:
    async with replicas() as (engine, (server,)):
        call = asyncio.create_task(engine.generate(ask("gone", n=2, tokens=8000)))
        await asyncio.sleep(0.05)
        assert await engine.abort("gone") == 1
        completions = (await call).completions
        assert {c.finish_reason for c in completions} == {FinishReason.ABORT}
        again = asyncio.create_task(engine.generate(ask("cancelled", tokens=8000)))
        await asyncio.sleep(0.05)
        again.cancel()
        with pytest.raises(asyncio.CancelledError):
            await again
        assert "cancelled/0" in server.aborted


async def test_pause_modes_are_sent() -> None:
    async with replicas() as (engine, (server,)):
        await engine.pause(PauseMode.IN_PLACE)
        await engine.resume()
        await engine.pause(PauseMode.ABORT)
        await engine.resume()
        bodies = [b for route, b in server.calls if route == "/pause_generation"]
        assert bodies == [{"mode": "in_place"}, {"mode": "abort"}]


def test_paths_are_mapped() -> None:
    engine = SglangEngine(options("http://x", path_map=("/local", "/remote")), TOKENIZER, 2)
    assert engine._remote(Path("/local/a")) == "/remote/a"


async def test_a_failed_sample_ends_its_siblings() -> None:
    async with replicas() as (engine, (server,)):
        server.faults["/generate"] = [500]
        with pytest.raises(Unavailable, match="500"):
            await engine.generate(ask("half", n=3, tokens=8000))
        assert len(server.aborted) == 2
        async with asyncio.timeout(10):
            while server.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_another_tokenizer_is_refused() -> None:
    server = SglangStandIn(default_model(), TOKENIZER)
    async with serving(server.app()) as url:
        server.shift = 1
        engine = SglangEngine(options(url), TOKENIZER, 2)
        with pytest.raises(FailedPrecondition, match="tokenizes otherwise"):
            await engine.start()
        await engine.close()
        server.faults["/tokenize"] = [404]
        server.context_length = None
        engine = SglangEngine(options(url), TOKENIZER, 2)
        await engine.start()
        assert engine.info.context_length == 4096
        await engine.close()


def test_sglang_needs_the_folder_of_its_model() -> None:
    with pytest.raises(ValueError, match="model: is needed by engine sglang"):
        PolicySettings(engine="sglang", sglang_urls="http://x")


@pytest.mark.parametrize("url", ["10.0.0.3:30000", "ftp://a", "http://", "http://[a", "http://a:b"])
def test_what_is_no_address_is_refused_and_not_waited_for(url: str) -> None:
    with pytest.raises(ValueError, match=f"sglang_urls: {re.escape(repr(url))} is no address"):
        PolicySettings(engine="sglang", model="/m", sglang_urls=f"http://good:30000, {url}")


def test_the_image_is_of_the_release_that_the_extra_pins() -> None:
    root = Path(__file__).resolve().parents[3]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    release = extras["sglang"][0].removeprefix("sglang==")
    image = (root / "infra" / "docker" / "sglang.Dockerfile").read_text()
    assert f"ARG BASE_IMAGE=lmsysorg/sglang:v{release}\n" in image
