"""What the proxy lets through, without a socket: spellings of hosts, allow lists, addresses."""

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regreen.allowlist import AllowList, normal_host, parse_hosts, split_authority
from regreen.rpc.errors import InvalidArgument
from sandbox_svc.egress_route import Upstream
from sandbox_svc.egress_rules import AddressRules, parse_networks


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("PyPI.org", "pypi.org"),
        ("pypi.org.", "pypi.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("pypi。org", "pypi.org"),
        ("127.0.0.1", "127.0.0.1"),
        ("１２７.0.0.1", "127.0.0.1"),
        ("[::0001]", "::1"),
        ("_sip.example", "_sip.example"),
    ],
)
def test_a_host_has_one_spelling(text, normal):
    assert normal_host(text) == normal


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", "a..b", "-a.b", "a b", "a\tb", "a/b", "a\\b", "a%2eb", "a?b", "a#b"),
        *("127.1", "0x7f.0.0.1", "0177.0.0.1", "2130706433", "0x7f000001", "127.0.0.1.1"),
        *("[fe80::1%eth0]", "[::1", "[127.0.0.1]", "x" * 300, ".".join(["a" * 63] * 5)),
    ],
)
def test_what_has_no_spelling_is_refused(text):
    with pytest.raises(ValueError, match=r"^(is|names|has) "):
        normal_host(text)


def test_authorities():
    assert split_authority("a.org", 80) == ("a.org", 80)
    assert split_authority("A.org.:8080", 80) == ("a.org", 8080)
    assert split_authority("[::1]:443", None) == ("::1", 443)
    for bad in ("a.org", "a.org:", "a.org:0", "a.org:65536", "a.org:x", "a.org:٤٤٣", "::1:443"):
        with pytest.raises(ValueError, match=r".+"):
            split_authority(bad, None)
    for bad in ("user@a.org:1", "user:pw@a.org", "a.org@b.org", "[::1]x"):
        with pytest.raises(ValueError, match=r".+"):
            split_authority(bad, 80)


def test_an_allow_list_means_what_it_says():
    found = AllowList.parse(["pypi.org", "*.Pythonhosted.org.", "index.test:8443", "[2001:db8::1]"])
    for host, port in (
        ("pypi.org", 443),
        ("pypi.org", 80),
        ("files.pythonhosted.org", 443),
        ("a.b.pythonhosted.org", 443),
        ("index.test", 8443),
        ("2001:db8::1", 443),
    ):
        assert found.permits(host, port), (host, port)
    for host, port in (
        ("pypi.org", 22),
        ("evil-pypi.org", 443),
        ("pypi.org.evil.test", 443),
        ("sub.pypi.org", 443),
        ("pythonhosted.org", 443),
        ("evilpythonhosted.org", 443),
        ("index.test", 443),
    ):
        assert not found.permits(host, port), (host, port)


@pytest.mark.parametrize(
    "entry",
    [
        *("", "*", "*.", "a.*.org", "**.org", "http://pypi.org", "pypi.org/simple", "u@pypi.org"),
        *("pypi.org:0", "pypi.org:99999", "*.127.0.0.1", "127.1", "a b"),
    ],
)
def test_malformed_entries_are_named(entry):
    with pytest.raises(InvalidArgument) as caught:
        AllowList.parse(["pypi.org", entry])
    assert caught.value.field == "egress.allow[1]"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.2.1"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.88.99.1"),
        *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1"),
        *("64:ff9b::808:808", "2002:7f00:1::", "2001:0:7f00:1::", "fe80::1", "fe80::1%1"),
        *("fd00:ec2::254", "fc00::1", "ff02::1", "fec0::1", "2001:db8::1", "not an address"),
    ],
)
def test_addresses_that_nobody_reaches(address):
    assert AddressRules().problem(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "151.101.0.223", "2606:4700::6810:85e5"])
def test_public_addresses_are_reached(address):
    assert AddressRules().problem(address) == ""


def test_a_setting_opens_private_networks_and_nothing_around_them():
    rules = AddressRules(parse_networks("127.0.0.0/8, fd00::/8"))
    assert rules.problem("127.0.0.1") == ""
    assert rules.problem("fd00::1") == ""
    for address in ("10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1"):
        assert rules.problem(address)
    assert parse_networks("") == ()
    with pytest.raises(ValueError, match=r"10\.0\.0\.1/8"):
        parse_networks("10.0.0.1/8")


def test_addresses_of_this_host_are_refused_though_they_be_public():
    infos = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    own = {str(info[4][0]).partition("%")[0] for info in infos}
    assert own
    assert all(AddressRules().problem(address) for address in own)


@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_no_private_address_hides_inside_another(number):
    inner = ipaddress.IPv4Address(number)
    for text in (f"::ffff:{inner}", f"64:ff9b::{inner}", f"::{inner}", f"2002:{number >> 16:x}::"):
        assert AddressRules().problem(text)


@given(st.text(max_size=40))
def test_a_normal_host_is_its_own_normal_form(text):
    try:
        host = normal_host(text)
    except ValueError:
        return
    assert normal_host(host) == host


def test_an_upstream_keeps_its_password_out_of_errors():
    found = Upstream.parse("http://user:p%40ss@proxy.test:3128")
    assert (found.host, found.port, found.tls) == ("proxy.test", 3128, False)
    assert found.authorization == "Basic dXNlcjpwQHNz"
    for bad in ("proxy.test:3128", "ftp://u:hunter2@p", "http://u:hunter2@p:port", "http://"):
        with pytest.raises(ValueError, match="give http") as caught:
            Upstream.parse(bad)
        assert "hunter2" not in str(caught.value)


ENTRIES = st.builds(
    lambda below, name, port: f"{'*.' * below}{name}{port}",
    st.booleans(),
    st.sampled_from(["test", "a.test", "b.a.test", "xa.test"]),
    st.sampled_from(["", ":80", ":8443"]),
)
NAMES = ("test", "a.test", "b.a.test", "c.b.a.test", "xa.test", "other")


@given(st.lists(ENTRIES, min_size=1, max_size=4), ENTRIES)
def test_what_a_list_covers_it_permits_and_only_that(ours, asked):
    ceiling, (rule,) = AllowList.parse(ours), AllowList.parse([asked]).rules
    places = [(host, port) for host in NAMES for port in (80, 443, 8443)]
    meant = [place for place in places if rule.permits(*place)]
    within = all(ceiling.permits(*place) for place in meant)
    assert within or not ceiling.covers(rule)
    if not rule.below:
        assert ceiling.covers(rule) == within


def test_a_domain_is_covered_by_itself_and_by_those_above_it():
    ceiling = AllowList.parse(["*.example.org", "example.org:8443"])
    for entry, covered in (
        ("*.example.org", True),
        ("*.a.example.org:443", True),
        ("a.example.org", True),
        ("example.org:8443", True),
        ("example.org", False),
        ("*.org", False),
        ("*.example.org:8443", False),
        ("*.notexample.org", False),
    ):
        assert ceiling.covers(AllowList.parse([entry]).rules[0]) == covered, entry


def test_a_setting_of_hosts_is_empty_or_a_list():
    assert parse_hosts(" , ", "egress_hosts") is None
    found = parse_hosts("pypi.org, *.pythonhosted.org:443", "egress_hosts")
    assert found == AllowList.parse(["pypi.org", "*.pythonhosted.org:443"])
    with pytest.raises(InvalidArgument, match=r"egress_hosts\[1\]"):
        parse_hosts("pypi.org, http://x", "egress_hosts")
