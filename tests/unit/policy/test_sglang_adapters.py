"""Adapters in place of weights: which are used, how they are switched, what becomes of old ones."""

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import Completion, Request, Sampling
from policy_svc.engines.sglang import SglangEngine, SglangOptions
from regreen.rpc.errors import DataLoss, FailedPrecondition, InvalidArgument
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model
from tests.fixtures.policy.sglang_standin import SglangStandIn

TOKENIZER = Tokenizer(default_model())


@asynccontextmanager
async def replicas(*, on: bool = True) -> AsyncIterator[tuple[SglangEngine, list[SglangStandIn]]]:
    """Two servers before an engine, which loads adapters or not."""
    servers = [SglangStandIn(default_model(), TOKENIZER) for _ in range(2)]
    async with (
        asyncio.timeout(60),
        serving(servers[0].app()) as first,
        serving(servers[1].app()) as second,
    ):
        base = default_model() if on else None
        options = SglangOptions((first, second), 4096, retry_s=2.0, base=base)
        engine = SglangEngine(options, TOKENIZER, 2)
        await engine.start()
        yield engine, servers
        await engine.close()


def version(place: Path, content: bytes, base: Path | None = None) -> Path:
    """A version's folder as the learner leaves it: whole weights, and the adapter."""
    folder = place / hashlib.sha256(content).hexdigest()[:8]
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj"]}
    told["base_model_name_or_path"] = str(base or default_model())
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    notes = {"format": "pt", "adapter_sha256": hashlib.sha256(content).hexdigest()}
    header = json.dumps({"__metadata__": notes}).encode()
    whole = len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(whole)
    return folder


async def sample(engine: SglangEngine, rid: str, tokens: int = 4) -> Completion:
    request = Request(rid, (1, 520), 1, Sampling(max_new_tokens=tokens, seed=9))
    (completion,) = (await engine.generate(request)).completions
    return completion


def routes(server: SglangStandIn) -> list[str]:
    return [route for route, _ in server.calls if "tokenize" not in route]


async def unloaded(servers: list[SglangStandIn], count: int) -> None:
    while any(len(server.adapters) != count for server in servers):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_requests_go_on_with_the_adapter_that_they_began_with(tmp_path: Path) -> None:
    async with replicas() as (engine, servers):
        base = await sample(engine, "base")
        await engine.load(1, version(tmp_path, b"one"))
        began = asyncio.create_task(sample(engine, "old", 300))
        await asyncio.sleep(0.05)
        await engine.load(2, version(tmp_path, b"two"))
        new = await sample(engine, "new")
        assert not began.done(), "nothing waited for it"
        old = await began
        assert [span.version for span in old.versions] == [1]
        assert [span.version for span in new.versions] == [2]
        assert base.token_ids != new.token_ids != old.token_ids[: len(new.token_ids)]
        await unloaded(servers, 1)
        for server in servers:
            assert "/update_weights_from_disk" not in routes(server)
            assert server.version == "default", "the base is as it was"


async def test_all_replicas_have_an_adapter_or_none(tmp_path: Path) -> None:
    async with replicas() as (engine, servers):
        await engine.load(1, version(tmp_path, b"one"))
        servers[1].faults["/load_lora_adapter"] = [400]
        with pytest.raises(FailedPrecondition, match="the adapter was not loaded"):
            await engine.load(2, version(tmp_path, b"two"))
        assert engine.version == 1
        assert [s.version for s in (await sample(engine, "a")).versions] == [1]
        await unloaded(servers, 1)
        await engine.load(2, tmp_path / version_name(b"two"))
        assert [s.version for s in (await sample(engine, "b")).versions] == [2]


def version_name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


async def test_a_server_that_was_begun_anew_is_told_again(tmp_path: Path) -> None:
    async with replicas() as (engine, servers):
        await engine.load(1, version(tmp_path, b"one"))
        for server in servers:
            server.adapters.clear()
        assert [s.version for s in (await sample(engine, "a")).versions] == [1]
        assert sorted(len(server.adapters) for server in servers) == [0, 1]
        wrong = Request("b", (1,), 1, Sampling(max_new_tokens=4, top_p=2.0))
        with pytest.raises(InvalidArgument, match="top_p"):
            await engine.generate(wrong)


async def test_an_adapter_that_is_being_loaded_is_not_unloaded(tmp_path: Path) -> None:
    """A request that ends while a version is loaded retires what is old alone."""
    async with replicas() as (engine, servers):
        await engine.load(1, version(tmp_path, b"one"))
        servers[1].hold_loads.clear()
        loading = asyncio.create_task(engine.load(2, version(tmp_path, b"two")))
        while len(servers[0].adapters) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert [s.version for s in (await sample(engine, "a")).versions] == [1]
        servers[1].hold_loads.set()
        await loading
        await unloaded(servers, 1)
        assert [s.version for s in (await sample(engine, "b")).versions] == [2]
        assert all(len(server.adapters) == 1 for server in servers)


async def test_adapters_do_not_stand_on_what_was_pushed_before(tmp_path: Path) -> None:
    async with replicas() as (engine, servers):
        servers[1].version = "7"  # of a policy that ran before this one
        options = SglangOptions(engine._options.urls, 4096, base=default_model())
        again = SglangEngine(options, TOKENIZER, 2)
        await again.start()
        await again.load(8, version(tmp_path, b"one"))
        assert [server.version for server in servers] == ["8", "8"]
        assert not servers[0].adapters
        await again.close()


async def test_a_policy_that_was_begun_anew_finds_its_adapter_loaded(tmp_path: Path) -> None:
    async with replicas() as (engine, (server, _)):
        folder = version(tmp_path, b"one")
        await engine.load(1, folder)
        options = SglangOptions(engine._options.urls, 4096, base=default_model())
        again = SglangEngine(options, TOKENIZER, 2)
        await again.start()
        await again.load(1, folder)
        assert [s.version for s in (await sample(again, "a")).versions] == [1]
        assert len(server.adapters) == 1
        await again.close()


@pytest.mark.parametrize("why", ["off", "other base", "no adapter"])
async def test_whole_weights_are_pushed_where_no_adapter_fits(tmp_path: Path, why: str) -> None:
    async with replicas(on=why != "off") as (engine, servers):
        other = tmp_path if why == "other base" else None
        folder = version(tmp_path, b"one", other)
        if why == "no adapter":
            shutil.rmtree(folder / "adapter")
        await engine.load(1, folder)
        assert [server.version for server in servers] == ["1", "1"]
        assert not servers[0].adapters
        # The servers hold other weights now than adapters stand on.
        await engine.load(2, version(tmp_path, b"two"))
        assert [server.version for server in servers] == ["2", "2"]


async def test_weights_wait_for_requests_that_sample_from_an_adapter(tmp_path: Path) -> None:
    async with replicas() as (engine, servers):
        await engine.load(1, version(tmp_path, b"one"))
        began = asyncio.create_task(sample(engine, "old", 100))
        await asyncio.sleep(0.05)
        await engine.load(2, version(tmp_path, b"two", tmp_path))
        assert began.done()
        assert [s.version for s in (await began).versions] == [1]
        assert [s.version for s in (await sample(engine, "new")).versions] == [2]
        await unloaded(servers, 0)


async def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    async with replicas() as (engine, servers):
        folder = version(tmp_path, b"one")
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"onf")
        with pytest.raises(DataLoss, match="has the digest"):
            await engine.load(1, folder)
        (folder / "model.safetensors").write_bytes(b"{")
        with pytest.raises(DataLoss, match="cannot be read"):
            await engine.load(1, folder)
        assert not servers[0].adapters
        assert engine.version == 0
