"""compose.yaml holds what the chart's values say, in words that services and both Composes read."""

import copy
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from regreen.rpc.quotas import read_quotas
from regreen.stack.access import hand_out
from regreen.stack.layout import SERVICES, Layout

ROOT = Path(__file__).resolve().parents[3]
FILE = yaml.safe_load((ROOT / "compose.yaml").read_text())
CHART = yaml.safe_load((ROOT / "infra" / "helm" / "regreen" / "values.yaml").read_text())
NAMES = [service.name for service in SERVICES]


@pytest.fixture(scope="module")
def handed(tmp_path_factory) -> Path:
    """What the access container hands out."""
    home = tmp_path_factory.mktemp("access")
    hand_out(Layout(home / "home"), home / "handed", "postgresql://u:{password}@h/n")
    return home / "handed"


def test_it_is_what_the_values_make():
    made = [sys.executable, str(ROOT / "infra" / "scripts" / "compose.py"), "--check"]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_what_both_generations_read():
    assert set(FILE) == {"services", "networks", "volumes"}
    for name, part in FILE["services"].items():
        assert not {"develop", "build", "attach", "post_start", "pull_policy"} & set(part), name
        for waits in part.get("depends_on", {}).values():
            assert set(waits) == {"condition"}
        assert all(isinstance(entry, str) for entry in part["volumes"]), name


@pytest.mark.parametrize("name", FILE["services"])
def test_every_container_is_walled_in(name):
    part = FILE["services"][name]
    assert part["read_only"] is True
    assert part["cap_drop"] == ["ALL"]
    assert "cap_add" not in part
    assert "no-new-privileges:true" in part["security_opt"]
    assert "privileged" not in part
    assert part["mem_limit"] == part["memswap_limit"]
    assert not any("docker.sock" in entry for entry in part["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in part.get("ports", []))
    assert part["healthcheck"]["test"][0] == "CMD"


def test_nobody_reads_what_another_is_handed():
    readers = {
        name: {
            entry.partition(":")[0]
            for entry in part["volumes"]
            if entry.startswith("access") and name != "access"
        }
        for name, part in FILE["services"].items()
    }
    for name in NAMES:
        assert readers[name] == {f"access-{name}"}
    assert readers["postgres"] == {"access-database"}
    assert not readers["prometheus"] | readers["sglang"]
    networks = {name: set(part.get("networks", ())) for name, part in FILE["services"].items()}
    assert [n for n in networks if "database" in networks[n]] == ["postgres", "dataset"]
    assert networks["sandbox"] == {"sandboxes"}
    assert networks["prometheus"] == {"services", "sandboxes"}


@pytest.mark.parametrize("service", SERVICES, ids=NAMES)
def test_every_flag_and_variable_is_a_setting_of_the_service(service, monkeypatch, handed):
    """With what the access container hands out, where the container finds it."""
    part = FILE["services"][service.name]
    for name in [name for name in os.environ if name.startswith("REGREEN_")]:
        monkeypatch.delenv(name)
    for name, value in part["environment"].items():
        if value is not None:  # else only where the environment of Compose has it
            monkeypatch.setenv(name, value)
    given = str(handed / service.name)
    words = [word.replace("/etc/regreen", given) for word in part["command"][3:]]
    cls = getattr(import_module(f"{service.name}_svc.settings"), f"{service.name.title()}Settings")
    settings = cls.load(words)
    assert settings.listen == f"0.0.0.0:{service.port}"
    assert settings.metrics == f"0.0.0.0:{service.metrics_port}"
    assert settings.tls is not None
    assert settings.tls_ca is not None
    assert settings.tokens is not None
    if service.name == "dataset":
        assert settings.database_url.startswith("postgresql://u:")
        assert "{" not in settings.database_url


def test_no_process_reads_the_whole_proc_of_the_sandbox_service():
    """Through it a process sees those of its user in other containers, and their files."""
    holders = {
        name: entry
        for name, part in FILE["services"].items()
        for entry in part["volumes"]
        if entry.startswith("proc:")
    }
    assert holders == {"sandbox": "proc:/root/proc:nocopy"}
    assert "hidepid=invisible" in FILE["volumes"]["proc"]["driver_opts"]["o"]


def test_what_the_chart_says_is_what_compose_has():
    for name in NAMES:
        part = FILE["services"][name]
        assert part["image"].partition(":")[0] == CHART["images"][name]["repository"]
        assert part["command"][:3] == ["python3", "-m", f"{name}_svc"]
    assert FILE["services"]["dataset"]["mem_limit"] == "2048m"  # as the chart limits it
    assert CHART["dataset"]["resources"]["limits"]["memory"] == "2Gi"
    assert FILE["services"]["sglang"]["profiles"] == ["gpu"]


def test_prometheus_scrapes_every_service_and_reads_the_alerts():
    """As the configuration of a stack on this machine: the same labels, rules and times."""
    mounted = {
        place: ROOT / source
        for source, place, _ in (
            e.split(":") for e in FILE["services"]["prometheus"]["volumes"][:-1]
        )
    }
    folder = ROOT / "infra" / "observability"
    own = yaml.safe_load(mounted["/etc/prometheus/prometheus.yml"].read_text())
    local = yaml.safe_load((folder / "prometheus.yml").read_text())
    for found, host in ((own, "{}"), (local, "127.0.0.1")):
        (job,) = found.pop("scrape_configs")
        assert job["job_name"] == "regreen"
        assert {s["labels"]["component"]: s["targets"] for s in job["static_configs"]} == {
            s.name: [f"{host.format(s.name)}:{s.metrics_port}"] for s in SERVICES
        }
    assert own == local
    (rules,) = own["rule_files"]
    assert mounted[f"/etc/prometheus/{rules}"].resolve() == folder / "alerts.yml"


def with_values(
    tmp_path, change=lambda values: None, own=lambda values: None
) -> subprocess.CompletedProcess[str]:
    """Make a compose.yaml from changed values of the chart, and of Compose's own."""
    scripts, chart = tmp_path / "infra" / "scripts", tmp_path / "infra" / "helm" / "regreen"
    mine = tmp_path / "infra" / "compose"
    for folder in (scripts, chart, mine):
        folder.mkdir(parents=True)
    for name in ("compose.py", "made.py"):
        shutil.copy(ROOT / "infra" / "scripts" / name, scripts)
    values = copy.deepcopy(CHART)
    change(values)
    (chart / "values.yaml").write_text(yaml.safe_dump(values))
    values = yaml.safe_load((ROOT / "infra" / "compose" / "values.yaml").read_text())
    own(values)
    (mine / "values.yaml").write_text(yaml.safe_dump(values))
    made = [sys.executable, str(scripts / "compose.py")]
    return subprocess.run(made, capture_output=True, text=True, check=False)


def change_much(values):
    values["images"]["judge"] = {"repository": "r.example/judge", "digest": "sha256:abc"}
    values["tracing"] = {"endpoint": "http://collector:4318", "share": 0.25}
    values["judge"]["settings"] = {"drain_s": 33, "max_rpcs": 7}
    values["judge"]["env"] = {"HTTPS_PROXY": "http://a$b:3128"}
    values["judge"]["resources"]["limits"]["memory"] = "3Gi"
    values["sglang"] |= {"gpus": 2, "env": {"NCCL_DEBUG": "INFO"}}


def test_a_value_of_the_chart_is_changed_for_both(tmp_path):
    """What Compose has of `images`, `tracing`, `settings`, `env`, limits and `security`."""
    assert with_values(tmp_path, change_much).returncode == 0
    services = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]
    assert services["sglang"]["command"] == ["--tp-size=2"]
    assert services["sglang"]["environment"]["NCCL_DEBUG"] == "INFO"
    part = services["judge"]
    assert part["image"] == "r.example/judge@sha256:abc"
    assert part["environment"] == {
        "REGREEN_JUDGE__DRAIN_S": "33",
        "REGREEN_JUDGE__MAX_RPCS": "7",
        "HTTPS_PROXY": "http://a$$b:3128",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "${REGREEN_TRACING_ENDPOINT:-http://collector:4318}",
        "OTEL_TRACES_SAMPLER_ARG": "${REGREEN_TRACING_SHARE:-0.25}",
    }
    assert part["mem_limit"] == "3072m"
    assert part["stop_grace_period"] == "53s"


def test_quotas_of_the_chart_are_those_of_compose(tmp_path):
    tenants = {"team-a": {"state_bytes": 50_000_000_000}, "team-b": {}}
    wanted = {"default": {"sandboxes": 3}, "tenants": tenants}
    assert with_values(tmp_path, own=lambda v: v.update(quotas=wanted)).returncode == 0
    services = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]
    (text,) = [w.partition("=")[2] for w in services["access"]["command"] if "--quotas=" in w]
    hand_out(Layout(tmp_path / "home"), tmp_path / "handed", "postgresql://u:{password}@h/n", text)
    for name in NAMES:
        (flag,) = [w for w in services[name]["command"] if w.startswith("--quotas=")] or [""]
        assert bool(flag) is (name in ("dataset", "sandbox", "policy"))
        if flag:
            file = Path(flag.partition("=")[2].replace("/etc/regreen", f"{tmp_path}/handed/{name}"))
            default, tenants = read_quotas(file)
            assert (default.sandboxes, tenants["team-a"].state_bytes) == (3, 50_000_000_000)
            assert tenants["team-b"].sandboxes is None


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"judge": {"secretSettings": {"openai_key": {"name": "a"}}}}, "judge.secretSettings.open"),
        ({"policy": {"envFrom": ["proxies"]}}, "policy.envFrom: Compose has nothing of it"),
        ({"security": {"tokens": {"enabled": False}}}, "security.tokens.enabled: Compose has"),
        ({"learner": {"gpus": 8}}, "learner.gpus: Compose has nothing of it"),
        ({"blobs": {"url": "s3://bucket"}}, "blobs.url: Compose has nothing of it"),
    ],
)
def test_values_that_nothing_would_read_are_refused(tmp_path, own, told):
    done = with_values(tmp_path, own=lambda values: values.update(own))
    assert (done.returncode, done.stderr.startswith(told)) == (1, True), done.stderr


def test_nothing_sends_traces_unless_asked_to():
    for name in NAMES:
        given = FILE["services"][name]["environment"]
        assert given["OTEL_EXPORTER_OTLP_ENDPOINT"] == "${REGREEN_TRACING_ENDPOINT:-}"


def test_what_is_handed_out_again_is_the_same(handed):
    layout = Layout(handed.parent / "home")
    files = {path: path.read_text() for path in handed.rglob("*") if path.is_file()}
    first = {path: path.stat().st_mtime_ns for path in files}
    hand_out(layout, handed, "postgresql://u:{password}@h/n")
    assert {path: path.stat().st_mtime_ns for path in files} == first
    keys = [path for path in files if path.name in ("tls.key", "url", "tokens.json", "token")]
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    authority = (layout.certs / "authority" / "tls.key").read_text()
    assert authority not in files.values()
