"""Reads what a rendered container is given, as the service in it would."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from regreen.tokens import TokenFile
from tests.fixtures import chart
from tests.fixtures.certs import Certs

SETTINGS = {
    name: getattr(import_module(f"{name}_svc.settings"), f"{name.capitalize()}Settings")
    for name in ("dataset", "judge", "learner", "policy", "sandbox")
}
ELSEWHERE = {
    *("HOME", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER_ARG"),
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PGSSLMODE", "PGSSLROOTCERT"),
}
"""Variables that are no settings of ours: of the system, torch, Postgres and OpenTelemetry."""
ETC = "/etc/regreen"


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The variables that a container is given, with something in place of its secrets."""
    return {entry["name"]: entry.get("value", "secret") for entry in container.get("env", [])}


def service_of(container: dict[str, Any]) -> str:
    """The service that a container runs, or nothing."""
    command = container.get("command", ["", "", ""])
    name, _, rest = command[2].partition("_svc")
    ours = command[:2] == ["python3", "-m"] and name in SETTINGS and rest in ("", ".migrate")
    return name if ours else ""


def mounted(objects: list[dict], pod: dict[str, Any], container: dict[str, Any]) -> Iterator[str]:
    """Paths of the files that Secrets and ConfigMaps put below `ETC`; those of whole Secrets as
    the docs say them."""
    whole = {"tls": ("ca.crt", "tls.crt", "tls.key"), "tokens": ("tokens.json",)}
    whole["blobs"] = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    maps = {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        if not mount["mountPath"].startswith(ETC):
            continue
        volume = volumes[mount["name"]]
        sources = volume.get("projected", {}).get("sources") or [volume]
        files = [item["path"] for s in sources for item in s.get("secret", {}).get("items", ())]
        if "configMap" in volume:
            files = list(maps[volume["configMap"]["name"]])
        for name in files or whole[mount["name"]]:
            yield f"{mount['mountPath']}/{name}"


class Reader:
    """A folder with what a container finds at `ETC`."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._place, self._patch = place, monkeypatch
        made = Certs.make(place / "certs")
        (place / "etc").mkdir()
        (place / "etc" / "tls").symlink_to(made.folder.path / "server")
        file = TokenFile(place / "etc" / "tokens" / "tokens.json")
        file.create("test", ["policy:write"], "test", timedelta(days=1), datetime.now(UTC))
        (place / "kubeconfig").write_text(json.dumps(_cluster()))
        monkeypatch.setenv("KUBECONFIG", str(place / "kubeconfig"))

    def settings(self, objects: list[dict], container: dict[str, Any]) -> Any:
        """The settings of the service in a container of these objects."""
        (pod,) = [
            pod
            for obj in objects
            for pod in chart.pods(obj)
            if any(one is container for one in pod["containers"])
        ]
        texts = {n: t for o in objects if o["kind"] == "ConfigMap" for n, t in o["data"].items()}
        for path in map(Path, mounted(objects, pod, container)):
            here = self._here(str(path))
            here.parent.mkdir(parents=True, exist_ok=True)
            if path.parent.name not in ("tls", "tokens"):
                here.write_text(texts.get(path.name, f"secret of {path.name}\n"))
        for name in [name for name in os.environ if name.startswith("REGREEN_")]:
            self._patch.delenv(name)
        for name, value in environment(container).items():
            assert name.startswith("REGREEN_") or name in ELSEWHERE, name
            self._patch.setenv(name, value)
        args = [arg.replace(ETC, str(self._here(ETC))) for arg in container.get("args", [])]
        return SETTINGS[service_of(container)].load(args)

    def _here(self, path: str) -> Path:
        return self._place / "etc" / Path(path).relative_to(ETC)


def _cluster() -> dict[str, Any]:
    """A front finds a cluster, as in a pod."""
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    return {
        **{"apiVersion": "v1", "kind": "Config", "current-context": "c"},
        **{"clusters": [cluster], "contexts": [context]},
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
