"""The policy service with certificates and tokens: its HTTP endpoint, the judge that calls it."""

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from judge_svc.models.policy import PolicyModel
from policy_svc.__main__ import Running
from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.policy import PolicyClient
from regreen.policy import v1 as pb
from regreen.rpc import tenants
from regreen.rpc.errors import PermissionDenied, ResourceExhausted, Unavailable
from regreen.rpc.tokens import Caller, acting_as
from regreen.tokens import TokenFile
from tests.fixtures.certs import Certs
from tests.integration.policy.test_policy_service import HELLO, http_client, service

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def token(file: TokenFile, scope: str, tenant: str = "a") -> str:
    return file.create("test", [scope], tenant, timedelta(days=1), datetime.now(UTC))[1]


async def test_http_takes_tokens_and_keeps_tenants_sessions_apart(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    ours, theirs = token(file, "policy:write"), token(file, "policy:write", "b")
    weak = token(file, "policy:read")
    async with service(tmp_path, tokens=file.path, http_key="secret") as found:
        for given, status in (("", 401), ("Bearer secret", 401), (f"Bearer {weak}", 403)):
            async with http_client(found, authorization=given) as http:
                assert (await http.get("models")).status_code == status
                assert (await http.post("chat/completions", json=CHAT)).status_code == status
        session = {"x-regreen-session": "build-1"}
        async with http_client(found, authorization=f"Bearer {ours}", **session) as http:
            answered = await http.post("chat/completions", json=CHAT)
            assert answered.status_code == 200, answered.text
            record = (await http.get("sessions/build-1")).json()
            assert (record["session_id"], len(record["branches"])) == ("build-1", 1)
        async with http_client(found, authorization=f"Bearer {theirs}", **session) as http:
            assert (await http.get("sessions/build-1")).status_code == 404
            assert (await http.delete("sessions/build-1")).status_code == 204
        async with http_client(found, authorization=f"Bearer {ours}") as http:
            assert (await http.get("sessions/build-1")).status_code == 200


async def test_what_changes_something_over_http_is_told_before_and_after(tmp_path: Path) -> None:
    file, audit = TokenFile(tmp_path / "tokens.json"), tmp_path / "audit.jsonl"
    ours = token(file, "policy:write")
    async with service(tmp_path, tokens=file.path, audit=audit) as found:
        headers = {"authorization": f"Bearer {ours}", "x-regreen-session": "build-1"}
        async with http_client(found, **headers) as http:
            assert (await http.get("sessions/build-1")).status_code == 404
            assert audit.read_text() == "", "what only reads has no line"
            made = await http.post("chat/completions", json=CHAT)
            streamed = await http.post("chat/completions", json={**CHAT, "stream": True})
            assert (made.status_code, streamed.status_code) == (200, 200)
            assert (await http.post("chat/completions", json={"messages": 1})).status_code == 400
            assert (await http.delete("sessions/build-1")).status_code == 204
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    chat, delete = "POST /v1/chat/completions", "DELETE /v1/sessions/{session_id:path}"
    told = [(line["audit"], line["method"], line.get("code")) for line in lines]
    assert told == [
        ("begun", chat, None),
        ("ended", chat, "OK"),
        ("begun", chat, None),
        ("ended", chat, "OK"),
        ("begun", delete, None),
        ("ended", delete, "OK"),
    ]
    assert {(line["tenant"], line["peer"]) for line in lines} == {("a", "127.0.0.1")}
    assert lines[0]["request_id"] == made.json()["id"]
    assert ours not in audit.read_text()


async def test_over_http_nothing_is_done_that_cannot_be_told(tmp_path: Path) -> None:
    async with service(tmp_path, audit=Path("/dev/full")) as found, http_client(found) as http:
        for body in (CHAT, {**CHAT, "stream": True}):
            refused = await http.post("chat/completions", json={**body, "user": "build-1"})
            assert refused.status_code == 429, refused.text
            assert "audit: /dev/full cannot be written" in refused.text
        assert (await http.delete("sessions/build-1")).status_code == 429
        assert (await http.get("sessions/build-1")).status_code == 404


async def test_the_judges_model_shows_certificate_and_token(tmp_path: Path) -> None:
    certs, file = Certs.make(tmp_path / "certs"), TokenFile(tmp_path / "tokens.json")
    certs.service("judge")
    (tmp_path / "token").write_text(token(file, "policy:write"))
    async with service(tmp_path, tokens=file.path, **certs.settings()) as found:
        for tls, token_file, let_in in (
            (certs.tls("judge"), tmp_path / "token", True),
            (certs.tls("judge"), None, False),
            (None, None, False),
        ):
            model = PolicyModel(
                found.server.address, tls=tls, token_file=token_file, max_tokens=16, patience_s=0.0
            )
            try:
                if let_in:
                    assert await model.name() == "policy:script@0"
                    assert await model.complete("be brief", "hello", timeout_s=30)
                else:
                    with pytest.raises(Unavailable):
                        await model.name()
            finally:
                await model.close()


async def test_tokens_of_a_day_are_bounded_by_tenant_and_outlive_a_restart(tmp_path: Path) -> None:
    file, quotas = TokenFile(tmp_path / "tokens.json"), tmp_path / "quotas.toml"
    quotas.write_text("[default]\ntokens_per_day = 8\n")
    ours, theirs = token(file, "policy:write"), token(file, "policy:write", "b")
    (tmp_path / "ours").write_text(ours)
    for start in range(2):
        async with service(tmp_path, tokens=file.path, quotas=quotas) as found:
            async with http_client(found, authorization=f"Bearer {ours}") as http:
                first = await http.post("chat/completions", json={**CHAT, "stream": True})
                assert first.status_code == (429 if start else 200), first.text
                refused = await http.post("chat/completions", json=CHAT)
                assert refused.status_code == 429
                assert "quota tokens_per_day of tenant a is 8" in refused.text
                assert 0 < int(refused.headers["retry-after"]) <= 86400
            access = Access(token_file=tmp_path / "ours")
            async with connect(found.server.address, access) as channel:
                with pytest.raises(ResourceExhausted) as caught:
                    await PolicyClient(channel).generate(
                        [1], sampling=pb.Sampling(max_new_tokens=8)
                    )
                assert caught.value.metadata["quota"] == "tokens_per_day"
            if start:
                async with http_client(found, authorization=f"Bearer {theirs}") as http:
                    assert (await http.post("chat/completions", json=CHAT)).status_code == 200


_CALL = """
import asyncio, sys
from pathlib import Path
from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.client.policy import PolicyClient
from regreen.policy import v1 as pb

async def main():
    async with connect(sys.argv[1], Access(token_file=Path(sys.argv[2]))) as channel:
        policy = PolicyClient(channel)
        ask = [pb.ChatMessage(role="user", content="hello")]
        prompt = (await policy.render_chat(ask)).token_ids
        await policy.generate(prompt, sampling=pb.Sampling(temperature=1.0, max_new_tokens=600))

asyncio.run(main())
"""


async def test_what_is_sampled_for_a_tenant_is_charged_to_it_by_who_may(tmp_path: Path) -> None:
    file, quotas = TokenFile(tmp_path / "tokens.json"), tmp_path / "quotas.toml"
    quotas.write_text("[default]\n[tenants.a]\ntokens_per_day = 8\n")
    for tenant in ("*", "a", "b"):
        (tmp_path / f"of-{tenant}").write_text(token(file, "policy:write", tenant))
    asked = pb.Sampling(max_new_tokens=6)
    async with service(tmp_path, tokens=file.path, quotas=quotas) as found:

        async def sample(tenant: str, charged: str) -> int:
            access = Access(token_file=tmp_path / f"of-{tenant}")
            async with connect(found.server.address, access) as channel:
                client = PolicyClient(channel, patience_s=0.0)
                with tenants.charging(charged):
                    (made,) = (await client.generate([1], sampling=asked)).completions
                return len(made.token_ids)

        async def seen(tenant: str) -> dict[str, tuple[int, int]]:
            access = Access(token_file=tmp_path / f"of-{tenant}")
            async with connect(found.server.address, access) as channel:
                listed = await PolicyClient(channel, patience_s=0.0).list_quotas()
                return {use.tenant: (use.used, use.bound) for use in listed}

        for nobody in ("", "b"):
            assert await sample("*", nobody)
        used = await sample("*", "a")
        assert found.policy.usage._tokens["a"] == used > 2
        assert await seen("a") == {"a": (used, 8)}
        assert (await seen("*")).keys() == {"a", "b"}
        for who in ("*", "a"):  # what is sampled for it and by it is one sum
            with pytest.raises(ResourceExhausted, match="tokens_per_day of tenant a is 8"):
                await sample(who, "a")
        for who, other in (("a", "b"), ("b", "a"), ("a", "*")):
            with pytest.raises(PermissionDenied, match="may charge no other"):
                await sample(who, other)
        bearer = {"authorization": f"Bearer {(tmp_path / 'of-b').read_text()}"}
        async with http_client(found, **bearer, **{tenants.CHARGED: "a"}) as http:
            assert (await http.post("chat/completions", json=CHAT)).status_code == 403
        bearer = {"authorization": f"Bearer {(tmp_path / 'of-*').read_text()}"}
        async with http_client(found, **bearer, **{tenants.CHARGED: "a"}) as http:
            assert (await http.post("chat/completions", json=CHAT)).status_code == 429
        async with http_client(found, **bearer) as http:
            assert (await http.post("chat/completions", json=CHAT)).status_code == 200


async def test_the_judge_samples_for_whom_it_judges(tmp_path: Path) -> None:
    file, quotas = TokenFile(tmp_path / "tokens.json"), tmp_path / "quotas.toml"
    quotas.write_text("[tenants.a]\ntokens_per_day = 4\n")
    (tmp_path / "judge").write_text(token(file, "policy:write", "*"))
    async with service(tmp_path, tokens=file.path, quotas=quotas) as found:
        model = PolicyModel(
            found.server.address, token_file=tmp_path / "judge", max_tokens=5, patience_s=0.0
        )
        try:
            for tenant in ("", "b"):
                with acting_as(Caller("*", "0123456789ab", tenant)):
                    assert await model.complete("be brief", "hello", timeout_s=30)
            with (
                acting_as(Caller("*", "0123456789ab", "a")),
                pytest.raises(Unavailable, match="tokens_per_day of tenant a is 4"),
            ):
                await model.complete("be brief", "hello", timeout_s=30)
        finally:
            await model.close()


async def test_generations_at_a_time_have_one_quota_together(tmp_path: Path) -> None:
    file, quotas, script = (tmp_path / name for name in ("tokens.json", "quotas.toml", "slow.json"))
    quotas.write_text("[default]\ntokens_per_day = 1000\n")
    script.write_text(json.dumps({"responses": [{"text": "slow " * 300, "delay_s": 0.1}]}))
    ours = tmp_path / "ours"
    ours.write_text(token(TokenFile(file), "policy:write"))
    async with service(tmp_path, tokens=file, quotas=quotas, script=script) as found:
        at, usage = found.server.address, found.policy.usage
        command = [sys.executable, "-c", _CALL, at, str(ours)]
        killed = await asyncio.create_subprocess_exec(*command)
        await running(found, 1)
        first = set(found.policy._running)
        async with connect(at, Access(token_file=ours)) as channel:
            asked = pb.Sampling(temperature=1.0, max_new_tokens=600)
            prompt = (await PolicyClient(channel).render_chat(HELLO)).token_ids
            hasty, patient = PolicyClient(channel, patience_s=0.0), PolicyClient(channel)
            calls = [hasty.generate(prompt, sampling=asked) for _ in range(5)]
            for refused in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(refused, ResourceExhausted), refused
                assert "600 of the 1000 that are left are held" in refused.message
                assert refused.retry_after_s == 1.0
            waits = asyncio.create_task(patient.generate(prompt, sampling=asked))
            killed.kill()  # what it held is free, and the next takes it
            await killed.wait()
            while set(found.policy._running) in (first, set()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert usage._held == {"a": 600}
            assert await found.policy.abort(None) == 1
            (sample,) = (await waits).completions
            assert not usage._held
            assert usage._tokens == {"a": len(sample.token_ids)}


async def running(found: Running, count: int) -> None:
    """Return when so many generations run."""
    while found.policy._admission.running != count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_nobody_aborts_another_tenants_generations(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    for name in ("a", "b"):
        (tmp_path / name).write_text(token(file, "policy:write", name))
    async with service(tmp_path, tokens=file.path) as found:
        at = found.server.address
        async with (
            connect(at, Access(token_file=tmp_path / "a")) as ours,
            connect(at, Access(token_file=tmp_path / "b")) as theirs,
        ):
            ask = pb.ChatMessage(role="user", content="take your time")
            rendered = await PolicyClient(ours).render_chat([ask])
            mine, other = pb.PolicyServiceStub(ours), pb.PolicyServiceStub(theirs)
            call = mine.Generate(
                pb.GenerateRequest(
                    request_id="one",
                    prompt_token_ids=rendered.token_ids,
                    sampling=pb.Sampling(temperature=1.0, max_new_tokens=4000),
                ),
                timeout=60,
            )
            await running(found, 1)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await other.AbortGeneration(pb.AbortGenerationRequest(generate_request_id="one"))
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            everything = pb.AbortGenerationRequest(all=True)
            assert (await other.AbortGeneration(everything)).aborted == 0
            one = pb.AbortGenerationRequest(generate_request_id="one")
            assert (await mine.AbortGeneration(one)).aborted == 1
            (sample,) = (await call).completions
            assert sample.finish_reason == pb.FINISH_REASON_ABORT
