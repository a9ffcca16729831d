"""Writes infra/helm/schemas from CustomResourceDefinitions, for `make chart`.

- Usage: crd_schemas.py OWNER/NAME@COMMIT CHECKOUT PATH...; run where PyYAML is. Sources are named
  in infra/helm/schemas/README.md.
- Descriptions go, defaults go, and pod templates refer to the API's own schema, which is stricter:
  of two megabytes some kilobytes are left. CEL rules cannot be kept.
- What a CRD would prune without a word is refused here: objects have no unknown fields.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).resolve().parents[1] / "helm" / "schemas"
POD_TEMPLATE = {
    "$ref": "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.core.v1.PodTemplateSpec"
}
KEPT = {
    *("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems"),
    *("maxItems", "minProperties", "maxProperties", "required", "oneOf", "anyOf", "allOf", "not"),
}


def is_pod_template(schema: dict[str, Any]) -> bool:
    """Whether an object is a template of pods."""
    spec = schema.get("properties", {}).get("spec", {})
    return "metadata" in schema.get("properties", {}) and "containers" in spec.get("properties", {})


def converted(schema: dict[str, Any], closed: bool = True) -> dict[str, Any]:
    """A structural schema as plain JSON Schema."""
    if is_pod_template(schema):
        return POD_TEMPLATE
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("oneOf", "anyOf", "allOf"):
            found[key] = [converted(one, closed=False) for one in value]
        elif key == "not":
            found[key] = converted(value, closed=False)
        elif key in KEPT:
            found[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        found = {k: v for k, v in found.items() if k != "anyOf"} | {"type": ["integer", "string"]}
    elif schema.get("nullable") and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    if "items" in schema:
        found["items"] = converted(schema["items"])
    if "properties" in schema:
        found["properties"] = {k: converted(v) for k, v in schema["properties"].items()}
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        found["additionalProperties"] = converted(more)
    elif closed and "properties" in schema:
        found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return found


def main() -> None:
    """Write a file for each served and stored version."""
    source, checkout, *paths = sys.argv[1:]
    for path in paths:
        crd = yaml.load(Path(checkout, path).read_text(), Loader=yaml.CSafeLoader)["spec"]
        for version in crd["versions"]:
            if not version["storage"]:
                continue
            kind, group, name = crd["names"]["kind"], crd["group"], version["name"]
            schema = converted(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            made = {
                "source": f"{source}:{path}",
                "apiVersion": f"{group}/{name}",
                "kind": kind,
                "schema": schema,
            }
            text = json.dumps(made, separators=(",", ":"), sort_keys=True) + "\n"
            (OUT / f"{kind.lower()}-{group}-{name}.json").write_text(text)


if __name__ == "__main__":
    main()
