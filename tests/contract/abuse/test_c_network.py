"""C: attacks over the network, over loopback and over sockets in the file system."""

import asyncio
import json
from pathlib import Path

import pytest

from sandbox_svc import egress_probe
from sandbox_svc.backends.base import Command, Mount
from tests.contract.abuse.walls import apart, needs_python, python
from tests.contract.runtimes import SMALL, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Knocks at every door; with "serve" it first puts somebody behind each, on its own loopback.
_KNOCK = r"""
import errno, fcntl, json, socket, struct, sys, threading, time
PUBLIC, METADATA, NEAR = "192.0.2.77", "169.254.169.254", "fe80::77"
def name_query():
    return b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\7example\3org\0\0\1\0\1"
def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff
def stream(family, place):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(3)
        s.connect(place)
        return s.recv(16)
def datagram(place, data):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(3)
        s.sendto(data, place)
        return s.recv(512)
def echo(kind):
    with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as s:
        s.settimeout(3)
        packet = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + b"regreen!"
        packet = packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]
        s.sendto(packet, (PUBLIC, 0))
        return s.recv(512)
def serve_stream(family, place):
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    until = time.monotonic() + 10
    while True:
        try:
            server.bind(place)
            break
        except OSError as error:  # a new IPv6 address is tentative until a worker of the kernel ran
            if error.errno != errno.EADDRNOTAVAIL or time.monotonic() > until:
                raise
            time.sleep(0.01)
    server.listen()
    def run():
        while True:
            server.accept()[0].sendall(b"here")
    threading.Thread(target=run, daemon=True).start()
def serve_datagrams(place):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(place)
    def run():
        while True:
            data, who = server.recvfrom(512)
            server.sendto(data, who)
    threading.Thread(target=run, daemon=True).start()
def serve():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for number, address in enumerate(("127.0.0.1", PUBLIC, METADATA)):
            name = b"lo" if not number else b"lo:%d" % number
            if number:
                given = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(address))
                fcntl.ioctl(s, 0x8916, given)
            asked = fcntl.ioctl(s, 0x8913, struct.pack("16sh14x", name, 0))
            flags = struct.unpack("16sh14x", asked)
            fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", name, flags[1] | 1))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        address = socket.inet_pton(socket.AF_INET6, NEAR)
        fcntl.ioctl(s, 0x8916, struct.pack("16sIi", address, 64, socket.if_nametoindex("lo")))
    for place in (PUBLIC, 80), (METADATA, 80):
        serve_stream(socket.AF_INET, place)
    serve_stream(socket.AF_INET6, (NEAR, 80, 0, socket.if_nametoindex("lo")))
    for port in 53, 99:
        serve_datagrams((PUBLIC, port))
if "serve" in sys.argv:
    serve()
doors = {
    "tcp": lambda: stream(socket.AF_INET, (PUBLIC, 80)),
    "metadata": lambda: stream(socket.AF_INET, (METADATA, 80)),
    "ipv6 link-local": lambda: stream(
        socket.AF_INET6, (NEAR, 80, 0, socket.if_nametoindex("lo"))
    ),
    "udp": lambda: datagram((PUBLIC, 99), b"x"),
    "dns": lambda: datagram((PUBLIC, 53), name_query()),
    "icmp": lambda: echo(socket.SOCK_RAW),
    "icmp by datagram": lambda: echo(socket.SOCK_DGRAM),
}
answers = {}
for name, knock in doors.items():
    try:
        answers[name] = "REACHED" if knock() else "closed"
    except OSError as error:
        answers[name] = errno.errorcode.get(error.errno, type(error).__name__)
print(json.dumps(answers))
"""
_NO_ROUTE = {"ENETUNREACH", "EADDRNOTAVAIL", "EPERM", "EACCES", "EHOSTUNREACH"}


@needs_python
async def test_c1_nothing_outside_is_reached(box):
    done = await python(box, _KNOCK)
    answers = json.loads(done.stdout.text)
    assert set(answers.values()) <= _NO_ROUTE, answers
    assert answers["tcp"] == answers["udp"] == answers["metadata"] == "ENETUNREACH"
    interfaces = await sh(box, "cat /proc/net/dev | grep -c :; cat /proc/net/route | wc -l")
    assert interfaces.stdout.text.split() == ["1", "1"]


@needs_python
async def test_c1_with_a_network_the_same_knocks_are_answered():
    """In a network of its own, thrown away at once, whose loopback bears the addresses."""
    done = apart(["/usr/bin/python3", "-c", _KNOCK, "serve"], "-n")
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    answers = json.loads(done.stdout)
    by_datagram = answers.pop("icmp by datagram")
    assert answers == dict.fromkeys(answers, "REACHED"), done.stderr
    assert by_datagram in ("REACHED", "EACCES")  # net.ipv4.ping_group_range decides


@needs_python
async def test_c2_loopback_works_inside(box):
    script = (
        "import socket\n"
        "s = socket.create_server(('127.0.0.1', 0))\n"
        "c = socket.create_connection(s.getsockname())\n"
        "s.accept()[0].sendall(b'hello'); print(c.recv(5))\n"
    )
    assert (await python(box, script)).stdout.text == "b'hello'\n"


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no /bin/bash on this host")
async def test_c2_ports_of_the_host_are_not_reachable(outside, box):
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    script = f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo REACHED"
    knock = Command(("/bin/bash", "-c", script), cwd="/")
    try:
        assert (await box.run(knock)).stdout.text == ""
        hosts = await outside.create([], limits=SMALL)
        assert (await hosts.run(knock)).stdout.text == "REACHED\n"
        await hosts.delete()
    finally:
        server.close()


async def test_c3_sockets_of_the_host_are_absent(box):
    result = await sh(box, "ls /var/run/docker.sock /run/docker.sock /run/*.sock /root/.ssh")
    assert not result.ok
    assert result.stdout.text == ""


@needs_python
async def test_c3_a_socket_that_is_in_the_file_system_is_open_to_the_sandbox(runtime, common):
    async def greet(reader, writer):
        writer.write(b"REACHED")
        writer.close()

    server = await asyncio.start_unix_server(greet, common / "s")
    (common / "s").chmod(0o777)
    script = (
        "import socket, sys\ns = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\nprint(s.recv(9).decode())"
    )
    try:
        box = await runtime.create([], limits=SMALL)
        assert "FileNotFoundError" in (await python(box, script, f"{common}/s")).stderr.text
        given = await runtime.create([], limits=SMALL, mounts=[Mount(common, "/given")])
        assert (await python(given, script, "/given/s")).stdout.text == "REACHED\n"
        for one in (box, given):
            await one.delete()
    finally:
        server.close()


async def test_c4_the_proxy_is_the_only_way_out_and_guards_it(runtime):
    egress = await egress_probe.prove(runtime, enabled=True)
    assert egress.proven, egress.detail
