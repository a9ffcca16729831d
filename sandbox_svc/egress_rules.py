"""Addresses that nobody reaches through the proxy, whatever name leads to them.

- Addresses are judged after resolution; the connection goes to the address that was judged.
- IPv4 addresses inside IPv6 ones (mapped, NAT64, 6to4, Teredo) are refused whatever is inside.
"""

import ipaddress
import socket
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

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
        return "is a private or reserved address (egress_private names networks that are allowed)"
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
