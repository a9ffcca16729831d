"""Weights by a process group: a real sender, real ranks over gloo; bytes, and failures."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner_svc.checkpoint import FileEntry
from learner_svc.offers import Offers
from learner_svc.published import Position, Published
from policy_svc.chat import Tokenizer
from policy_svc.engines.base import Completion, Offer, Request, Sampling
from policy_svc.engines.sglang import SglangEngine, SglangOptions
from policy_svc.versions import PolicyVersion, Serving, Versions, WeightSource
from regreen.blobs import digest_of
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model
from tests.fixtures.policy.sglang_standin import SglangStandIn

JOIN, TAKE = "/init_weights_update_group", "/update_weights_from_distributed"
DISK = "/update_weights_from_disk"


@pytest.fixture
async def servers() -> AsyncIterator[list[tuple[SglangStandIn, str]]]:
    tokenizer = Tokenizer(default_model())
    found = [SglangStandIn(default_model(), tokenizer, release="0.5.16") for _ in range(2)]
    await asyncio.gather(*(server.rank(do="checksum") for server in found))  # they are there
    async with serving(found[0].app()) as one, serving(found[1].app()) as two:
        yield [(found[0], one), (found[1], two)]
    for server in found:
        await server.close()


@pytest.fixture
async def versions(
    servers: list[tuple[SglangStandIn, str]], tmp_path: Path
) -> AsyncIterator[Versions]:
    options = SglangOptions(tuple(url for _, url in servers), 4096, retry_s=1.0)
    engine = SglangEngine(options, Tokenizer(default_model()), 2)
    await engine.start()
    source = WeightSource(default_model(), tmp_path / "fetched")
    serving = Serving(PolicyVersion(), default_model(), 0.0)
    yield Versions(engine, source, tmp_path / "serving.json", serving)
    await engine.close()


@pytest.fixture
async def offers() -> AsyncIterator[Offers]:
    found = Offers("127.0.0.1")
    yield found
    await found.close()


def written(folder: Path) -> Published:
    """Weights of several types, more than one part of them, as a learner publishes them."""
    folder.mkdir()
    made = {
        "a.weight": torch.randn(64, 33).bfloat16(),
        "b.weight": torch.randn(7, 5),
        "c.weight": torch.randn(129).half(),
        "d.index": torch.arange(9),
    }
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    digest = digest_of((folder / "model.safetensors").read_bytes())
    entry = FileEntry(digest.sha256, digest.size_bytes)
    return Published(folder, Position("run", 1, 7), entry, "")


async def offered(offers: Offers, published: Published) -> tuple[PolicyVersion, Offer]:
    made = await offers.make(published, 2)
    waiting = made.waiting
    tensors = tuple((name, dtype, tuple(shape)) for name, dtype, shape in waiting.tensors)
    sha256 = published.entry.sha256
    where = (made.host, waiting.port, made.group, waiting.backend)
    policy = PolicyVersion(7, str(published.path), sha256, published.entry.size_bytes, "run", 1)
    return policy, Offer(*where, made.receivers, tensors, sha256)


def routes(server: SglangStandIn) -> list[str]:
    return [route for route, _ in server.calls if route in (JOIN, TAKE, DISK)]


async def sample(versions: Versions) -> Completion:
    request = Request("r", (1, 520), 1, Sampling(max_new_tokens=4, seed=9))
    (completion,) = (await versions._engine.generate(request)).completions
    return completion


@pytest.mark.parametrize("part_bytes", [512 << 20, 1000])
async def test_every_server_has_the_very_bytes(
    versions: Versions,
    servers: list[tuple[SglangStandIn, str]],
    offers: Offers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part_bytes: int,
) -> None:
    monkeypatch.setattr("policy_svc.engines.sglang_receive._PART_BYTES", part_bytes)
    published = written(tmp_path / "v7")
    assert versions._engine.info.receivers == 2
    policy, offer = await offered(offers, published)
    await versions.load(policy, offer=offer)
    assert versions.serving.policy == policy
    sent = load_file(published.file)
    parts = 1 if part_bytes > 1000 else 4
    for number, (server, _) in enumerate(servers):
        assert routes(server) == [JOIN, *[TAKE] * parts]
        assert (server.version, server.weights) == ("7", "received")
        await server.rank(do="dump", path=str(tmp_path / f"{number}.safetensors"))
        found = load_file(tmp_path / f"{number}.safetensors")
        assert found.keys() == sent.keys()
        for name, tensor in sent.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert [span.version for span in (await sample(versions)).versions] == [7]
    # And again: groups were left, and the next sender takes the place of this one.
    policy, offer = await offered(offers, published)
    policy = PolicyVersion(8, policy.uri, policy.sha256, policy.size_bytes, "run", 2)
    await versions.load(policy, offer=offer)
    assert [server.version for server, _ in servers] == ["8", "8"]


@pytest.mark.parametrize(
    ("fault", "restored"),
    [
        ({"faults": {JOIN: [400]}}, 0),
        ({"faults": {TAKE: [400]}}, 1),
        ({"dies_at": TAKE}, 1),
        ({"received_other": True}, 1),
    ],
)
async def test_what_does_not_come_to_all_is_read_by_all(
    versions: Versions,
    servers: list[tuple[SglangStandIn, str]],
    offers: Offers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, Any],
    restored: int,
) -> None:
    published = written(tmp_path / "v7")
    policy, offer = await offered(offers, published)
    broken = servers[1][0]
    broken.faults.update(fault.get("faults", {}))
    broken.dies_at = fault.get("dies_at", "")
    broken.received_other = fault.get("received_other", False)
    ending = asyncio.create_task(_end_soon(offers)) if broken.faults else None
    await versions.load(policy, offer=offer)
    if ending:
        await ending
    assert "not received, to be read" in capsys.readouterr().out
    assert versions.serving.policy == policy
    for server, _ in servers:
        reads = [body for route, body in server.calls if route == DISK]
        old = {"path": str(default_model()), "label": "default"}
        told = [{"path": b["model_path"], "label": b["weight_version"]} for b in reads]
        assert told == [*[old] * restored, {"path": str(published.path), "label": "7"}]
        assert (server.version, server.weights) == ("7", str(published.path))
    assert [span.version for span in (await sample(versions)).versions] == [7]


async def _end_soon(offers: Offers) -> None:
    """A sender whose receivers do not all come ends by itself after a minute; here, sooner."""
    await asyncio.sleep(3.0)
    await offers.close()


async def test_what_can_neither_be_received_nor_read_leaves_the_old_version(
    versions: Versions, servers: list[tuple[SglangStandIn, str]], offers: Offers, tmp_path: Path
) -> None:
    policy, offer = await offered(offers, written(tmp_path / "v7"))
    servers[1][0].received_other = True
    servers[1][0].faults[DISK] = [200, 400]
    with pytest.raises(FailedPrecondition, match="not loaded"):
        await versions.load(policy, offer=offer)
    assert versions.serving.policy.version == 0
    assert [server.weights for server, _ in servers] == [str(default_model())] * 2
    assert [span.version for span in (await sample(versions)).versions] == [0]


async def test_offers_of_other_weights_or_to_nobody_are_refused(
    versions: Versions, offers: Offers, tmp_path: Path
) -> None:
    published = written(tmp_path / "v7")
    policy, offer = await offered(offers, published)
    other = PolicyVersion(7, policy.uri, "0" * 64, 1, "run", 1)
    with pytest.raises(InvalidArgument, match=r"^offer.digest"):
        await versions.load(other, offer=offer)
    with pytest.raises(InvalidArgument, match=r"^receivers"):
        await offers.make(published, 0)
