"""The proxy that is the only way out, from real sandboxes to real servers."""

import asyncio
import hashlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from regreen.rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from sandbox_svc import metrics
from sandbox_svc.egress_exchange import Bounds
from tests.integration.sandbox.egressing import echo, until, web, world

_ROOT = Path(__file__).parents[3]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path) as found:
        yield found


async def test_without_the_wish_there_is_no_network_at_all(here):
    sandbox = await here.sandboxes.create_sandbox(here.state.id)
    result = await here.sandboxes.run(sandbox.id, ["env"])
    assert b"proxy" not in result.stdout.head.lower()
    script = (
        "import socket\n"
        "for place in (('127.0.0.1', 3128), ('192.0.2.1', 80), ('8.8.8.8', 53)):\n"
        "    try: socket.create_connection(place, 3); print('connected')\n"
        "    except OSError as error: print(error.errno)"
    )
    result = await here.sandboxes.run(sandbox.id, ["/usr/bin/python3", "-I", "-c", script])
    assert result.stdout.head == b"111\n101\n101\n"
    with pytest.raises(NotFound):
        await here.records.list_egress(sandbox.id)


async def test_an_allowed_host_is_reached_and_the_request_recorded(here):
    async with web(b"the index") as seen:
        here.names.answers["index.test"] = [["127.0.0.1"]]
        sandbox = await here.sandbox(f"index.test:{seen.port}")
        url = f"http://index.test:{seen.port}/simple/?q=1"
        assert await here.fetch(sandbox, url, "a=b") == "200 the index"
    (record,) = await here.asked(sandbox)
    assert (record.method, record.host, record.port) == ("POST", "index.test", seen.port)
    assert (record.path, record.allowed, record.status) == ("/simple/?q=1", True, 200)
    assert (record.sent_bytes, record.sent_sha256) == (3, sha256(b"a=b"))
    assert (record.received_bytes, record.received_sha256) == (9, sha256(b"the index"))
    assert record.sandbox_id == sandbox.id
    assert record.create_time.ToSeconds() > 0
    assert seen.bodies == [b"a=b"]
    assert seen.heads[0].startswith(b"POST /simple/?q=1 HTTP/1.1\r\n")


async def test_what_is_not_allowed_is_refused_and_recorded(here):
    async with web() as seen:
        here.names.answers["index.test"] = [["127.0.0.1"]]
        sandbox = await here.sandbox(f"index.test:{seen.port}")
        for url in (
            f"http://other.test:{seen.port}/",
            "http://index.test/",
            f"http://127.0.0.1.nip.test:{seen.port}/",
        ):
            assert (await here.fetch(sandbox, url)).startswith("403 regreen egress:")
        assert (await here.fetch(sandbox, "http://index.test:1/", "x" * 100_000))[:3] == "403"
        plain = f"GET http://127.0.0.1:{seen.port}/ HTTP/1.1\r\nHost: 127.0.0.1:{seen.port}\r\n\r\n"
        assert b" 403 " in await here.talk(sandbox, plain.encode())
        tunnel = f"CONNECT 127.0.0.1:{seen.port} HTTP/1.1\r\nHost: x\r\n\r\n"
        assert b" 400 " in await here.talk(sandbox, tunnel.encode())
    assert seen.heads == []
    assert here.names.asked == []
    records = await here.asked(sandbox)
    assert [record.allowed for record in records] == [False] * 6
    assert [record.status for record in records] == [403] * 5 + [400]
    assert "allow list" in records[0].detail
    assert (records[0].host, records[0].port) == ("other.test", seen.port)


async def test_straight_connections_fail_though_there_is_a_proxy(here):
    async with web() as seen:
        sandbox = await here.sandbox(f"index.test:{seen.port}", "8.8.8.8:53")
        script = (
            "import socket\n"
            f"for place in (('127.0.0.1', {seen.port}), ('8.8.8.8', 53)):\n"
            "    try: socket.create_connection(place, 3); print('connected')\n"
            "    except OSError as error: print(error.errno)\n"
            "way = socket.create_connection(('127.0.0.1', 3128), 3); print('proxy')\n"
            "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as names:\n"
            "    try: names.sendto(b'x', ('8.8.8.8', 53)); print('sent')\n"
            "    except OSError as error: print(error.errno)"
        )
        result = await here.sandboxes.run(sandbox.id, ["/usr/bin/python3", "-I", "-c", script])
        assert result.stdout.head == b"111\n101\nproxy\n101\n"


async def test_private_addresses_are_refused_by_whatever_name(tmp_path):
    async with world(tmp_path, private=()) as here, web() as seen:
        answers = {
            "loop.test": ["127.0.0.1"],
            "mapped.test": ["::ffff:127.0.0.1"],
            "meta.test": ["169.254.169.254"],
            "lan.test": ["10.0.0.7"],
            "mixed.test": ["8.8.8.8", "127.0.0.1"],
        }
        here.names.answers |= {name: [found] for name, found in answers.items()}
        allow = [f"{name}:{seen.port}" for name in answers]
        sandbox = await here.sandbox(*allow, f"127.0.0.1:{seen.port}")
        for place in allow:
            assert (await here.fetch(sandbox, f"http://{place}/"))[:3] == "403"
        tunnel = f"CONNECT 127.0.0.1:{seen.port} HTTP/1.1\r\n"
        tunnel += f"Host: 127.0.0.1:{seen.port}\r\n\r\n"
        assert b" 403 " in await here.talk(sandbox, tunnel.encode())
        assert seen.heads == []
        records = await here.asked(sandbox)
        assert [record.allowed for record in records] == [False] * 6
        assert "loopback" in records[0].detail
        assert "link-local" in records[2].detail


async def test_a_name_server_that_changes_its_answer_gains_nothing(tmp_path):
    async with world(tmp_path) as here, web(b"first") as first:
        here.names.answers["shifty.test"] = [["127.0.0.1"], ["169.254.169.254"]]
        sandbox = await here.sandbox(f"shifty.test:{first.port}")
        url = f"http://shifty.test:{first.port}/"
        assert await here.fetch(sandbox, url) == "200 first"
        assert here.names.asked == ["shifty.test"]
        assert (await here.fetch(sandbox, url))[:3] == "403"
        assert here.names.asked == ["shifty.test"] * 2
        assert len(first.heads) == 1


async def test_a_tunnel_is_opaque_and_counted(here):
    async with echo() as seen:
        here.names.answers["raw.test"] = [["127.0.0.1"]]
        sandbox = await here.sandbox(f"raw.test:{seen.port}")
        sent = bytes(range(256)) * 4000
        script = (
            "import hashlib, socket, sys\n"
            "way = socket.create_connection(('127.0.0.1', 3128), timeout=20)\n"
            f"way.sendall(b'CONNECT raw.test:{seen.port} HTTP/1.1\\r\\n"
            f"Host: raw.test:{seen.port}\\r\\n\\r\\n' + b'early')\n"
            "answer = way.recv(1000)\n"
            "import threading\n"
            "def feed():\n"
            "    way.sendall(bytes(range(256)) * 4000); way.shutdown(socket.SHUT_WR)\n"
            "threading.Thread(target=feed).start()\n"
            "got = answer.partition(b'\\r\\n\\r\\n')[2]\n"
            "while data := way.recv(65536): got += data\n"
            "print(answer[:12].decode(), hashlib.sha256(got).hexdigest())"
        )
        result = await here.sandboxes.run(sandbox.id, ["/usr/bin/python3", "-I", "-c", script])
        digest = sha256(b"early" + sent)
        assert result.stdout.head.decode().split() == ["HTTP/1.1", "200", digest]
        await until(lambda: seen.bodies)
    assert seen.bodies == [b"early" + sent]
    (record,) = await here.asked(sandbox)
    assert (record.method, record.host, record.path, record.status) == (
        *("CONNECT", "raw.test", "", 200),
    )
    assert record.sent_bytes == record.received_bytes == len(sent) + 5
    assert record.sent_sha256 == record.received_sha256 == digest


async def test_tls_goes_through_end_to_end(here, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    made += ["-nodes", "-keyout", "key", "-out", "cert", "-days", "2", "-subj", "/CN=web.test"]
    made += ["-addext", "subjectAltName=DNS:web.test"]
    await asyncio.to_thread(subprocess.run, made, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    async with web(b"over tls", tls=context) as seen:
        here.names.answers["web.test"] = [["127.0.0.1"]]
        sandbox = await here.sandbox(f"web.test:{seen.port}")
        authority = (tmp_path / "cert").read_bytes()
        await here.sandboxes.write_file(sandbox.id, "/work/home/ca.pem", authority)
        script = (
            "import ssl, sys, urllib.request\n"
            "trust = ssl.create_default_context(cafile='/work/home/ca.pem')\n"
            "print(urllib.request.urlopen(sys.argv[1], context=trust, timeout=20).read())"
        )
        url = f"https://web.test:{seen.port}/secret"
        argv = ["/usr/bin/python3", "-I", "-c", script, url]
        result = await here.sandboxes.run(sandbox.id, argv)
        assert result.stdout.head == b"b'over tls'\n", result.stderr.head.decode()
        fronting = (
            "import socket, ssl, sys\n"
            "way = socket.create_connection(('127.0.0.1', 3128), timeout=20)\n"
            "head = f'CONNECT {sys.argv[1]} HTTP/1.1\\r\\nHost: {sys.argv[1]}\\r\\n\\r\\n'\n"
            "way.sendall(head.encode())\n"
            "print(way.recv(1000)[:12])\n"
            "trust = ssl._create_unverified_context()\n"
            "try: trust.wrap_socket(way, server_hostname='neighbour.test'); print('reached')\n"
            "except OSError: print('ended')"
        )
        argv = ["/usr/bin/python3", "-I", "-c", fronting, f"web.test:{seen.port}"]
        result = await here.sandboxes.run(sandbox.id, argv)
        assert result.stdout.head == b"b'HTTP/1.1 200'\nended\n"
    record, refused = await here.asked(sandbox)
    assert (record.method, record.path) == ("CONNECT", "")
    assert record.received_bytes > len("over tls")
    assert b"/secret" in seen.heads[0]
    assert len(seen.heads) == 1
    assert not refused.allowed
    assert refused.sent_bytes == 0
    assert "neighbour.test" in refused.detail


async def test_headers_of_proxies_and_of_the_connection_do_not_pass(here):
    async with web(b"x", extra=b"Proxy-Authenticate: Basic\r\nX-Kept: 1\r\n") as seen:
        here.names.answers["index.test"] = [["127.0.0.1"]]
        place = f"index.test:{seen.port}"
        sandbox = await here.sandbox(place)
        head = (
            f"GET http://{place}/ HTTP/1.1\r\nHost: {place}\r\nProxy-Authorization: Basic c2VjcmV0"
            "\r\nProxy-Connection: keep-alive\r\nConnection: X-Hop, close\r\nX-Hop: 1\r\nTE: gzip"
            "\r\nUpgrade: websocket\r\nX-Kept: 1\r\n\r\n"
        )
        answer = await here.talk(sandbox, head.encode())
    assert b"200" in answer.split(b"\r\n")[0]
    assert b"x-kept: 1" in answer.lower()
    assert b"proxy-" not in answer.lower()
    head = seen.heads[0].lower()
    assert b"x-kept: 1" in head
    for gone in (b"proxy-", b"x-hop", b"\r\nte:", b"upgrade", b"c2vjcmv0"):
        assert gone not in head


AMBIGUOUS = [
    "GET / HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "GET http://index.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n",
    "GET http://index.test/ HTTP/1.1\r\nHost: index.test:81\r\n\r\n",
    "GET http://index.test/ HTTP/1.1\r\nHost: index.test\r\nHost: other.test\r\n\r\n",
    "GET http://user:pw@index.test/ HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "GET http://index.test@other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n",
    "GET http://index.test\\@other.test/ HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "GET https://index.test/ HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "GET file:///etc/passwd HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "CONNECT index.test HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "CONNECT index.test:443 HTTP/1.1\r\nHost: other.test\r\n\r\n",
    "CONNECT http://index.test:443/ HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "GET http://2130706433/ HTTP/1.1\r\nHost: 2130706433\r\n\r\n",
    "GET http://[::ffff:127.0.0.1%25lo]/ HTTP/1.1\r\nHost: index.test\r\n\r\n",
    "\x16\x03\x01\x02 not http at all\r\n\r\n",
    "GET http://index.test/ HTTP/1.1\r\nHost: index.test\r\nX: " + "y" * 70_000 + "\r\n\r\n",
]


async def test_ambiguous_and_malformed_requests_go_nowhere(here):
    here.names.answers |= {name: [["127.0.0.1"]] for name in ("index.test", "other.test")}
    sandbox = await here.sandbox("index.test")
    for head in AMBIGUOUS:
        status = (await here.talk(sandbox, head.encode("latin-1"))).split(b" ")[1]
        assert status in (b"400", b"431"), head[:80]
    assert here.names.asked == []
    records = await here.asked(sandbox)
    assert len(records) == len(AMBIGUOUS)
    assert not any(record.allowed for record in records)
    assert all(record.detail for record in records)


async def test_one_connection_carries_one_request(here):
    async with web(b"once") as seen:
        here.names.answers["index.test"] = [["127.0.0.1"]]
        place = f"index.test:{seen.port}"
        sandbox = await here.sandbox(place)
        head = f"GET http://{place}/a HTTP/1.1\r\nHost: {place}\r\n\r\n"
        again = head.replace("/a", "/b").replace("index.test", "other.test")
        smuggled = (
            f"POST http://{place}/c HTTP/1.1\r\nHost: {place}\r\nContent-Length: 60\r\n"
            "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /d HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert (await here.talk(sandbox, (head + again).encode())).count(b"HTTP/1.1") == 1
        assert (await here.talk(sandbox, smuggled.encode())).count(b"HTTP/1.1") == 1
    assert [head.split(b" ")[1] for head in seen.heads] == [b"/a", b"/c"]
    assert b"content-length" not in seen.heads[1].lower()


async def test_malformed_wishes_are_named(here):
    with pytest.raises(InvalidArgument, match=r"egress\.allow\[1\].*give names such as"):
        await here.sandbox("index.test", "http://index.test/")


async def test_a_service_can_refuse_every_wish(tmp_path):
    async with world(tmp_path, enabled=False) as here:
        with pytest.raises(FailedPrecondition, match="egress=true"):
            await here.sandbox("index.test")
        assert (await here.sandboxes.list_sandboxes()).sandboxes == []


async def test_the_way_out_is_inherited_and_outlives_what_is_behind_it(here):
    async with web(b"up") as seen:
        here.names.answers["index.test"] = [["127.0.0.1"]]
        url = f"http://index.test:{seen.port}/"
        sandbox = await here.sandbox(f"index.test:{seen.port}")
        assert await here.fetch(sandbox, url) == "200 up"
        forked = await here.sandboxes.fork_sandbox(sandbox.id, 2)
        for one in (sandbox, *forked.sandboxes):
            assert await here.fetch(one, url) == "200 up"
        snapshot = await here.sandboxes.snapshot_sandbox(sandbox.id)
        assert await here.fetch(sandbox, url) == "200 up"
        await here.sandboxes.restore_sandbox(sandbox.id, here.state.id)
        assert await here.fetch(sandbox, url) == "200 up"
        assert [len(await here.asked(one)) for one in (sandbox, *forked.sandboxes)] == [4, 1, 1]
        fresh = await here.sandboxes.create_sandbox(snapshot.id)
        result = await here.sandboxes.run(fresh.id, ["env"])
        assert b"proxy" not in result.stdout.head


async def test_deleting_ends_tunnels_at_once_and_keeps_the_record(here):
    async with echo() as seen:
        here.names.answers["raw.test"] = [["127.0.0.1"]]
        sandbox = await here.sandbox(f"raw.test:{seen.port}")
        tunnel = f"CONNECT raw.test:{seen.port} HTTP/1.1\r\nHost: raw.test:{seen.port}\r\n\r\nhi"
        talking = asyncio.create_task(here.talk(sandbox, tunnel.encode()))
        await until(lambda: seen.open)
        loop = asyncio.get_running_loop()
        began = loop.time()
        deleting = asyncio.create_task(here.sandboxes.delete_sandbox(sandbox.id))
        await until(lambda: not seen.open)
        assert loop.time() - began < 2.0
        await deleting
        await asyncio.gather(talking, return_exceptions=True)
        (record,) = await here.asked(sandbox)
        assert (record.allowed, record.detail) == (True, "the sandbox ended")
        assert (record.sent_bytes, record.sent_sha256) == (2, sha256(b"hi"))
        assert here.host.egress.open_for == frozenset()


async def test_the_death_of_the_first_process_ends_tunnels(here):
    async with echo() as seen:
        here.names.answers["raw.test"] = [["127.0.0.1"]]
        sandbox = await here.sandbox(f"raw.test:{seen.port}")
        tunnel = f"CONNECT raw.test:{seen.port} HTTP/1.1\r\nHost: raw.test:{seen.port}\r\n\r\nhi"
        talking = asyncio.create_task(here.talk(sandbox, tunnel.encode()))
        await until(lambda: seen.open)
        os.kill(here.host.manager.get(sandbox.id).box.seat.pid, signal.SIGKILL)
        await until(lambda: not seen.open)
        await asyncio.gather(talking, return_exceptions=True)
        await here.sandboxes.restore_sandbox(sandbox.id, here.state.id)
        assert (await here.fetch(sandbox, "http://other.test/"))[:3] == "403"


async def test_a_silent_connection_of_a_deleted_sandbox_leaves_no_record(here):
    sandbox = await here.sandbox("raw.test")
    script = "import socket; w = socket.create_connection(('127.0.0.1', 3128)); w.recv(1)"
    argv = ["/usr/bin/python3", "-I", "-c", script]
    running = asyncio.create_task(here.sandboxes.run(sandbox.id, argv))
    await until(lambda: metrics.EGRESS_CONNECTIONS._value.get() == 1)
    await here.sandboxes.delete_sandbox(sandbox.id)
    await asyncio.gather(running, return_exceptions=True)
    await until(lambda: metrics.EGRESS_CONNECTIONS._value.get() == 0)
    assert not here.host.egress.ledger._kept
    assert not here.host.egress.ending


async def test_records_of_deleted_sandboxes_go_after_a_while(tmp_path):
    from sandbox_svc.egress_log import Ledger

    now = [1000.0]
    ledger = Ledger(kept_s=60.0, clock=lambda: now[0])
    async with world(tmp_path, ledger=ledger) as here:
        sandbox = await here.sandbox("index.test")
        await here.fetch(sandbox, "http://index.test:1/")
        now[0] += 100.0
        assert len(await here.asked(sandbox)) == 1
        await here.sandboxes.delete_sandbox(sandbox.id)
        now[0] += 50.0
        assert len(await here.asked(sandbox)) == 1
        now[0] += 20.0
        with pytest.raises(NotFound):
            await here.asked(sandbox)


async def test_a_slow_head_and_an_idle_tunnel_are_ended(tmp_path):
    async with world(tmp_path, bounds=Bounds(head_s=0.5, idle_s=0.5)) as here, echo() as seen:
        here.names.answers["raw.test"] = [["127.0.0.1"]]
        sandbox = await here.sandbox(f"raw.test:{seen.port}")
        drip = (
            "import socket, time\n"
            "way = socket.create_connection(('127.0.0.1', 3128), timeout=20)\n"
            "began = time.monotonic()\n"
            "try:\n"
            "    for byte in b'GET http://raw.test/ HTTP/1.1' * 9:\n"
            "        way.sendall(bytes([byte])); time.sleep(0.1)\n"
            "except OSError: pass\n"
            "print(time.monotonic() - began)"
        )
        result = await here.sandboxes.run(sandbox.id, ["/usr/bin/python3", "-I", "-c", drip])
        assert float(result.stdout.head) < 5.0
        tunnel = f"CONNECT raw.test:{seen.port} HTTP/1.1\r\nHost: raw.test:{seen.port}\r\n\r\nhi"
        assert (await here.talk(sandbox, tunnel.encode())).endswith(b"hi")
        slow, idle = await here.asked(sandbox)
        assert (slow.allowed, slow.status) == (False, 408)
        assert "in time" in slow.detail
        assert (idle.allowed, idle.sent_bytes) == (True, 2)
        assert "in time" in idle.detail


async def test_a_flood_of_connections_is_bounded_and_harms_nobody_else(tmp_path):
    bounds = Bounds(connections=4, per_second=50.0)
    async with world(tmp_path, bounds=bounds) as here, echo() as seen, web(b"fine") as other:
        here.names.answers |= {"raw.test": [["127.0.0.1"]], "ok.test": [["127.0.0.1"]]}
        sandbox = await here.sandbox(f"raw.test:{seen.port}")
        calm = await here.sandbox(f"ok.test:{other.port}")
        script = (
            "import socket, time\n"
            f"head = b'CONNECT raw.test:{seen.port} HTTP/1.1\\r\\nHost: raw.test:{seen.port}\\r\\n"
            "\\r\\nhi'\n"
            "ways = []\n"
            "for _ in range(60):\n"
            "    way = socket.socket(); way.settimeout(0.2)\n"
            "    try: way.connect(('127.0.0.1', 3128)); way.sendall(head)\n"
            "    except OSError: continue\n"
            "    ways.append(way)\n"
            "print('up', len(ways), flush=True); time.sleep(60)"
        )
        argv = ["/usr/bin/python3", "-I", "-c", script]
        flood = asyncio.create_task(here.sandboxes.run(sandbox.id, argv, timeout_s=90))
        await until(lambda: seen.open == 4)
        assert await here.fetch(calm, f"http://ok.test:{other.port}/") == "200 fine"
        await here.sandboxes.delete_sandbox(sandbox.id)
        await asyncio.gather(flood, return_exceptions=True)
        assert seen.most_open == 4
        await until(lambda: seen.open == 0)


async def test_a_sandbox_may_transfer_so_much_and_no_more(tmp_path):
    async with world(tmp_path, bounds=Bounds(transfer_bytes=100_000)) as here:
        async with web(b"x" * 60_000) as seen:
            here.names.answers["index.test"] = [["127.0.0.1"]]
            url = f"http://index.test:{seen.port}/"
            sandbox = await here.sandbox(f"index.test:{seen.port}")
            assert len(await here.fetch(sandbox, url)) == 60_004
            cut = f"GET {url} HTTP/1.1\r\nHost: index.test:{seen.port}\r\n\r\n".encode()
            assert len(await here.talk(sandbox, cut)) < 60_000
            assert (await here.fetch(sandbox, url))[:3] == "403"
            assert len(seen.heads) == 2
        records = await here.asked(sandbox)
        assert [record.status for record in records] == [200, 200, 403]
        assert "transfer" in records[1].detail
        assert sum(record.received_bytes for record in records) < 100_000


async def test_a_failed_connection_is_said_and_recorded(here):
    here.names.answers["down.test"] = [["127.0.0.1"]]
    sandbox = await here.sandbox("down.test:1", "unknown.test")
    assert (await here.fetch(sandbox, "http://down.test:1/"))[:3] == "502"
    assert (await here.fetch(sandbox, "http://unknown.test/"))[:3] == "502"
    down, unknown = await here.asked(sandbox)
    assert (down.allowed, unknown.allowed) == (True, True)
    assert "no such name" in unknown.detail


async def test_records_are_paged_and_a_flood_cannot_push_out_the_first(here):
    sandbox = await here.sandbox("index.test")
    ledger = here.host.egress.ledger
    for number in range(1200):
        ledger.begin(sandbox.id).path = f"/{number}"
    first = await here.records.list_egress(sandbox.id, page_size=300)
    assert [r.path for r in first.records] == [f"/{number}" for number in range(300)]
    everything = [record.path for record in await here.asked(sandbox)]
    assert everything == [f"/{n}" for n in (*range(500), *range(700, 1200))]
    with pytest.raises(InvalidArgument, match="page_token"):
        await here.records.list_egress(sandbox.id, page_token="x")


async def test_the_example_shows_what_was_asked(here):
    argv = [sys.executable, "examples/sandbox_egress.py", here.server.address]
    done = await asyncio.to_thread(
        subprocess.run, argv, cwd=_ROOT, env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *fetched, first, second = done.stdout.splitlines()
    assert fetched == ["https://pypi.org/simple/iniconfig/ exit 1", "https://example.org/ exit 1"]
    assert first.startswith("pypi.org allowed connecting: no such name: pypi.org ")
    assert second.startswith("example.org refused is not on the sandbox's allow list ")
