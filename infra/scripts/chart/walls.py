"""Who may reach a pod, and what it may reach.

- Nobody comes in who is not named: no empty selector, no selector by keys alone, no wide block.
- Ways out to wide blocks are listed one by one: by pods, port, and the networks they leave out.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network

from chart.objects import Object, label, names_some

_WIDE = {4: 8, 6: 7}
"""Shorter prefixes than those of the widest private networks, 10.0.0.0/8 and fc00::/7."""
_METADATA = ("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::254/128")
"""Where clouds hand out credentials of the node."""
_PRIVATE = (
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "fc00::/7",
    *_METADATA,
)
_WAYS_OUT = {
    **{(who, 443): _PRIVATE for who in ("dataset", "learner", "workers")},
    **{(who, 5432): _METADATA for who in ("dataset", "migrate")},
    **{("sandbox", port): _METADATA for port in (443, 6443)},
}
"""Blob store and package index, a database by URL, and the front's way to the Kubernetes API,
whose address no chart knows."""


_DNS = 53
"""The one port on which such an address may be called: caches of names on the node have one."""
_OPERATORS = "cnpg.io/cluster"
"""Of pods whose way out is their operator's affair: they speak to the API and to their backups."""


def check_network(policy: Object) -> Iterator[str]:
    """A network policy lets in, and out to, nobody but those that it names."""
    at, who = label(policy), _selected(policy)
    types = set(policy["spec"].get("policyTypes") or ())
    needed = {"Ingress"} if _is_operators(policy) else {"Ingress", "Egress"}
    if missing := sorted(needed - types):
        yield f"{at}: policyTypes has no {', '.join(missing)}, so that is open: add what is missing"
    for number, rule in enumerate(policy["spec"].get("ingress") or []):
        yield from _unreadable(f"{at}: ingress[{number}].from", rule.get("from"))
        for field, everybody in _open_ends(rule.get("from")):
            yield f"{at}: ingress[{number}].from{field} is {everybody}, anybody: name who may call"
    for number, rule in enumerate(policy["spec"].get("egress") or []):
        yield from _unreadable(f"{at}: egress[{number}].to", rule.get("to"))
        yield from _credentials(f"{at}: egress[{number}].to", rule)
        for field, everybody in _open_ends(rule.get("to")):
            is_block = isinstance(everybody, dict) and "cidr" in everybody
            if not (is_block and _is_listed(who, rule.get("ports") or [], everybody)):
                yield (
                    f"{at}: egress[{number}].to{field} is {everybody}, anybody:"
                    " name what is called, or list this way out in infra/scripts/chart/walls.py"
                )


def _unreadable(at: str, peers: list[Object] | None) -> Iterator[str]:
    """Peers that no API server takes: blocks that are no networks, or not in each other."""
    for number, peer in enumerate(peers or []):
        block = peer.get("ipBlock") or {}
        if block and len(peer) > 1:
            beside = ", ".join(sorted(set(peer) - {"ipBlock"}))
            yield f"{at}[{number}] has {beside} beside an ipBlock: make two peers of it"
        left_out = block.get("except") or []
        for text in [block["cidr"], *left_out] if block else ():
            if _network(text) is None:
                yield f"{at}[{number}].ipBlock has {text}, which is no network: write 10.0.0.0/8"
        whole = _network(block["cidr"]) if block else None
        for text in left_out if whole else ():
            net = _network(text)
            if net and whole and (net == whole or not _covers(whole, net)):
                yield f"{at}[{number}].ipBlock leaves {text} out, which is not in it: drop that"


def _credentials(at: str, rule: Object) -> Iterator[str]:
    """Blocks that hold addresses where clouds hand out credentials, and do not leave them out."""
    ports = rule.get("ports") or []
    if ports and all(port.get("port") == _DNS and "endPort" not in port for port in ports):
        return
    for number, peer in enumerate(rule.get("to") or []):
        block = peer.get("ipBlock") or {}
        net = _network(block["cidr"]) if block else None
        left_out = [one for one in map(_network, block.get("except") or []) if one]
        for closed in map(ip_network, _METADATA):
            if net is None or net.version != closed.version or not net.overlaps(closed):
                continue
            common = max(net, closed, key=lambda one: one.prefixlen)
            if not any(_covers(one, common) for one in left_out):
                yield (
                    f"{at}[{number}].ipBlock is {block}, with {common}, where clouds hand out"
                    " credentials: leave it out, by except"
                )


def _open_ends(peers: list[Object] | None) -> Iterator[tuple[str, Object | str]]:
    """Fields of the peers that are everybody, and what they are."""
    if not peers:
        yield "", "empty"
    for number, peer in enumerate(peers or []):
        if not peer:
            yield f"[{number}]", "{}"
        if "ipBlock" in peer and _is_wide(peer["ipBlock"]):
            yield f"[{number}].ipBlock", peer["ipBlock"]
        # An empty selector of pods beside one of namespaces means all pods of those alone.
        selector = "namespaceSelector" if "namespaceSelector" in peer else "podSelector"
        if selector in peer and not names_some(peer[selector]):
            yield f"[{number}].{selector}", peer[selector] or "{}"


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def _is_wide(block: Object) -> bool:
    net = _network(block["cidr"])
    return net is not None and net.prefixlen < _WIDE[net.version]


def _is_listed(who: str, ports: list[Object], block: Object) -> bool:
    """Whether a way out to a wide block is one of the list, by each of its ports."""
    ways = [
        None  # a range is no port of the list
        if "endPort" in port or port.get("protocol", "TCP") != "TCP"
        else _WAYS_OUT.get((who, port.get("port")))
        for port in ports
    ]
    return bool(ways) and all(way is not None and _leaves_out(block, way) for way in ways)


def _leaves_out(block: Object, closed: Iterable[str]) -> bool:
    """Whether a block leaves out all these networks, as far as they are of its kind."""
    version = ip_network(block["cidr"], strict=False).version
    left_out = [one for one in map(_network, block.get("except") or []) if one]
    return all(
        any(_covers(one, net) for one in left_out)
        for net in map(ip_network, closed)
        if net.version == version
    )


def _covers(wide: IPv4Network | IPv6Network, net: IPv4Network | IPv6Network) -> bool:
    return wide.version == net.version and net.subnet_of(wide)


def _is_operators(policy: Object) -> bool:
    labels = (policy["spec"].get("podSelector") or {}).get("matchLabels") or {}
    return set(labels) == {_OPERATORS}


def _selected(policy: Object) -> str:
    """Whose policy it is, by the pods that it selects."""
    labels = (policy["spec"].get("podSelector") or {}).get("matchLabels") or {}
    if labels.get("app.kubernetes.io/name") == "regreen-sandbox":  # as the front labels its workers
        return "workers"
    return str(labels.get("app.kubernetes.io/component", ""))
