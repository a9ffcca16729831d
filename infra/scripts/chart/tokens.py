"""Which pod may have which token and which certificate of the platform's own.

- One Secret holds the tokens of all parts, each an entry named as its part: a pod mounts its own
  entry, and never the whole.
- The Secret is known by where tokens are mounted, whatever its name is.
- A certificate is a Secret PREFIX-PART-tls, which the pods of that part mount and no others.
"""

import re
from collections.abc import Iterator

from chart.objects import Object, label, labels_of

_PLACE = "/etc/regreen/token"
_DEFAULT = "regreen-client-tokens"
_CERTIFICATES = re.compile(
    r"(?:.*-)?(dataset|sandbox|sandbox-worker|policy|judge|learner|rollout|driver|operator)-tls"
)
_DRIVERS = {"driver", "operator"}
"""Entries for pods that are no part of the release; one of them at a time."""


def check_tokens(pods: list[tuple[Object, Object]]) -> Iterator[str]:
    """Each pod has no token but its own, as a file."""
    specs = [template["spec"] for _, template in pods]
    names = {_DEFAULT} | {name for spec in specs for name in _at_place(spec)}
    for obj, template in pods:
        own = _own(labels_of(template))
        for volume in template["spec"].get("volumes") or []:
            for name, source in _secrets(volume):
                if name in names:
                    yield from _check(f"{label(obj)}: volumes[{volume['name']}]", source, own)
        for container in template["spec"]["containers"]:
            refs = [one.get("secretRef") for one in container.get("envFrom") or []]
            refs += [
                (one.get("valueFrom") or {}).get("secretKeyRef")
                for one in container.get("env") or []
            ]
            if any(ref and ref["name"] in names for ref in refs):
                yield f"{label(obj)}: {container['name']}: env has tokens: mount the part's own"


def check_certificates(pods: list[tuple[Object, Object]]) -> Iterator[str]:
    """Each pod has no certificate but its own."""
    for obj, template in pods:
        own = _own(labels_of(template))
        own = own | {"rollout"} if own == _DRIVERS else own
        named = [
            (f"volumes[{volume['name']}]", name)
            for volume in template["spec"].get("volumes") or []
            for name, _ in _secrets(volume)
        ]
        for container in template["spec"]["containers"]:
            refs = [one.get("secretRef") for one in container.get("envFrom") or []]
            refs += [
                (one.get("valueFrom") or {}).get("secretKeyRef")
                for one in container.get("env") or []
            ]
            named += [(f"{container['name']}: env", ref["name"]) for ref in refs if ref]
        for at, name in named:
            part = _CERTIFICATES.fullmatch(name)
            if part and part[1] not in own:
                yield f"{label(obj)}: {at} has the certificate {name}: mount this part's own"


def _check(at: str, source: Object, own: set[str]) -> Iterator[str]:
    keys = {item["key"] for item in source.get("items") or []}
    if not keys:
        yield f"{at} has the tokens of all parts: give items with this part's own"
    elif len(keys) > 1 or not keys <= own:
        yield f"{at} has the tokens {sorted(keys)}, not this part's own: give items with that alone"


def _own(labels: Object) -> set[str]:
    if labels.get("regreen.dev/driver") == "true":
        return _DRIVERS
    return {str(labels.get("app.kubernetes.io/component", ""))}


def _at_place(spec: Object) -> Iterator[str]:
    """Secrets that are mounted where tokens are."""
    mounted = {
        mount["name"]
        for container in spec["containers"]
        for mount in container.get("volumeMounts") or []
        if mount["mountPath"] == _PLACE
    }
    for volume in spec.get("volumes") or []:
        if volume["name"] in mounted:
            yield from (name for name, _ in _secrets(volume))


def _secrets(volume: Object) -> Iterator[tuple[str, Object]]:
    """Secrets of a volume, by name, with what is taken of them."""
    if secret := volume.get("secret"):
        yield str(secret.get("secretName")), secret
    for source in (volume.get("projected") or {}).get("sources") or []:
        if secret := source.get("secret"):
            yield str(secret.get("name")), secret
