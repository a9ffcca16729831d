"""What the chart's values say of tenants is what the services keep."""

import pytest

from regreen.rpc.quotas import Quota, read_quotas
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
