"""The policy service with certificates and tokens: its HTTP endpoint, the judge that calls it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from judge_svc.models.policy import PolicyModel
from regreen.rpc.errors import Unavailable
from regreen.tokens import TokenFile
from tests.fixtures.certs import Certs
from tests.integration.policy.test_policy_service import http_client, service

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
