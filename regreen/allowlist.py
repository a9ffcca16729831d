"""Lists of hosts that may be asked for: one grammar for requests, tasks and settings.

- An entry is a name with an optional port: "pypi.org", "*.pythonhosted.org", "example.org:8443".
- A host has one spelling here: lower case, IDNA A-labels, no trailing dot, canonical addresses.
  What has no such spelling (`0x7f.1`, zone ids, user names) is refused, never guessed at.
- `*.domain` stands for every name below the domain, not for the domain itself.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

import idna

from regreen.rpc.errors import InvalidArgument

DEFAULT_PORTS = frozenset({80, 443})
_MAX_ENTRIES = 256
_MAX_NAME = 253
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


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
    if "/" in text:
        raise ValueError("is a URL or a path, and a host is asked for")
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

    def covers(self, rule: Rule) -> bool:
        """Whether every host and port that a rule means is meant here too."""
        if not rule.below:
            return all(self.permits(rule.host, port) for port in rule.ports)
        wider = [
            ours
            for ours in self.rules
            if ours.below and (rule.host == ours.host or rule.host.endswith(f".{ours.host}"))
        ]
        return all(any(port in ours.ports for ours in wider) for port in rule.ports)

    @classmethod
    def parse(cls, entries: Sequence[str], field: str = "egress.allow") -> "AllowList":
        """The list that a request asks for in `field`.

        Raises:
            InvalidArgument: an entry is malformed; names it.
        """
        if len(entries) > _MAX_ENTRIES:
            raise InvalidArgument(
                field, f"has {len(entries)} entries", f"give at most {_MAX_ENTRIES}"
            )
        return cls(tuple(_rule(f"{field}[{at}]", entry) for at, entry in enumerate(entries)))


def _rule(field: str, entry: str) -> Rule:
    below = entry.startswith("*.")
    try:
        host, port = split_authority(entry[2:] if below else entry, 0)
        if below and _is_address(host):
            raise ValueError("has no names below it")
    except ValueError as error:
        raise InvalidArgument(
            field,
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


def parse_hosts(text: str, field: str) -> AllowList | None:
    """The hosts of a comma-separated setting; None where it is empty.

    Raises:
        InvalidArgument: one is malformed.
    """
    entries = [part.strip() for part in text.split(",") if part.strip()]
    return AllowList.parse(entries, field) if entries else None
