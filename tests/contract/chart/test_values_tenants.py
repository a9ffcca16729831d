"""What the chart's values say of tenants is what the services keep."""

import re

import pytest

from regreen.rpc.quotas import Quota, read_quotas
from regreen.rpc.scopes import SCOPES, covers
from tests.contract.chart.reading import service_of
from tests.fixtures import chart


def test_quotas_are_read_by_every_service_that_keeps_some(rendered, reader):
    keeping = set()
    for container in chart.containers(rendered["full"]):
        if service_of(container):
            settings = reader.settings(rendered["full"], container)
            if settings.quotas is None:
                continue
            keeping.add(container["name"])
            default, tenants = read_quotas(settings.quotas)
            assert default == Quota(16, 50_000_000_000, None, 100_000_000)
            assert tenants == {"team-a": Quota(sandboxes=64, trajectory_bytes=20_000_000_000)}
            # A file that is mounted alone is never renewed.
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == "quotas"]
            assert mount["mountPath"] == "/etc/regreen/quotas"
            assert "subPath" not in mount
    assert keeping == {"dataset", "policy", "front"}


def test_without_quotas_nothing_asks_for_them(rendered):
    words = [w for c in chart.containers(rendered["small"]) for w in c.get("args") or ()]
    assert not any(word.startswith("--quotas") for word in words)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("security.tokens.enabled", False, "set security.tokens.enabled, or leave quotas out"),
        ("quotas.default.sandbox", 3, "additional properties 'sandbox'"),
        ("quotas.tenants.team-a.sandboxes", -1, "minimum"),
        ("quotas.tenants.team/a", {}, "does not match"),
    ],
)
def test_wrong_quotas_are_refused(chart_tools, path, value, says):
    (answer,) = chart.tried([{"values": chart.over(chart.values("full"), path, value)}])
    assert says in answer["refused"]


WORKER = (
    "dataset.v1.TaskService/GetTask",
    "dataset.v1.RolloutQueueService/LeaseRollouts",
    "dataset.v1.RolloutQueueService/CommitRollout",
    "dataset.v1.KnowledgeService/SearchKnowledge",
    "dataset.v1.KnowledgeService/RecordKnowledgeUse",
    "sandbox.v1.StateService/PrepareState",
    "sandbox.v1.StateService/DeleteState",
    "sandbox.v1.SandboxService/CreateSandbox",
    "sandbox.v1.SandboxService/Validate",
    "policy.v1.PolicyService/RenderChat",
    "policy.v1.PolicyService/Generate",
    "judge.v1.JudgeService/Judge",
)
"""What a rollout calls (regreen/rollout/worker.py and what it runs)."""
DRIVER = ("policy.v1.PolicyService/LoadVersion", "learner.v1.LearnerService/StartRun")
"""What `regreen train` calls besides."""


def scopes(name: str) -> list[str]:
    """Scopes of a token that docs/operations/security.md makes for Kubernetes."""
    page = (chart.ROOT / "docs/operations/security.md").read_text()
    (shared,) = re.findall('^worker="(.*)"$', page, re.MULTILINE)
    (command,) = re.findall(f"^regreen tokens create {name} (.*)$", page, re.MULTILINE)
    return re.findall(r"--scope (\S+)", command.replace("$worker", shared))


def test_tokens_of_the_docs_cover_what_is_called_and_a_workers_no_more():
    for method in WORKER:
        assert covers(scopes("rollout"), SCOPES[f"regreen.{method}"]), method
        assert covers(scopes("driver"), SCOPES[f"regreen.{method}"]), method
    for method in DRIVER:
        assert not covers(scopes("rollout"), SCOPES[f"regreen.{method}"]), method
        assert covers(scopes("driver"), SCOPES[f"regreen.{method}"]), method


def test_a_worker_is_given_its_own_token_alone(rendered):
    items = {
        pod["containers"][0]["name"]: volume["secret"]["items"]
        for obj in rendered["small"]
        for pod in chart.pods(obj)
        for volume in pod["volumes"]
        if volume["name"] == "token"
    }
    assert items == {
        "worker": [{"key": "rollout", "path": "token"}],
        "judge": [{"key": "judge", "path": "token"}],
    }
