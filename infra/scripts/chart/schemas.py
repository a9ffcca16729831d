"""Validates objects by the schemas of the Kubernetes API and of the CRDs that the chart uses.

- The API's schemas come with kubernetes-validate, strict: unknown fields are errors.
- Those of CRDs lie in infra/helm/schemas, made from their projects' own (crd_schemas.py).
- A kind that has no schema is an error, never passed over.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = ("1.33", "1.37")
"""Oldest and newest release of Kubernetes that is checked."""
_CRDS = Path(__file__).resolve().parents[2] / "helm" / "schemas"
_API = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"


@functools.cache
def _registry(version: str) -> Registry:
    definitions = json.loads((_api(version) / "_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


def _api(version: str) -> Path:
    return _API / f"v{version}.0-local-strict"


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator | None:
    group, _, name = api_version.rpartition("/")
    crd = _CRDS / f"{kind.lower()}-{group}-{name}.json"
    if crd.is_file():
        schema = json.loads(crd.read_text())["schema"]
    else:
        short = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
        path = _api(version) / f"{kind.lower()}-{short}.json"
        if not path.is_file() or ("." in group and not group.endswith(".k8s.io")):
            return None
        schema = json.loads(path.read_text())
    return Draft202012Validator(schema, registry=_registry(version))


def problems(obj: dict[str, Any]) -> list[str]:
    """What an API server of these releases would refuse of an object."""
    return list(_problems(json.dumps(obj, sort_keys=True)))


@functools.cache
def _problems(text: str) -> list[str]:
    """By its text, as most objects of a case are those of the case before."""
    obj = json.loads(text)
    found: list[str] = []
    what = f"{obj.get('kind')}/{obj.get('metadata', {}).get('name')}"
    for version in VERSIONS:
        validator = _validator(str(obj.get("apiVersion")), str(obj.get("kind")), version)
        if validator is None:
            found.append(f"{what}: no schema of {obj.get('apiVersion')} in {version}")
            continue
        for error in validator.iter_errors(obj):
            line = f"{what}: {error.json_path}: {error.message[:200]}"
            if line not in found:
                found.append(line)
    return found
