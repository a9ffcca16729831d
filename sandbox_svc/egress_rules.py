"""What a sandbox may reach: the host and port of a request, and addresses that nobody reaches.

- A host has one spelling here: lower case, IDNA A-labels, no trailing dot, canonical addresses.
  What has no such spelling (`0x7f.1`, zone ids, user names) is refused, never guessed at.
- `*.domain` stands for every name below the domain, not for the domain itself.
- Addresses are judged after resolution; the connection goes to the address that was judged.
- IPv4 addresses inside IPv6 ones (mapped, NAT64, 6to4, Teredo) are refused whatever is inside.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import idna

from regreen.rpc.errors import InvalidArgument

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORTS = frozenset({80, 443})
_MAX_ENTRIES = 256
_MAX_NAME = 253
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_INSIDE_6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        *("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48"),
        *("2001::/32", "2002::/16"),
    )
)
_ODD_4 = tuple(
    ipaddress.IPv4Network(text)
    for text in ("168.63.129.16/32", "192.88.99.0/24")  # a cloud's host agent; 6to4 relays
)


def normal_host(text: str) -> str:
    """The one spelling of a host name or literal address; IPv6 comes in brackets or without.

    Raises:
        ValueError: it has none; says why.
    """
    if text.startswith("[") and text.endswith("]"):
        return _normal_6(text[1:-1])
    if ":" in text:
        return _normal_6(text)
    if not text.isascii():
        try:
            text = idna.encode(text, uts46=True).decode("ascii")
        except idna.IDNAError as error:
            raise ValueError(f"is no internationalized name ({error})") from error
    name = text.lower().removesuffix(".")
    if not name or len(name) > _MAX_NAME:
        raise ValueError("is empty or too long")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError as error:
            raise ValueError("is an address in an unusual form") from error
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("is no host name")
    return name


def _normal_6(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise ValueError("is no IPv6 address") from error
    if address.scope_id is not None:
        raise ValueError("names a network interface")
    return str(address)


def split_authority(text: str, default_port: int | None) -> tuple[str, int]:
    """Host and port of `host`, `host:port`, `[v6]` or `[v6]:port`.

    Raises:
        ValueError: malformed, or without a port where there is no default.
    """
    if "@" in text:
        raise ValueError("carries a user name")
    host, colon, port = text, "", ""
    if text.startswith("["):
        inside, bracket, rest = text.partition("]")
        host, colon, port = inside + bracket, rest[:1], rest[1:]
        if rest and colon != ":":
            raise ValueError("is no address in brackets")
    elif ":" in text:
        host, colon, port = text.rpartition(":")
    if ":" in host and not host.startswith("["):
        raise ValueError("is an IPv6 address without brackets")
    if not port and default_port is not None:
        return normal_host(host), default_port
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65_536):
        raise ValueError("has no port from 1 to 65535")
    return normal_host(host), int(port)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of an allow list."""

    host: str
    below: bool
    """Whether it stands for the names below `host`."""
    ports: frozenset[int]

    def permits(self, host: str, port: int) -> bool:
        """Whether a host in its one spelling and a port are meant."""
        same = host.endswith(f".{self.host}") if self.below else host == self.host
        return same and port in self.ports


@dataclass(frozen=True, slots=True)
class AllowList:
    """The hosts that one sandbox may ask for."""

    rules: tuple[Rule, ...]

    def permits(self, host: str, port: int) -> bool:
        """Whether some entry means this host and port."""
        return any(rule.permits(host, port) for rule in self.rules)

    @classmethod
    def parse(cls, entries: Sequence[str]) -> "AllowList":
        """The list that a request asks for.

        Raises:
            InvalidArgument: an entry is malformed; names it.
        """
        if len(entries) > _MAX_ENTRIES:
            raise InvalidArgument(
                "egress.allow", f"has {len(entries)} entries", f"give at most {_MAX_ENTRIES}"
            )
        return cls(tuple(_rule(index, entry) for index, entry in enumerate(entries)))


def _rule(index: int, entry: str) -> Rule:
    below = entry.startswith("*.")
    try:
        host, port = split_authority(entry[2:] if below else entry, 0)
        if below and _is_address(host):
            raise ValueError("has no names below it")
    except ValueError as error:
        raise InvalidArgument(
            f"egress.allow[{index}]",
            f"{entry[:100]!r} {error}",
            'give names such as "pypi.org", "*.pythonhosted.org" or "example.org:8443"',
        ) from error
    return Rule(host, below, frozenset({port}) if port else DEFAULT_PORTS)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks of a comma-separated setting.

    Raises:
        ValueError: one is malformed.
    """
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


class AddressRules:
    """Which addresses are ever connected to, whoever asks and by whatever name."""

    def __init__(self, private: Iterable[Network] = ()) -> None:
        self._private = tuple(private)

    def problem(self, text: str) -> str:
        """Why an address is never connected to; empty when it may be."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return "is no address"
        if isinstance(address, ipaddress.IPv6Address):
            if address.scope_id is not None:
                return "names a network interface"
            if any(address in network for network in _INSIDE_6):
                return "is an IPv4 address inside an IPv6 one"
        if any(address.version == net.version and address in net for net in self._private):
            return ""
        return _kind(address) or ("is an address of this host" if _is_own(address) else "")


def _kind(address: Address) -> str:
    if address.is_loopback:
        return "is a loopback address"
    if address.is_link_local:
        return "is a link-local address"
    if address.is_multicast:
        return "is a multicast address"
    if isinstance(address, ipaddress.IPv6Address):
        odd = address not in _GLOBAL_6
    else:
        odd = any(address in network for network in _ODD_4)
    if odd or not address.is_global or address.is_reserved or address.is_unspecified:
        return "is a private or reserved address"
    return ""


def _is_own(address: Address) -> bool:
    """Whether the kernel would answer it itself; a datagram socket that connects sends nothing."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ipaddress.ip_address(probe.getsockname()[0]) == address
    except OSError:
        return False
