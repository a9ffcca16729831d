"""`regreen up --tls --tokens`: the commands of the home are let in, and nobody else."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from regreen.client.access import Access
from regreen.client.channel import connect
from regreen.dataset import v1 as pb
from tests.e2e.conftest import Local


@pytest.fixture(scope="module")
def secure(local: Local) -> Iterator[Local]:
    """Dataset and judge alone, with certificates and tokens."""
    home = Path(tempfile.mkdtemp(prefix="regreen-secure-"))
    home.chmod(0o711)
    found = replace(local, home=home)
    try:
        words = ("--ports", "any", "--only", "dataset", "--only", "judge", "--tls", "--tokens")
        up = found.cli("up", *words, "--json")
        assert up.returncode == 0, up.stderr
        assert [row["state"] for row in json.loads(up.stdout)] == ["serving", "serving"]
        yield found
    finally:
        found.cli("down")
        shutil.rmtree(home, ignore_errors=True)


def test_the_commands_of_the_home_are_let_in(secure: Local) -> None:
    assert {row["state"] for row in secure.rows().values()} == {"serving"}
    listed = secure.cli("tasks", "stats", "--json")
    assert listed.returncode == 0, listed.stderr
    shown = secure.cli("certs", "show", "--json")
    names = [json.loads(line)["name"] for line in shown.stdout.splitlines()]
    assert names == ["authority", "client", "dataset", "judge"]
    tokens = [
        json.loads(line) for line in secure.cli("tokens", "list", "--json").stdout.splitlines()
    ]
    assert [(row["name"], row["state"]) for row in tokens] == [
        ("commands", "holds"),
        ("judge", "holds"),
    ]
    quotas = secure.cli("quotas", "list", "--json")
    assert (quotas.returncode, quotas.stdout, quotas.stderr) == (0, "", ""), "no tenant has any"
    text = (secure.home / "client.token").read_text().strip().split("_", 2)[2]
    for path in [*(secure.home / "logs").iterdir(), secure.home / "run" / "stack.json"]:
        assert text not in path.read_text(errors="replace")
    again = secure.cli("up", "--only", "dataset", "--only", "judge", "--tls", "--json")
    assert again.returncode == 0, again.stderr
    for wrong in ("--no-tls", "--no-tokens"):
        refused = secure.cli("up", "--only", "dataset", "--only", "judge", wrong)
        assert refused.returncode == 1
        assert "the stack runs with " in refused.stderr


async def test_nobody_else_is(secure: Local) -> None:
    address = secure.rows()["dataset"]["address"]
    certs = str(secure.home / "certs" / "client")
    for access, code in (
        (Access(), grpc.StatusCode.UNAVAILABLE),
        (Access.of(certs), grpc.StatusCode.UNAUTHENTICATED),
        (Access.of(certs, str(secure.home / "judge.token")), grpc.StatusCode.PERMISSION_DENIED),
    ):
        async with connect(address, access) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await pb.TaskServiceStub(channel).ListTasks(pb.ListTasksRequest(), timeout=30)
            assert refused.value.code() is code


def test_certificates_and_tokens_are_renewed_while_it_runs(secure: Local) -> None:
    assert secure.cli("certs", "renew", "--ca").returncode == 0
    assert secure.cli("tasks", "stats").returncode == 0
    assert secure.cli("certs", "renew").returncode == 0
    assert secure.cli("tasks", "stats").returncode == 0
    assert secure.cli("certs", "retire").returncode == 0
    assert secure.cli("tasks", "stats").returncode == 0
    (first, _) = [
        json.loads(line) for line in secure.cli("tokens", "list", "--json").stdout.splitlines()
    ]
    assert secure.cli("tokens", "revoke", first["id"]).returncode == 0
    refused = secure.cli("tasks", "stats")
    assert refused.returncode == 1
    assert f"token {first['id']} was revoked" in " ".join(refused.stderr.split())
    out = secure.home / "client.token"
    out.unlink()
    made = secure.cli("tokens", "create", "new", "--scope", "dataset:read", "--out", str(out))
    assert made.returncode == 0, made.stderr
    assert secure.cli("tasks", "stats").returncode == 0
    audit = [
        json.loads(line)
        for line in (secure.home / "audit" / "dataset.jsonl").read_text().splitlines()
    ]
    assert all(row["peer"] == "client" for row in audit)
