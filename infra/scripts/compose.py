"""Writes compose.yaml from the chart's values and infra/compose/values.yaml: `--check` compares.

- Images, settings, memory and quotas come from the chart's values, ports from the layout of
  the local stack; what only Compose knows (volumes, networks, Postgres, Prometheus, which files
  certificates are) is said here.
- Nothing that Compose 1.29 or 2 alone reads: no `name`, `include`, `develop`, `configs`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from made import keep

from regreen.stack.layout import SERVICES

ROOT = Path(__file__).resolve().parents[2]
FILES = ("infra/helm/regreen/values.yaml", "infra/compose/values.yaml")
PAGE = ROOT / "compose.yaml"
HEAD = """\
# Made by infra/scripts/compose.py from the chart's values and infra/compose/values.yaml: change
# those. `make up-docker` starts it; docs/operations/compose.md says what it needs.
"""
CLUSTER = ("kube_", "fleet_")
"""Settings of the sandbox service's front in a cluster."""
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
NOBODY = "65534:65534"
ACCESS = "/etc/regreen"
DATA = "/home/regreen/data"
DATABASE_URL = "postgresql://regreen:{password}@postgres/regreen"
PROC = {"type": "proc", "device": "proc", "o": "hidepid=invisible,subset=pid"}
Tree = dict[str, Any]


def merged(below: Tree, above: Tree) -> Tree:
    """Values as Helm lays one file over another."""
    found = dict(below)
    for key, value in above.items():
        inner = found.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        found[key] = merged(inner, value) if both else value
    return found


def values() -> Tree:
    """Those of both files."""
    found: Tree = {}
    for name in FILES:
        found = merged(found, yaml.safe_load((ROOT / name).read_text()))
    return found


def mebibytes(amount: str | int) -> str:
    """A Kubernetes quantity of bytes, as both Composes read it."""
    size = amount if isinstance(amount, int) else int(amount[:-2]) * UNITS[amount[-2:]]
    return f"{size >> 20}m"


def image(all_values: Tree, name: str) -> str:
    """The image of a part: by digest where one is given, else by a tag that was built here."""
    found = all_values["images"][name]
    if found["digest"]:
        return f"{found['repository']}@{found['digest']}"
    return f"{found['repository']}:${{REGREEN_TAG:-latest}}"


def wall(memory: str) -> Tree:
    """What bounds every container."""
    return {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp:mode=1777"],
        "mem_limit": memory,
        "memswap_limit": memory,
        "pids_limit": 4096,
        "init": True,
        "restart": "unless-stopped",
    }


def published(name: str, port: int) -> str:
    """A port on loopback of this machine; the environment may name another, 0 for any."""
    return f"127.0.0.1:${{REGREEN_{name.upper()}_PORT:-{port}}}:{port}"


def plain(value: object) -> str:
    """A value as a variable's, in which Compose replaces nothing."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("$", "$$")


def settings(name: str, own: Tree) -> Tree:
    """Settings of a service, and variables of libraries, as the chart gives them."""
    found = {
        f"REGREEN_{name.upper()}__{key.upper()}": plain(value)
        for key, value in own.get("settings", {}).items()
        if not key.startswith(CLUSTER)
    }
    return found | {key: plain(value) for key, value in own["env"].items()}


def tracing(all_values: Tree) -> Tree:
    """Where spans are sent, as the chart gives it; the environment may say another place."""
    own = all_values["tracing"]
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"${{REGREEN_TRACING_ENDPOINT:-{own['endpoint']}}}",
        "OTEL_TRACES_SAMPLER_ARG": f"${{REGREEN_TRACING_SHARE:-{own['share']}}}",
    }


def health(port: int, start_s: int) -> Tree:
    """`/healthz`, as the chart's probes ask it."""
    ask = (
        "import http.client as h; c = h.HTTPConnection('127.0.0.1', %d, timeout=5); "
        "c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"
    )
    return {
        "test": ["CMD", "python3", "-ISc", ask % port],
        **{"interval": "10s", "timeout": "10s", "retries": 6, "start_period": f"{start_s}s"},
    }


QUOTED = ("dataset", "sandbox", "policy")
"""Services that keep quotas of tenants."""
_OF_PARTS = ("settings", "env", "resources.limits.memory")
TAKEN = (
    *("images", "tracing", "quotas", "learner.shm", "sandbox.settings", "sandbox.env"),
    *(
        f"{name}.{field}"
        for name in ("dataset", "policy", "judge", "learner")
        for field in _OF_PARTS
    ),
    *("sglang.gpus", "sglang.args", "sglang.shm", "sglang.env", "sglang.resources.limits.memory"),
)
"""Values of the chart that Compose has, and all below them."""


def check(own: Tree, place: str = "") -> None:
    """Refuse values of infra/compose/values.yaml that nothing here would read.

    Raises:
        SystemExit: names the value.
    """
    for name, value in own.items():
        at = f"{place}{name}"
        if at in TAKEN:
            continue
        if not isinstance(value, dict):
            raise SystemExit(f"{at}: Compose has nothing of it; it takes {', '.join(TAKEN)}")
        check(value, f"{at}.")


def quotas(all_values: Tree) -> str:
    """The file of quotas, as the chart's ConfigMap has it; empty where there are none."""
    found = all_values["quotas"]
    if not found:
        return ""
    tables = {"default": found.get("default") or {}}
    tables |= {f"tenants.{json.dumps(k)}": v for k, v in (found.get("tenants") or {}).items()}
    return "".join(
        "".join((f"[{table}]\n", *(f"{name} = {bound}\n" for name, bound in bounds.items())))
        for table, bounds in tables.items()
    )


def security(all_values: Tree, name: str) -> list[str]:
    """Flags for certificates, tokens and quotas, as the chart's pods have them; Compose has the
    first two always."""
    words = [
        f"--tls-{n}={ACCESS}/tls/{f}"
        for n, f in (("ca", "ca.crt"), ("cert", "tls.crt"), ("key", "tls.key"))
    ]
    words += [f"--tokens={ACCESS}/tokens/tokens.json", "--audit=/dev/stderr"]
    if name in QUOTED and quotas(all_values):
        words.append(f"--quotas={ACCESS}/quotas/quotas.toml")
    return words


PARTS: dict[str, tuple[list[str], list[str], int]] = {
    "dataset": (
        [f"--home={DATA}", "--blobs=/blobs", f"--database-url=file:{ACCESS}/database/url"],
        ["blobs:/blobs"],
        300,
    ),
    "sandbox": ([f"--home={DATA}", "--blobs=/blobs"], ["blobs:/blobs"], 300),
    "policy": (
        ["--home=/shared/policy", "--http="],
        ["shared:/shared", "${REGREEN_MODEL:-model}:/model:ro"],
        1860,
    ),
    "judge": (
        [
            *(f"--home={DATA}", "--policy-address=policy:50053"),
            f"--policy-tls-ca={ACCESS}/tls/ca.crt",
            f"--policy-token-file={ACCESS}/token/token",
        ],
        [],
        300,
    ),
    "learner": (
        ["--home=/shared/learner", "--blobs=/blobs", "--processes=1"],
        ["shared:/shared", "blobs:/blobs", "${REGREEN_MODEL:-model}:/model:ro"],
        300,
    ),
}
"""Arguments, volumes and the time that a start may take, of each service."""
PASSED = {
    "sandbox": ["REGREEN_INDEX_URL"],
    "policy": ["REGREEN_POLICY__ENGINE", "REGREEN_POLICY__MODEL", "REGREEN_POLICY__SGLANG_URLS"],
}
"""Variables that a service has from the environment of `docker compose`, where they are set."""


def service(all_values: Tree, name: str, port: int, metrics: int) -> Tree:
    """One of the five services."""
    own = all_values[name]
    words, volumes, start_s = PARTS[name]
    memory = mebibytes(own["resources"]["limits"]["memory"])
    if name == "sandbox":
        memory = mebibytes(own["settings"]["kube_memory_bytes"])
    environment = settings(name, own) | tracing(all_values)
    environment |= dict.fromkeys(PASSED.get(name, ()))
    if name == "learner":
        environment["HOME"] = "/tmp"  # caches of the kernels that are compiled
    waits = {"access": {"condition": "service_healthy"}}
    if name == "dataset":
        waits["postgres"] = {"condition": "service_healthy"}
    made: Tree = {
        "image": image(all_values, name),
        "command": [
            "python3",
            "-m",
            f"{name}_svc",
            f"--listen=0.0.0.0:{port}",
            f"--metrics=0.0.0.0:{metrics}",
            "--insecure",
            *security(all_values, name),
            *words,
        ],
        "environment": environment,
        "volumes": [f"access-{name}:{ACCESS}:ro,nocopy", *volumes],
        "ports": [published(name, port)],
        "depends_on": waits,
        "healthcheck": health(metrics, start_s),
        "stop_grace_period": f"{int(own.get('settings', {}).get('drain_s', 10)) + 20}s",
        "networks": ["sandboxes" if name == "sandbox" else "services"],
        **wall(memory),
    }
    if DATA in " ".join(words):
        made["volumes"].append(f"{name}:{DATA}")
    if name == "dataset":
        made["networks"].append("database")
    if name == "learner":
        made["shm_size"] = mebibytes(own["shm"])
    if name == "sandbox":
        # A container may mount a fresh /proc for a sandbox only where it has a whole one, and
        # engines hide parts of theirs. This one shows no setting; unlike an unmasked /proc, which
        # only newer Composes can ask for, it leaves the container's own as it is. It lies below
        # /root, which is root's alone: `hidepid` does not hide processes of the same user, and
        # those of other containers are. For the kernel it counts there all the same.
        made["security_opt"].append("seccomp:./infra/docker/sandbox.seccomp.json")
        made["volumes"].append("proc:/root/proc:nocopy")
        made["pids_limit"] = 16384
    return made


def access(all_values: Tree) -> Tree:
    """Who makes certificates, tokens and the password, and renews them."""
    parts = [*(item.name for item in SERVICES), "database"]
    ready = f"import os; raise SystemExit(not os.path.exists('{DATA}/ready'))"
    return {
        "image": image(all_values, "rollout"),
        "command": [
            "python3",
            "-m",
            "regreen.stack.access",
            f"--home={DATA}",
            "--handed=/handed",
            f"--database={DATABASE_URL}",
            *([f"--quotas={told}"] if (told := quotas(all_values).replace("$", "$$")) else []),
        ],
        "volumes": [f"access:{DATA}", *(f"access-{name}:/handed/{name}" for name in parts)],
        "network_mode": "none",
        "healthcheck": {
            "test": ["CMD", "python3", "-ISc", ready],
            "interval": "5s",
            "timeout": "5s",
            "retries": 24,
        },
        **wall("512m"),
    }


def postgres() -> Tree:
    """The database; any image with the contract of the official one."""
    made = {
        "image": "${POSTGRES_IMAGE:-postgres:16-bookworm}",
        "user": "postgres",
        "environment": {
            **{"POSTGRES_USER": "regreen", "POSTGRES_DB": "regreen"},
            "POSTGRES_PASSWORD_FILE": "/run/access/password",
        },
        "volumes": [
            "postgres:/var/lib/postgresql/data",
            "access-database:/run/access:ro,nocopy",
        ],
        "depends_on": {"access": {"condition": "service_healthy"}},
        "healthcheck": {
            "test": ["CMD", "pg_isready", "-h", "127.0.0.1", "-U", "regreen", "-d", "regreen"],
            **{"interval": "5s", "timeout": "5s", "retries": 24},
        },
        "networks": ["database"],
        "stop_grace_period": "60s",
        "shm_size": "256m",
        **wall("2048m"),
    }
    made["tmpfs"].append("/var/run/postgresql:mode=1777")
    return made


def prometheus() -> Tree:
    """What reads the services' metrics, and the alerts."""
    return {
        "image": "${PROMETHEUS_IMAGE:-prom/prometheus:v3.5.0}",
        "user": NOBODY,
        "command": [
            "--config.file=/etc/prometheus/prometheus.yml",
            "--storage.tsdb.path=/prometheus",
        ],
        "volumes": [
            "./infra/compose/prometheus.yml:/etc/prometheus/prometheus.yml:ro",
            "./infra/observability/alerts.yml:/etc/prometheus/alerts.yml:ro",
            "prometheus:/prometheus",
        ],
        "ports": [published("prometheus", 9090)],
        "healthcheck": {
            "test": ["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9090/-/healthy"],
            **{"interval": "10s", "timeout": "5s", "retries": 12},
        },
        "networks": ["services", "sandboxes"],
        **wall("1024m"),
    }


def tensor_parallel(own: Tree) -> list[str]:
    """A model lies over all GPUs where no option says a size, as in the chart."""
    sizes = ("--tp", "--tensor-parallel", "--pp", "--pipeline-parallel", "--dp", "--data-parallel")
    said = any(word.startswith(sizes) for word in own["args"])
    return [f"--tp-size={own['gpus']}"] if own["gpus"] > 1 and not said else []


def sglang(all_values: Tree) -> Tree:
    """SGLang on a GPU, which the policy samples from."""
    own = all_values["sglang"]
    ask = "import urllib.request as u; u.urlopen('http://127.0.0.1:30000/health', timeout=5)"
    devices = [{"driver": "nvidia", "count": own["gpus"], "capabilities": ["gpu"]}]
    return {
        "image": image(all_values, "sglang"),
        "profiles": ["gpu"],
        "command": [*tensor_parallel(own), *own["args"]],
        "environment": {"HOME": "/home/regreen"} | settings("sglang", own),
        "volumes": [
            "${REGREEN_MODEL:-model}:/model:ro",
            "shared:/shared:ro",
            "sglang:/home/regreen",
        ],
        "deploy": {"resources": {"reservations": {"devices": devices}}},
        "shm_size": mebibytes(own["shm"]),
        "healthcheck": {
            "test": ["CMD", "python3", "-c", ask],
            "interval": "10s",
            "timeout": "10s",
            "retries": 6,
            "start_period": "1800s",
        },
        "networks": ["services"],
        **wall(mebibytes(own["resources"]["limits"]["memory"])),
    }


def document() -> Tree:
    """The whole file."""
    all_values = values()
    check(yaml.safe_load((ROOT / FILES[-1]).read_text()))
    services = {"access": access(all_values), "postgres": postgres()}
    for item in SERVICES:
        services[item.name] = service(all_values, item.name, item.port, item.metrics_port)
    services |= {"prometheus": prometheus(), "sglang": sglang(all_values)}
    names = {entry.partition(":")[0] for part in services.values() for entry in part["volumes"]}
    volumes: Tree = {name: {} for name in sorted(names) if name[0] not in "./$"} | {"model": {}}
    volumes["proc"] = {"driver": "local", "driver_opts": PROC}
    networks: Tree = {"services": {}, "sandboxes": {}, "database": {"internal": True}}
    return {"services": services, "networks": networks, "volumes": volumes}


class Plain(yaml.SafeDumper):
    """Without anchors, which hide what a container has."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


def text() -> str:
    """What compose.yaml shall hold."""
    return HEAD + yaml.dump(document(), Dumper=Plain, sort_keys=False, width=160)


def main() -> int:
    """Write or check the file; the exit code."""
    return keep({PAGE: text()}, "compose")


if __name__ == "__main__":
    sys.exit(main())
