"""The whole service over the wire: gRPC, the HTTP endpoint, versions, and death of its engine."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from policy_svc.__main__ import Running, running
from policy_svc.chat import Message, plain_text
from policy_svc.engines.process import ProcessEngine
from policy_svc.settings import PolicySettings
from regreen.blobs import open_blobs
from regreen.client.channel import connect
from regreen.client.policy import PolicyClient
from regreen.common.v1 import Digest
from regreen.policy import v1 as pb
from regreen.rpc.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegreenError,
    ResourceExhausted,
    Unavailable,
)
from tests.fixtures.policy.model import default_model, write_other_weights

SCRIPT = {
    "responses": [
        {"text": "slow " * 300, "when": "take your time", "delay_s": 0.002},
        {"texts": ["Hello.", "Good day."], "turn": 0},
        {"text": "Second turn.", "turn": 1},
        {"text": "And so on."},
    ]
}
HELLO = [pb.ChatMessage(role="user", content="hello")]


@asynccontextmanager
async def service(tmp_path: Path, **overrides: Any) -> AsyncIterator[Running]:
    script = tmp_path / "script.json"
    script.write_text(json.dumps(SCRIPT))
    values = {
        "home": tmp_path,
        "listen": "127.0.0.1:0",
        "metrics": "127.0.0.1:0",
        "http": "127.0.0.1:0",
        "engine": "scripted",
        "script": script,
        "model": default_model(),
        "drain_s": 1.0,
    }
    async with running(PolicySettings(**(values | overrides))) as found:
        yield found


@asynccontextmanager
async def client(found: Running) -> AsyncIterator[PolicyClient]:
    async with connect(found.server.address) as channel:
        yield PolicyClient(channel, patience_s=0.0)


def http_client(found: Running, **headers: str) -> httpx.AsyncClient:
    url = f"http://127.0.0.1:{found.http_port}/v1/"
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=30)


def sampling(**values: Any) -> pb.Sampling:
    return pb.Sampling(**{"temperature": 1.0, "max_new_tokens": 600, **values})


async def test_two_turns_keep_the_exact_tokens(tmp_path: Path) -> None:
    async with service(tmp_path) as found, client(found) as policy:
        first = await policy.render_chat(HELLO)
        made = await policy.generate(first.token_ids, sampling=sampling(), n=2)
        assert [c.text for c in made.completions] == ["Hello.", "Good day."]
        sampled = made.completions[1].token_ids
        assert sampled[-1] == (await policy.get_policy()).end_of_turn_id
        delta = await policy.render_chat(
            [pb.ChatMessage(role="user", content="more")],
            continues=True,
            last_token_id=sampled[-1],
        )
        prompt = [*first.token_ids, *sampled, *delta.token_ids]
        again = await policy.generate(prompt, sampling=sampling())
        assert again.completions[0].text == "Second turn."
        shown = await policy.tokenize(token_ids=prompt)
        assert shown.text == first.text + "Good day.<|im_end|>" + delta.text


async def test_bad_requests_are_named_on_the_wire(tmp_path: Path) -> None:
    async with service(tmp_path) as found, client(found) as policy:
        with pytest.raises(InvalidArgument) as caught:
            await policy.generate([1, 99999999], sampling=sampling())
        assert caught.value.field == "prompt_token_ids[1]"
        with pytest.raises(InvalidArgument) as caught:
            await policy.generate([1], sampling=pb.Sampling())
        assert caught.value.field == "sampling.max_new_tokens"
        with pytest.raises(InvalidArgument):
            await policy.tokenize()
        with pytest.raises(InvalidArgument):
            await policy.render_chat([])
        with pytest.raises(Aborted):
            await policy.generate([1], sampling=sampling(), min_version=1)


async def test_a_request_id_is_answered_once(tmp_path: Path) -> None:
    async with service(tmp_path) as found, client(found) as policy:
        prompt = (await policy.render_chat(HELLO)).token_ids
        call = [policy.generate(prompt, sampling=sampling(), request_id="same") for _ in range(3)]
        first, *others = await asyncio.gather(*call)
        assert all(other == first for other in others)


async def test_abort_and_pause(tmp_path: Path) -> None:
    async with service(tmp_path) as found, client(found) as policy:
        slow = [pb.ChatMessage(role="user", content="take your time")]
        prompt = (await policy.render_chat(slow)).token_ids
        call = asyncio.create_task(policy.generate(prompt, sampling=sampling(), request_id="slow"))
        aborted = 0
        while not aborted:
            try:
                aborted = await policy.abort_generation("slow")
            except NotFound:
                continue
        made = await call
        assert made.completions[0].finish_reason == pb.FINISH_REASON_ABORT
        await policy.pause(pb.PAUSE_MODE_DRAIN)
        assert (await policy.get_policy()).paused
        with pytest.raises(FailedPrecondition, match="already paused"):
            await policy.pause(pb.PAUSE_MODE_IN_PLACE)
        with pytest.raises(Unavailable, match="paused"):
            await policy.generate(prompt, sampling=sampling(), timeout_s=0.6)
        await policy.resume()
        await policy.generate(prompt, sampling=sampling(max_new_tokens=2))


async def test_a_full_queue_says_when_to_retry(tmp_path: Path) -> None:
    async with service(tmp_path, max_running=1, max_waiting=0) as found, client(found) as policy:
        slow = [pb.ChatMessage(role="user", content="take your time")]
        prompt = (await policy.render_chat(slow)).token_ids
        calls = [
            asyncio.create_task(policy.generate(prompt, sampling=sampling(max_new_tokens=40)))
            for _ in range(3)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [r for r in results if isinstance(r, ResourceExhausted)]
        assert len(refused) == 2
        assert all(r.retry_after_s for r in refused)


async def test_versions_by_reference(tmp_path: Path) -> None:
    weights = write_other_weights(tmp_path / "checkpoint")
    blobs = open_blobs(tmp_path / "blobs")
    digest = await blobs.put_file(weights / "model.safetensors")
    wire = Digest(sha256=digest.sha256, size_bytes=digest.size_bytes)
    async with service(tmp_path) as found, client(found) as policy:
        first = pb.PolicyVersion(version=1, uri=str(weights), digest=wire, run_id="run")
        assert (await policy.load_version(first)).policy == first
        assert (await policy.load_version(first)).policy == first, "twice is once"
        wrong = Digest(sha256="0" * 64, size_bytes=1)
        bad = pb.PolicyVersion(version=2, uri=str(weights), digest=wrong, run_id="run")
        with pytest.raises(DataLoss):
            await policy.load_version(bad)
        climbing = Digest(sha256="../" * 9 + "etc/x", size_bytes=1)
        bad.digest.CopyFrom(climbing)
        with pytest.raises(InvalidArgument, match=r"policy\.digest\.sha256"):
            await policy.load_version(bad)
        missing = pb.PolicyVersion(version=2, uri=str(tmp_path / "no"), run_id="run")
        with pytest.raises(NotFound):
            await policy.load_version(missing)
        older = pb.PolicyVersion(version=0, uri=str(weights), run_id="run")
        with pytest.raises(FailedPrecondition, match="not newer"):
            await policy.load_version(older)
        assert (await policy.get_policy()).policy == first
        blob = pb.PolicyVersion(
            version=2, uri=(tmp_path / "blobs").as_uri(), digest=wire, run_id="run"
        )
        await policy.load_version(blob)
        made = await policy.generate(
            (await policy.render_chat(HELLO)).token_ids, sampling=sampling(), min_version=2
        )
        assert made.completions[0].versions[0].version == 2
    async with service(tmp_path) as found, client(found) as policy:
        assert (await policy.get_policy()).policy == blob, "a restart serves it again"


@pytest.mark.parametrize("unread", [False, True], ids=["it had read", "a command is unread"])
async def test_a_killed_engine_comes_back(tmp_path: Path, unread: bool) -> None:
    async with (
        service(tmp_path, engine="torch", threads=1) as found,
        client(found) as policy,
    ):
        prompt = (await policy.render_chat(HELLO)).token_ids
        engine = found.policy.engine
        assert isinstance(engine, ProcessEngine)
        process = engine._process
        assert process is not None
        if unread:
            os.kill(process.pid, signal.SIGSTOP)
        call = asyncio.create_task(policy.generate(prompt, sampling=sampling(max_new_tokens=500)))
        while not any(unread or running.samples[0].ids for running in engine._calls.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(Unavailable):
            await call
        async with asyncio.timeout(120):
            while True:
                try:
                    made = await policy.generate(prompt, sampling=sampling(max_new_tokens=2))
                except RegreenError:
                    await asyncio.sleep(0.2)
                else:
                    break
        assert len(made.completions[0].token_ids) == 2


async def test_http_records_exact_tokens(tmp_path: Path) -> None:
    async with service(tmp_path) as found, http_client(found) as http:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "hello"}],
            "user": "s/1",
            "logprobs": True,
        }
        first = (await http.post("chat/completions", json=body)).json()
        choice = first["choices"][0]
        assert choice["message"]["content"] == "Hello."
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["content"]) == first["usage"]["completion_tokens"]
        body["messages"] += [choice["message"], {"role": "user", "content": "more"}]
        second = (await http.post("chat/completions", json=body)).json()
        assert second["choices"][0]["message"]["content"] == "Second turn."
        (branch,) = (await http.get("sessions/s/1")).json()["branches"]
        assert len(branch["token_ids"]) == second["usage"]["total_tokens"]
        lengths = {len(branch[key]) for key in ("token_ids", "mask", "logprobs", "versions")}
        assert lengths == {len(branch["token_ids"])}
        sampled = [t for t, m in zip(branch["token_ids"], branch["mask"], strict=True) if m]
        decode = found.policy.chat.tokenizer.decode
        assert decode(sampled, control=True) == "Hello.<|im_end|>Second turn.<|im_end|>"
        body["messages"][0]["content"] = "rewritten"
        await http.post("chat/completions", json=body)
        branches = (await http.get("sessions/s/1")).json()["branches"]
        assert len(branches) == 2
        assert branches[0] == branch, "rewritten history starts a branch and changes no other"
    async with service(tmp_path) as found, http_client(found) as http:
        assert (await http.get("sessions/s/1")).json()["branches"][0] == branch
        assert (await http.delete("sessions/s/1")).status_code == 204
        assert (await http.get("sessions/s/1")).status_code == 404


async def test_concurrent_requests_of_a_session_record_what_was_shown(tmp_path: Path) -> None:
    async with service(tmp_path) as found, http_client(found) as http:

        async def ask(*texts: str) -> dict[str, Any]:
            roles = ("user", "assistant", "user")
            messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
            body = {"messages": messages, "user": "busy", "max_tokens": 600}
            return (await http.post("chat/completions", json=body)).json()

        await ask("hello")
        # The second waits for the first; the third comes while the second runs. Both of them
        # continue the same branch.
        first = asyncio.create_task(ask("take your time"))
        while not found.policy._admission.running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        second = asyncio.create_task(ask("hello", "Hello.", "take your time, two"))
        await first
        third = ask("hello", "Hello.", "take your time, three")
        usages = [answer["usage"] for answer in await asyncio.gather(second, third)]
        branches = (await http.get("sessions/busy")).json()["branches"]
        chat = found.policy.chat
        for branch in branches:
            said = [Message(**message) for message in branch["messages"]]
            assert f"{chat.text(branch['token_ids'])}\n" == plain_text(said, chat.default_system)
        sizes = {len(branch["token_ids"]) for branch in branches}
        assert {usage["total_tokens"] for usage in usages} <= sizes


async def test_http_streams_what_it_would_return(tmp_path: Path) -> None:
    async with service(tmp_path) as found, http_client(found) as http:
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "n": 2,
            "stream_options": {"include_usage": True},
            "metadata": {"session_id": "streamed"},
        }
        text = (await http.post("chat/completions", json=body)).text
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        texts, reasons = ["", ""], [None, None]
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
        assert texts == ["Hello.", "Good day."]
        assert reasons == ["stop", "stop"]
        assert chunks[-1]["usage"]["completion_tokens"] > 0
        branches = (await http.get("sessions/streamed")).json()["branches"]
        assert [b["messages"][-1]["content"] for b in branches] == texts
        assert [b["parent"] for b in branches] == [None, 0]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 100000}, "sampling.max_new_tokens"),
        ({"n": 1000}, "n"),
        ({"response_format": {"type": "json_object"}}, "sampling.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": 5}},
            "response_format.json_schema",
        ),
        ({"regex": 5}, "regex"),
        ({"regex": "a|b"}, "sampling.regex"),
        ({"stream": True, "n": 2_000_000}, "n"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"stop": [1]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"response_format": "json"}, "response_format"),
        ({"metadata": "x"}, "metadata"),
        ({"metadata": {"session_id": 5}}, "metadata.session_id"),
        ({"stream_options": "x"}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"seed": 1 << 64}, "seed"),
        ({"temperature": 10**400}, "temperature"),
        ({"user": "u" * (8 << 20)}, "body"),
    ],
)
async def test_http_names_what_is_wrong(tmp_path: Path, change: dict[str, Any], param: str) -> None:
    async with service(tmp_path) as found, http_client(found) as http:
        body = {"messages": [{"role": "user", "content": "hello"}]} | change
        answer = await http.post("chat/completions", content=json.dumps(body))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[]"])
async def test_http_refuses_what_is_no_object(tmp_path: Path, content: bytes) -> None:
    async with service(tmp_path) as found, http_client(found) as http:
        answer = await http.post("chat/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")


async def test_http_asks_for_its_key(tmp_path: Path) -> None:
    async with service(tmp_path, http_key="secret") as found:
        async with http_client(found) as http:
            assert (await http.get("models")).status_code == 401
        async with http_client(found, authorization="Bearer secret") as http:
            (model,) = (await http.get("models")).json()["data"]
            assert model["id"] == "script@0"


async def test_a_client_that_leaves_ends_its_request(tmp_path: Path) -> None:
    async with service(tmp_path) as found, http_client(found) as http:
        body = {
            "messages": [{"role": "user", "content": "take your time"}],
            "max_tokens": 600,
            "stream": True,
        }
        async with http.stream("POST", "chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        async with asyncio.timeout(10):
            while found.policy._admission.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
