"""Deliberately wrong network policies and roles: rows of test_wrong_objects.py.

- A row has a name, an object, the field that is changed, its value, and what a finding says.
"""

from typing import Any

WALL = "NetworkPolicy/regreen-judge"
WORKERS = "NetworkPolicy/regreen-workers"
DEFAULT = "NetworkPolicy/regreen-default"
NOBODY = {"matchLabels": {"a": "b"}}
DATA = "NetworkPolicy/regreen-dataset"
FRONTS = "NetworkPolicy/regreen-sandbox"
ROLE = "Role/regreen-sandbox"
BINDING = "RoleBinding/regreen-sandbox"
LINK_LOCAL = {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}
PRIVATE = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]
BUCKET = {"cidr": "0.0.0.0/0", "except": PRIVATE}
ADMIN = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}


def name(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator} | {"values": [*values]}]}


def into(*peers: Any) -> list[dict[str, Any]]:
    """Ingress from these."""
    return [{"from": [*peers], "ports": [{"port": 50054, "protocol": "TCP"}]}]


def out(peer: Any, *ports: Any) -> list[dict[str, Any]]:
    """Egress to a peer; ports by number, or as they are."""
    found = [one if isinstance(one, dict) else {"port": one, "protocol": "TCP"} for one in ports]
    return [{"to": [peer]} | ({"ports": found} if found else {})]


WALLS = [
    ("no peer", WALL, "spec.ingress", [{}], "ingress[0].from is empty, anybody"),
    ("list of no peers", WALL, "spec.ingress", into(), "ingress[0].from is empty"),
    ("any namespace", WALL, "spec.ingress", into({"namespaceSelector": {}}),
     "ingress[0].from[0].namespaceSelector is {}, anybody: name who"),
    ("any namespace's pods of a label", WALL, "spec.ingress",
     into({"namespaceSelector": {}, "podSelector": NOBODY}), "from[0].namespaceSelector"),
    ("any pod", WALL, "spec.ingress", into({"podSelector": NOBODY}, {"podSelector": {}}),
     "ingress[0].from[1].podSelector is {}"),
    ("every namespace has this", WALL, "spec.ingress",
     into({"namespaceSelector": name("kubernetes.io/metadata.name", "Exists")}), "namespaceSelect"),
    ("all but one", WALL, "spec.ingress", into({"podSelector": name("a", "NotIn", "b")}),
     "from[0].podSelector"),
    ("any address", WALL, "spec.ingress", into({"ipBlock": {"cidr": "0.0.0.0/0"}}),
     "ingress[0].from[0].ipBlock"),
    ("any address of version 6", WALL, "spec.ingress", into({"ipBlock": {"cidr": "::/0"}}),
     "from[0].ipBlock"),
    ("any but some", WALL, "spec.ingress", into({"ipBlock": LINK_LOCAL}), "from[0].ipBlock"),
    ("half of all", WALL, "spec.ingress", into({"ipBlock": {"cidr": "128.0.0.0/1"}}), "from[0].ip"),
    ("out to anybody", WALL, "spec.egress", [{}], "egress[0].to is empty, anybody"),
    ("out to any namespace", WALL, "spec.egress", out({"namespaceSelector": {}}, 53),
     "egress[0].to[0].namespaceSelector"),
    ("a way that is not listed", WALL, "spec.egress", out({"ipBlock": LINK_LOCAL}, 443),
     "egress[0].to[0].ipBlock"),
    ("port that is not listed", DATA, "spec.egress", out({"ipBlock": LINK_LOCAL}, 5432, 22),
     "egress[0].to[0].ipBlock"),
    ("any port", DATA, "spec.egress", out({"ipBlock": LINK_LOCAL}), "egress[0].to[0].ipBlock"),
    ("range of ports", DATA, "spec.egress",
     out({"ipBlock": LINK_LOCAL}, {"port": 5432, "endPort": 6000, "protocol": "TCP"}), "to[0].ip"),
    ("by UDP", DATA, "spec.egress", out({"ipBlock": LINK_LOCAL}, {"port": 5432, "protocol": "UDP"}),
     "egress[0].to[0].ipBlock"),
    ("out to the node's credentials", DATA, "spec.egress",
     out({"ipBlock": {"cidr": "0.0.0.0/0"}}, 5432), "egress[0].to[0].ipBlock"),
    ("no network", WALL, "spec.ingress", into({"ipBlock": {"cidr": "10.0.0.0/99"}}),
     "ingress[0].from[0].ipBlock has 10.0.0.0/99, which is no network"),
    ("leaves no network out", DATA, "spec.egress",
     out({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["all"]}}, 5432), "ipBlock has all, which"),
    ("block and pods", WALL, "spec.ingress",
     into({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": NOBODY}),
     "ingress[0].from[0] has podSelector beside an ipBlock: make two peers"),
    ("leaves out what is not in it", WALL, "spec.ingress",
     into({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}),
     "ipBlock leaves 11.0.0.0/16 out, which is not in it"),
    ("leaves all of it out", WALL, "spec.ingress",
     into({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}), "leaves 10.0.0.0/8 out"),
    ("policy out to a bucket", "NetworkPolicy/regreen-policy", "spec.egress",
     out({"ipBlock": BUCKET}, 443), "egress[0].to[0].ipBlock"),
    ("way out left open", WORKERS, "spec.policyTypes", ["Ingress"],
     "policyTypes has no Egress, so that is open: add"),
    ("way in left open", DATA, "spec.policyTypes", ["Egress"], "policyTypes has no Ingress"),
    ("types left out", WALL, "spec.policyTypes", None, "policyTypes has no Egress, Ingress"),
    ("workers to the node's credentials", WORKERS, "spec.egress",
     out({"ipBlock": {"cidr": "169.254.169.254/32"}}, 443),
     "with 169.254.169.254/32, where clouds hand out credentials: leave it out"),
    ("to them by version 6", WORKERS, "spec.egress",
     out({"ipBlock": {"cidr": "fd00:ec2::254/128"}}, 443), "with fd00:ec2::254/128, where"),
    ("network around them", WORKERS, "spec.egress", out({"ipBlock": {"cidr": "169.0.0.0/8"}}, 443),
     "with 169.254.0.0/16, where clouds"),
    ("half of them left out", DATA, "spec.egress",
     out({"ipBlock": {"cidr": "169.0.0.0/8", "except": ["169.254.0.0/17"]}}, 443),
     "with 169.254.0.0/16, where clouds"),
    ("names and more from them", DATA, "spec.egress",
     out({"ipBlock": {"cidr": "169.254.169.254/32"}}, 53, 80), "with 169.254.169.254/32, where"),
    ("front to the node's credentials", FRONTS, "spec.egress",
     out({"ipBlock": {"cidr": "0.0.0.0/0"}}, 6443), "egress[0].to[0].ipBlock is"),
    ("port of every node", "Service/regreen-judge", "spec.type", "NodePort", "type is NodePort"),
    ("open to the world", "Service/regreen-judge", "spec.type", "LoadBalancer", "type is LoadBal"),
    ("address of its own", "Service/regreen-judge", "spec.externalIPs", ["1.2.3.4"], "open beyond"),
    ("workers out to private networks", WORKERS, "spec.egress", out({"ipBlock": LINK_LOCAL}, 443),
     "egress[0].to[0].ipBlock"),
]  # fmt: skip
RIGHTS = [
    ("every verb", ROLE, "rules.0.verbs", ["get", "*"], "rules[0].verbs has the wildcard *"),
    ("every resource", ROLE, "rules.1.resources", ["*"], "rules[1].resources has the wildcard *"),
    ("every part", ROLE, "rules.0.resources", ["pods/*"], "resources has the wildcard pods/*"),
    ("every group", ROLE, "rules.0.apiGroups", ["*"], "rules[0].apiGroups has the wildcard *"),
    ("secrets", ROLE, "rules.0.resources", ["secrets"], "rules[0].resources has secrets"),
    ("escalation of rights", ROLE, "rules.0.verbs", ["escalate"], "rules[0].verbs has escalate"),
    ("another verb", ROLE, "rules.0.verbs", ["get", "patch"],
     "rules[0].verbs has patch of pods, which the front does not need"),
    ("all at a time", ROLE, "rules.0.verbs", ["deletecollection"], "has deletecollection of pods"),
    ("list of settings", ROLE, "rules.1.verbs", ["list"], "rules[1].verbs has list of configmaps"),
    ("another resource", ROLE, "rules.1.resources", ["services"], "rules[1].resources has serv"),
    ("role of the cluster", BINDING, "roleRef", ADMIN, "roleRef is cluster-admin"),
    ("another's account", BINDING, "subjects.0.namespace", "default", "subjects has regreen-sand"),
    ("everybody's role", BINDING, "subjects",
     [{"apiGroup": ADMIN["apiGroup"], "kind": "Group", "name": "system:authenticated"}],
     "subjects has system:authenticated"),
]  # fmt: skip
