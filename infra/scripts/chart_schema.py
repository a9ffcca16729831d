"""Writes settings of services and names of quotas into values.schema.json: `--check` compares.

- What a service can be told is read from its settings class, so that the chart refuses what the
  service would refuse: unknown names, wrong types, values out of bounds.
- Settings that the chart says itself are left out: nothing can be said in two places.
- The rest of the schema is written by hand, and stays as it is.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from made import keep

from regreen.rpc.quotas import NAMES
from regreen.settings import PLACES

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "infra" / "helm" / "regreen" / "values.schema.json"
OWN = {
    "dataset": ("database_url", "blobs", "pg_bin", "pg_user", "fsync"),
    "judge": ("policy_address", "policy_tls_ca", "policy_token_file"),
    "learner": ("blobs", "processes", "nodes", "address"),
    "policy": ("blobs", "http", "sglang_urls", "sglang_path_map", "script"),
    "sandbox": (
        *("backend", "behind_front", "blobs", "egress_upstream", "docker_image", "docker_runtime"),
        *("docker_pool", "docker_pool_total", "kube_name", "kube_config", "kube_namespace"),
        *("kube_image", "kube_secret", "kube_tls_secret", "kube_keep_workers", "kube_index_url"),
        *("kube_env_secrets", "kube_pull_secrets", "kube_node_selector", "kube_tolerations"),
        "kube_priority_class",
    ),
}
"""Said by the chart, or of no use in a cluster."""
_URL = r"^https?://[^\s/@?#]+(/[^\s@]*)?$"
_HOST = r"(\*\.)?[^\s/@,*]+"
_HOSTS = rf"^({_HOST}(, ?{_HOST})*)?$"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"({_BYTE}\.){{3}}{_BYTE}"
_IPV6 = r"[0-9a-f:]*:[0-9a-f:]+(/(12[0-8]|1[01][0-9]|[1-9]?[0-9]))?"
_NETWORK = rf"({_IPV4}(/(3[0-2]|[12]?[0-9]))?|{_IPV6})"
NARROWER: dict[tuple[str, str], dict[str, Any]] = {
    # sglang follows from sglang.enabled; scripted needs a file that no pod has.
    ("policy", "engine"): {"enum": ["auto", "openvino", "torch", "openai"]},
    ("policy", "openai_url"): {"pattern": _URL},
    ("judge", "openai_url"): {"pattern": _URL},
    ("sandbox", "egress_hosts"): {"pattern": _HOSTS},
    ("sandbox", "prepare_hosts"): {"pattern": _HOSTS},
    ("sandbox", "egress_private"): {"pattern": rf"^({_NETWORK}(, ?{_NETWORK})*)?$"},
}
"""What a service takes, and could not start with in this chart, or refuses by more than a type."""
_MOST = 1 << 53
"""Whole numbers beyond are no longer exact in values, which Helm reads as floats."""


def setting(described: dict[str, Any]) -> dict[str, Any]:
    """What a value has to be, without what is only told."""
    for option in described.get("anyOf", ()):
        if option.get("type") != "null":
            described = {**described, **option}
    if described.get("type") == "integer":
        described = {"maximum": _MOST} | described
    left_out = ("title", "default", "anyOf", "format", "writeOnly")
    return {key: value for key, value in described.items() if key not in left_out}


def definitions() -> dict[str, Any]:
    """Schemas of `settings` and `secretSettings` by service, and of a tenant's quota."""
    found = {}
    for service, own in OWN.items():
        module = importlib.import_module(f"{service}_svc.settings")
        fields = getattr(module, f"{service.capitalize()}Settings").model_json_schema()
        plain, secret = {}, {}
        for name, described in fields["properties"].items():
            if described.get("writeOnly"):
                secret[name] = {"$ref": "#/$defs/secretKey"}
            elif name not in (*PLACES, *own):
                plain[name] = setting(described) | NARROWER.get((service, name), {})
        found[f"{service}Settings"] = closed(plain)
        if secret:
            found[f"{service}SecretSettings"] = closed(secret)
    bound = {"type": "integer", "minimum": 0, "maximum": _MOST}
    return found | {"quota": closed(dict.fromkeys(NAMES, bound))}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has no other properties."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def main() -> int:
    """Write or check the schema; the exit code."""
    schema = json.loads(SCHEMA.read_text())
    schema["$defs"] |= definitions()
    return keep({SCHEMA: json.dumps(schema, indent=2) + "\n"}, "chart_schema")


if __name__ == "__main__":
    sys.exit(main())
