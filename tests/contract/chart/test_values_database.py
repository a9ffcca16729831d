"""The database takes the connections that the dataset service opens."""

import math

import pytest
import yaml

from dataset_svc.settings import DatasetSettings
from tests.contract.chart.reading import environment, mounted, service_of
from tests.fixtures import chart

SECRETS = "/etc/regreen/secrets"
LARGE = yaml.safe_load((chart.ROOT / "infra/k8s/overlays/rl-large/values.yaml").read_text())
POOL = DatasetSettings.model_fields["pool_size"].default


def sized(values: dict) -> tuple[int, list[dict]]:
    """`max_connections` of the cluster, and all objects."""
    (answer,) = chart.tried([{"values": values}])
    assert not answer["refused"], answer["refused"]
    (cluster,) = [obj for obj in answer["objects"] if obj["kind"] == "Cluster"]
    return int(cluster["spec"]["postgresql"]["parameters"]["max_connections"]), answer["objects"]


def test_a_large_cluster_has_room_for_every_process_while_they_are_replaced(chart_tools, reader):
    connections, objects = sized(LARGE)
    (dataset,) = [c for c in chart.containers(objects) if service_of(c) and c["name"] == "dataset"]
    (scaler,) = [o for o in objects if chart.label(o) == "HorizontalPodAutoscaler/regreen-dataset"]
    most = scaler["spec"]["maxReplicas"]
    pool = reader.settings(objects, dataset).pool_size
    assert connections == (most + math.ceil(most / 4)) * pool + 20 == 660


@pytest.mark.parametrize(("processes", "connections"), [(1, 100), (4, 100), (8, 10 * POOL + 20)])
def test_processes_without_a_scaler_count_with_the_default_pool(
    chart_tools, processes, connections
):
    values = chart.over(chart.values("full"), "dataset.autoscaling.enabled", False)
    values = chart.over(values, "dataset.settings", {})
    assert sized(chart.over(values, "dataset.replicas", processes))[0] == connections


@pytest.mark.parametrize("part", ["dataset", "migrate"])
def test_the_certificate_of_an_operators_database_is_looked_at(rendered, part):
    (pod,) = [
        p for o in rendered["full"] for p in chart.pods(o) if p["containers"][0]["name"] == part
    ]
    (container,) = pod["containers"]
    told = environment(container)
    assert told["PGSSLMODE"] == "verify-full"
    (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == SECRETS]
    assert "subPath" not in mount  # a new authority is read at the next connection
    assert told["PGSSLROOTCERT"].rpartition("/")[0] == SECRETS
    assert told["PGSSLROOTCERT"] in mounted(rendered["full"], pod, container)
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    keys = [i["key"] for s in volume["projected"]["sources"] for i in s["secret"]["items"]]
    assert sorted(keys) == ["ca.crt", "uri"]  # and not the authority's key


def test_a_database_by_url_is_looked_at_as_its_url_says(rendered):
    for container in chart.containers(rendered["small"]):
        assert not [name for name in environment(container) if name.startswith("PGSSL")]
