"""What service accounts may do.

- Every right is named, and given to accounts of the release alone.
"""

from collections.abc import Iterator

from chart.objects import Object, label

_POWERS = {
    "verbs": {"bind", "escalate", "impersonate"},
    "resources": {"secrets", "serviceaccounts/token", "nodes/proxy", "pods/exec", "pods/attach"},
}
"""Rights that lead to all others, or into other pods."""
_AGENTS = "extensions.agents.x-k8s.io"
_NEEDED = {
    ("", "pods"): {"get", "list", "watch", "create", "delete"},
    ("", "configmaps"): {"get", "create", "update", "delete"},
    **{
        (_AGENTS, kind): {"get", "list", "create", "delete"}
        for kind in ("sandboxtemplates", "sandboxwarmpools", "sandboxclaims")
    },
}
"""What the front does with which objects (sandbox_svc/fleet/kube.py); nothing else has rights."""


def check_rights(objects: list[Object]) -> Iterator[str]:
    """What is wrong with roles and with who has them."""
    roles = {(one["kind"], one["metadata"]["name"]) for one in objects}
    accounts = {
        (one["metadata"].get("namespace"), one["metadata"]["name"])
        for one in objects
        if one["kind"] == "ServiceAccount"
    }
    for obj in objects:
        if obj["kind"] in ("Role", "ClusterRole"):
            yield from check_role(obj)
        elif obj["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            role = obj["roleRef"]
            if (role["kind"], role["name"]) not in roles:
                yield f"{label(obj)}: roleRef is {role['name']}: name a role of the release"
            for who in obj.get("subjects") or []:
                if who["kind"] != "ServiceAccount" or _name(who) not in accounts:
                    yield f"{label(obj)}: subjects has {who['name']}: name a release's account"


def check_role(role: Object) -> Iterator[str]:
    """A role lists what it gives, and no more than that."""
    if role.get("aggregationRule"):
        yield f"{label(role)}: aggregationRule takes others' rules in: list them in rules"
    for number, rule in enumerate(role.get("rules") or []):
        for field in ("apiGroups", "resources", "verbs", "nonResourceURLs"):
            at = f"{label(role)}: rules[{number}].{field}"
            for word in rule.get(field) or []:
                if "*" in word:
                    yield f"{at} has the wildcard {word}: name each that is needed"
                elif word in _POWERS.get(field, ()):
                    yield f"{at} has {word}, which gives more than it says: leave it out"
        yield from check_needed(f"{label(role)}: rules[{number}]", rule)


def check_needed(at: str, rule: Object) -> Iterator[str]:
    """A rule gives what the front needs, of these objects, and no other verb."""
    for group in rule.get("apiGroups") or [""]:
        for resource in rule.get("resources") or []:
            if "*" in group + resource or resource in _POWERS["resources"]:
                continue  # told already
            if (needed := _NEEDED.get((group, resource))) is None:
                yield f"{at}.resources has {resource}, which the front does not need: leave it out"
                continue
            known = needed | _POWERS["verbs"]
            for verb in (one for one in rule["verbs"] if "*" not in one and one not in known):
                yield f"{at}.verbs has {verb} of {resource}, which the front does not need: drop it"


def _name(subject: Object) -> tuple[str | None, str]:
    return subject.get("namespace"), subject["name"]
