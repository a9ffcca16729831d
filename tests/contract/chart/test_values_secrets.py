"""Secrets of the chart are files in the pods, and in no container's environment."""

import pytest

from regreen.bucket import secrets_folder
from sandbox_svc.fleet.manifests import Plan
from tests.contract.chart.reading import service_of
from tests.fixtures import chart

REFS = {
    "judge": {"openai_key": ("judge", "openai")},
    "policy": {"http_key": ("policy", "http"), "sglang_key": ("policy", "sglang")},
    "dataset": {"database_url": ("regreen-postgres-app", "uri")},
    "migrate": {"database_url": ("regreen-postgres-app", "uri")},
}
AUTHORITY = {"database_ca.crt": ("regreen-postgres-ca", "ca.crt")}
"""Of the database's certificate, which is no secret; its key lies beside it."""


@pytest.mark.parametrize("part", REFS)
def test_a_secret_setting_is_read_from_a_file(rendered, reader, part):
    (container,) = [c for c in chart.containers(rendered["full"]) if c["name"] == part]
    (pod,) = [p for o in rendered["full"] for p in chart.pods(o) if p["containers"] == [container]]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "secrets"]
    found = {
        item["path"]: (source["secret"]["name"], item["key"])
        for source in volume["projected"]["sources"]
        for item in source["secret"]["items"]
    }
    assert found == REFS[part] | (AUTHORITY if "database_url" in REFS[part] else {})
    settings = reader.settings(rendered["full"], container)
    for name in REFS[part]:
        value = getattr(settings, name)
        shown = value if isinstance(value, str) else value.get_secret_value()
        assert shown == f"secret of {name}"


@pytest.mark.parametrize("name", ["small", "full", "sandbox"])
def test_no_setting_of_a_secret_is_in_an_environment(rendered, name):
    for container in chart.containers(rendered[name]):
        if service_of(container):
            assert not any("valueFrom" in entry for entry in container.get("env", ()))


def test_a_database_by_url_is_read_from_the_secret_that_the_values_name(rendered):
    for part in ("dataset", "migrate"):
        (pod,) = [
            p
            for o in rendered["small"]
            for p in chart.pods(o)
            if p["containers"][0]["name"] == part
        ]
        (volume,) = [v for v in pod["volumes"] if v["name"] == "secrets"]
        (source,) = volume["projected"]["sources"]
        assert source["secret"] == {
            "name": "regreen-database",
            "items": [{"key": "uri", "path": "database_url"}],
        }


BUCKETS = {"dataset", "front", "learner"}
"""Containers that open the bucket."""


def test_the_buckets_keys_are_files_where_the_bucket_is_opened_and_nowhere_else(rendered):
    opening = set()
    for obj in rendered["full"]:
        for pod in chart.pods(obj):
            for container in pod["containers"]:
                given = [source["secretRef"]["name"] for source in container.get("envFrom") or ()]
                assert "regreen-blobs" not in given, container["name"]
                urls = [a for a in container.get("args") or () if a.startswith("--blobs=")]
                mounts = {m["name"]: m for m in container["volumeMounts"]}
                assert bool(urls) == ("blobs" in mounts), container["name"]
                if not urls:
                    continue
                opening.add(container["name"])
                (url,) = urls
                assert secrets_folder(url.partition("=")[2]) == mounts["blobs"]["mountPath"]
                assert "subPath" not in mounts["blobs"]  # else new keys are never read
                (volume,) = [v for v in pod["volumes"] if v["name"] == "blobs"]
                assert volume["secret"]["secretName"] == "regreen-blobs"
    assert opening == BUCKETS


def test_a_front_gives_its_workers_the_buckets_keys_as_files(rendered, reader):
    (front,) = [c for c in chart.containers(rendered["full"]) if c["name"] == "front"]
    spec = Plan(reader.settings(rendered["full"], front)).pod_spec()
    (container,) = spec["containers"]
    variables = [one["secretRef"]["name"] for one in container["envFrom"]]
    assert variables == chart.values("full")["sandbox"]["workers"]["envFrom"]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "blobs"]
    (url,) = [a for a in container["args"] if a.startswith("--blobs=")]
    assert secrets_folder(url.partition("=")[2]) == mount["mountPath"]
    (volume,) = [v for v in spec["volumes"] if v["name"] == "blobs"]
    assert volume["secret"]["secretName"] == "regreen-blobs"
