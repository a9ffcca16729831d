"""Where a worker's pod may run, and what it is given of its namespace, read from words.

- A word that the API would refuse is refused here, before a front asks for a pod.
- Labels are `name=value` by comma, tolerations JSON, names of objects by comma.
"""

import json
import re
from typing import Any
from urllib.parse import urlsplit

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_LABEL}")
_VALUE = re.compile(rf"({_LABEL})?")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_TOLERATION = {"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}


def names(text: str) -> list[str]:
    """Names of objects, by comma.

    Raises:
        ValueError: one is none.
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    for word in found:
        if not _NAME.fullmatch(word):
            raise ValueError(f"{word!r} is no name of an object; give small letters and digits")
    return found


def labels(text: str) -> dict[str, str]:
    """Labels of nodes, by comma.

    Raises:
        ValueError: one is none.
    """
    found: dict[str, str] = {}
    for word in filter(None, map(str.strip, text.split(","))):
        key, equals, value = word.partition("=")
        if not equals or not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise ValueError(f"{word!r} is no label; give name=value, by comma")
        found[key] = value
    return found


def tolerations(text: str) -> list[dict[str, Any]]:
    """Tolerations, as a pod has them.

    Raises:
        ValueError: they are none.
    """
    remedy = 'give JSON such as [{"key": "a", "operator": "Exists", "effect": "NoSchedule"}]'
    try:
        found = json.loads(text or "[]")
    except ValueError:
        raise ValueError(f"is no JSON; {remedy}") from None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"is no list of tolerations; {remedy}")
    for one in found:
        wrong = [k for k, v in one.items() if type(v) is not _TOLERATION.get(k)]
        if wrong or one.get("effect", _EFFECTS[0]) not in _EFFECTS:
            raise ValueError(f"{json.dumps(one)} is no toleration; {remedy}")
        exists = one.get("operator", "Equal") == "Exists"
        if not exists and (one.get("operator", "Equal") != "Equal" or not one.get("key")):
            raise ValueError(f"{json.dumps(one)} names no taint; {remedy}")
        if exists and one.get("value"):
            raise ValueError(f"{json.dumps(one)}: Exists takes no value; {remedy}")
    return found


def index_url(text: str) -> str:
    """The URL of a package index, which stands in a pod's spec.

    Raises:
        ValueError: it is none, or has a password.
    """
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("is no URL; give https://host/simple/")
    if "@" in parts.netloc:
        raise ValueError(
            "would stand in the pods' specs with its password; "
            "put it into a Secret as REGREEN_INDEX_URL, and name that in kube_env_secrets"
        )
    return text
