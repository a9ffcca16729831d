"""Where workers may run, and what they are given: read from settings, into a pod's spec."""

import json
import typing

import pytest
from pydantic import ValidationError

from sandbox_svc.fleet.manifests import Plan
from sandbox_svc.settings import SandboxSettings

TOLERATIONS = [
    {"key": "dedicated", "operator": "Equal", "value": "sandboxes", "effect": "NoSchedule"},
    {"key": "spot", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60},
]


def test_a_worker_is_placed_and_pulled_as_it_was_said():
    settings = SandboxSettings(
        kube_index_url="https://index.example/$(HOME)/simple/",
        kube_secret="aws",
        kube_env_secrets="index, proxy",
        kube_pull_secrets="registry,mirror",
        kube_node_selector="example.org/pool=sandboxes,disk=",
        kube_tolerations=json.dumps(TOLERATIONS),
        kube_priority_class="low",
    )
    spec = Plan(settings).pod_spec()
    (container,) = spec["containers"]
    assert spec["imagePullSecrets"] == [{"name": "registry"}, {"name": "mirror"}]
    assert spec["nodeSelector"] == {"example.org/pool": "sandboxes", "disk": ""}
    assert spec["tolerations"] == TOLERATIONS
    assert spec["priorityClassName"] == "low"
    index = {"name": "REGREEN_INDEX_URL", "value": "https://index.example/$$(HOME)/simple/"}
    assert index in container["env"]
    assert [one["secretRef"]["name"] for one in container["envFrom"]] == ["aws", "index", "proxy"]
    core = pytest.importorskip("lightkube.models.core_v1")
    assert set(spec) <= set(typing.get_type_hints(core.PodSpec))
    for one in spec["tolerations"]:
        assert set(one) <= set(typing.get_type_hints(core.Toleration))


def test_a_worker_of_which_nothing_is_said_is_left_to_the_cluster():
    spec = Plan(SandboxSettings()).pod_spec()
    said = {"imagePullSecrets", "nodeSelector", "tolerations", "priorityClassName"}
    assert not said & set(spec)
    (container,) = spec["containers"]
    assert "envFrom" not in container
    assert {entry["name"] for entry in container["env"]} == {"POD_IP", "HOME"}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("kube_index_url", "index.example", "is no URL"),
        ("kube_index_url", "http://[::1", "is no URL"),
        ("kube_index_url", "https://me:hunter2@index.example/", "name that in kube_env_secrets"),
        ("kube_env_secrets", "A", "'A' is no name of an object"),
        ("kube_pull_secrets", "a b", "is no name of an object"),
        ("kube_node_selector", "pool", "give name=value"),
        ("kube_node_selector", "pool=a b", "is no label"),
        ("kube_node_selector", "-x=a", "is no label"),
        ("kube_tolerations", "spot:NoSchedule", "is no JSON"),
        ("kube_tolerations", '{"key": "a"}', "is no list"),
        ("kube_tolerations", '[{"key": "a", "effect": "Never"}]', "is no toleration"),
        ("kube_tolerations", '[{"kye": "a"}]', "is no toleration"),
        ("kube_tolerations", '[{"key": "a", "tolerationSeconds": true}]', "is no toleration"),
        ("kube_tolerations", '[{"effect": "NoSchedule"}]', "names no taint"),
        ("kube_tolerations", '[{"key": "a", "operator": "Exists", "value": "b"}]', "no value"),
        ("kube_priority_class", "a,b", "give one"),
    ],
)
def test_words_that_the_api_would_refuse_are_refused_first(name, value, says):
    with pytest.raises(ValidationError, match=name) as caught:
        SandboxSettings(**{name: value})
    told = caught.value.errors()[0]["msg"]
    assert says in told
    assert "hunter2" not in told
