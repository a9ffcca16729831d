"""Attacks from inside a sandbox, each with the outcome that the service promises.

Rows follow the table of the design: A resources, B privileges, C network, D files, F leaks.
Protected files are only looked at (`access`), never written.
"""

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from regreen.rpc.errors import (
    DiskFull,
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    MissingDependency,
    NotFound,
)
from sandbox_svc import egress_probe
from sandbox_svc.backends import embedded_box
from sandbox_svc.backends.base import Command, EndReason, Limits, Mount
from tests.contract.runtimes import SMALL, sh, started

_SYSCALLS = r"""
import ctypes, errno, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(number, *[ctypes.c_long(a) for a in args])
    return errno.errorcode.get(ctypes.get_errno(), "OK") if result < 0 else "OK"
NEWUSER, NEWNS = 0x10000000, 0x20000
print(json.dumps({
    "mount": call(165, 0, 0, 0, 0, 0), "umount2": call(166, 0, 0), "pivot_root": call(155, 0, 0),
    "open_tree": call(428, -100, 0, 1), "fsopen": call(430, 0, 0), "setns": call(308, 0, 0),
    "unshare_user": call(272, NEWUSER), "unshare_both": call(272, NEWUSER | NEWNS),
    "clone_user": call(56, NEWUSER | 17, 0, 0, 0, 0), "clone3": call(435, 0, 0),
    "ptrace": call(101, 0, 0, 0, 0), "process_vm_readv": call(310, 1, 0, 0, 0, 0, 0),
    "keyctl": call(250, 0, 0), "add_key": call(248, 0, 0, 0, 0), "bpf": call(321, 0, 0, 0),
    "perf_event_open": call(298, 0, 0, -1, -1, 0), "userfaultfd": call(323, 0),
    "io_uring_setup": call(425, 1, 0), "kexec_load": call(246, 0, 0, 0, 0),
    "personality": call(135, 0x40000), "reboot": call(169, 0, 0, 0, 0),
    "vsock": call(41, 40, 1, 0), "alg": call(41, 38, 5, 0), "x32": call(0x40000000 + 39),
}))
"""


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runtime(tmp_path_factory):
    async with started("embedded", tmp_path_factory.mktemp("runtime")) as runtime:
        yield runtime


@pytest_asyncio.fixture(loop_scope="module")
async def box(runtime):
    box = await runtime.create([], limits=SMALL)
    yield box
    await box.delete()


async def python(box, script: str, **options):
    return await box.run(Command(("/usr/bin/python3", "-c", script), cwd="/", **options))


needs_python = pytest.mark.skipif(
    not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3 on this host"
)


async def test_a1_fork_bomb_ends_at_the_limit_and_the_service_stays_quick(runtime, box):
    other = await runtime.create([], limits=SMALL)
    bomb = asyncio.create_task(sh(box, "f() { f | f & }; f; sleep 20", timeout_s=3))
    began = time.monotonic()
    assert (await sh(other, "echo fine")).stdout.text == "fine\n"
    assert time.monotonic() - began < 3.0
    await bomb
    await box.delete()
    limited = await runtime.create([], limits=SMALL)
    full = await sh(limited, "for i in $(seq 100); do sleep 5 & done; echo all")
    assert "all" not in full.stdout.text
    if runtime.cgroups.name != "rlimit":
        assert full.reason is EndReason.PIDS


@needs_python
async def test_a2_memory_bombs_end_alone(runtime, box):
    other = await runtime.create([], limits=SMALL)
    heap = await python(box, "x = bytearray(1 << 30)\nfor i in range(0, 1 << 30, 4096): x[i] = 1")
    assert not heap.ok
    shm = await sh(box, "head -c 1000000000 /dev/zero > /dev/shm/x; stat -c %s /dev/shm/x")
    assert int(shm.stdout.text or 0) <= SMALL.memory_bytes
    assert (await sh(other, "echo fine")).stdout.text == "fine\n"
    if runtime.cgroups.name != "rlimit":
        assert heap.reason is EndReason.OOM


@needs_python
async def test_a2_anonymous_files_count_as_memory(runtime, box):
    if runtime.cgroups.name == "rlimit":
        pytest.skip("without cgroups an anonymous file is bounded by nothing, and is reported so")
    script = (
        "import os\n"
        "for number in range(1000):\n"
        "    if number % 32 == 0: fd = os.memfd_create('x')\n"
        "    os.write(fd, bytes(1 << 20))\n"
        "print('all')"
    )
    result = await python(box, script)
    assert result.reason is EndReason.OOM
    assert result.stdout.text == ""


@pytest.mark.parametrize(
    "script",
    [
        "cd /work; for i in $(seq 99); do head -c 8000000 /dev/zero > f$i; done; sleep 30",
        "cd /work; i=0; while :; do i=$((i+1)); : > f$i; done",
        "cd /work; exec 5> f; rm f; for i in $(seq 7); do head -c 8000000 /dev/zero >&5; done;"
        " exec 6> g; rm g; for i in $(seq 7); do head -c 8000000 /dev/zero >&6; done; sleep 30",
        "cd /work; n=$(printf %0250d 0); for i in $(seq 20); do mkdir $n; cd $n; done;"
        " for i in $(seq 12); do head -c 8000000 /dev/zero > f$i; done; sleep 30",
    ],
    ids=["bytes", "inodes", "unlinked", "hidden by depth"],
)
async def test_a3_disk_is_bounded(box, script):
    result = await sh(box, script, timeout_s=40)
    assert result.reason is EndReason.DISK


async def test_a3_what_a_command_leaves_behind_is_bounded_too(runtime):
    box = await runtime.create([], limits=replace(SMALL, disk_bytes=10 << 20))
    writer = "for i in $(seq 64); do head -c 1000000 /dev/zero > f$i; sleep 0.05; done; sleep 300"
    left = await sh(box, f"cd /work; (setsid sh -c '{writer}' >/dev/null 2>&1 &)")
    assert left.ok
    async with asyncio.timeout(30):
        while (await box.usage())["processes"]:
            pass
    assert (await box.measure()).size_bytes < 40 << 20


async def test_a3_an_overrun_ends_older_processes_as_well(runtime):
    box = await runtime.create([], limits=replace(SMALL, disk_bytes=10 << 20))
    assert (await sh(box, "(setsid sleep 4321 >/dev/null 2>&1 &)")).ok
    over = await sh(
        box, "cd /work; for i in 1 2; do head -c 8000000 /dev/zero > f$i; done; sleep 9"
    )
    assert over.reason is EndReason.DISK
    async with asyncio.timeout(10):
        while (await box.usage())["processes"]:
            pass


async def test_a3_short_commands_add_up(runtime):
    box = await runtime.create([], limits=replace(SMALL, disk_bytes=10 << 20))
    reasons = set()
    for number in range(200):
        result = await sh(box, f"head -c 1000000 /dev/zero > /work/f{number}")
        reasons.add(result.reason)
        if result.reason is EndReason.DISK:
            break
    assert EndReason.DISK in reasons


async def test_a3_a_full_file_system_is_told_as_such(box):
    await sh(box, "head -c 1000000000 /dev/zero > /tmp/fill; true")
    with pytest.raises(DiskFull):
        await box.write_file("/tmp/more", b"x" * (1 << 20))


async def test_a3_one_file_cannot_pass_the_limit(box):
    result = await sh(box, "head -c 200000000 /dev/zero > /work/big; stat -c %s /work/big")
    assert int(result.stdout.text) <= SMALL.disk_bytes


async def test_a4_spinning_ends_at_the_wall_time(box):
    result = await sh(box, "for i in 1 2 3 4; do (while :; do :; done) & done; wait", timeout_s=1.0)
    assert result.reason is EndReason.TIMEOUT
    assert 1.0 <= result.wall_s < 4.0


async def test_a5_a_flood_is_stopped_and_bad_bytes_survive(runtime):
    box = await runtime.create([], limits=Limits(output_bytes=4 << 20))
    result = await sh(box, "yes", output_bytes=1000, timeout_s=30)
    assert result.reason is EndReason.OUTPUT
    odd = await sh(box, r"printf '\377\000\303'")
    assert odd.stdout.head == b"\xff\x00\xc3"


async def test_a7_leftovers_end_with_freeze_and_delete(box):
    await sh(box, "(setsid nohup sleep 1000 >/dev/null 2>&1 &)")
    await sh(box, "until grep -q sleep /proc/[0-9]*/comm; do :; done", timeout_s=20)
    await box.freeze()
    assert "sleep" not in (await sh(box, "cat /proc/[0-9]*/comm")).stdout.text


async def test_b1_kernel_settings_are_not_writable(box):
    paths = (
        "/proc/sys/kernel/core_pattern /proc/sys/vm/overcommit_memory /proc/sysrq-trigger"
        " /proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward"
        " /usr/bin /bin/sh /etc/alternatives/../../usr/lib"
    )
    result = await sh(box, f"for p in {paths}; do test -w $p && echo $p; done; echo done")
    assert result.stdout.text == "done\n"


async def test_b2_other_processes_and_kernel_memory_are_hidden(box):
    script = (
        "cat /proc/1/environ /proc/1/mem /proc/1/maps 2>/dev/null; ls /proc/1/root /proc/1/fd;"
        " cat /proc/kcore /proc/keys; ls /sys /sys/fs/cgroup; ls /proc | grep -c '^[0-9]'"
    )
    result = await sh(box, script)
    assert int(result.stdout.text.split()[-1]) <= 5
    assert result.stdout.text.split()[:-1] == ["/sys:"] or len(result.stdout.text.split()) == 1


@needs_python
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="call numbers of x86_64")
async def test_b3_b4_b8_dangerous_calls_are_refused(box):
    import json

    result = await python(box, _SYSCALLS)
    answers = json.loads(result.stdout.text)
    missing = {"clone3", "io_uring_setup", "x32"}
    assert {name: answers[name] for name in missing} == dict.fromkeys(missing, "ENOSYS")
    others = {name: answer for name, answer in answers.items() if name not in missing}
    assert others == dict.fromkeys(others, "EPERM")


async def test_b5_only_the_standard_descriptors_are_open(box):
    result = await sh(box, "ls /proc/self/fd | sort -n | tr '\\n' ' '")
    assert result.stdout.text == "0 1 2 3 "


async def test_b6_no_privileges_and_no_way_to_gain_them(box):
    status = (await sh(box, "grep -E 'Cap|NoNew|Seccomp:|^Uid' /proc/self/status")).stdout.text
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert {name: value for name, value in fields.items() if name.startswith("Cap")} == {
        f"Cap{kind}": "0" * 16 for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    }
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert fields["Uid"].split() == ["1000"] * 4
    assert not (await sh(box, "su -c id 2>&1 </dev/null")).ok
    setuid = await sh(box, "cp /bin/sh /work/s; chmod 4755 /work/s; /work/s -p -c 'id -u'")
    assert setuid.stdout.text == "1000\n"


async def test_b7_killing_everything_hits_only_the_own_sandbox(runtime, box):
    other = await runtime.create([], limits=SMALL)
    result = await sh(
        box, "kill -9 -1; kill -9 1; kill -INT 1; kill -HUP 1; kill -STOP 1; echo here"
    )
    assert result.stdout.text == "here\n" or result.reason is EndReason.SIGNAL
    assert (await sh(box, "echo again")).stdout.text == "again\n"
    assert (await sh(other, "echo fine")).stdout.text == "fine\n"


async def test_b10_no_device_can_be_made_or_found(box):
    result = await sh(box, "mknod /work/d b 8 0; ls /dev | tr '\\n' ' '; ls /dev/vda /dev/kvm")
    expected = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert " ".join(result.stdout.text.split()) == expected


async def test_c2_ports_of_the_host_are_not_reachable(box):
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    script = f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo REACHED"
    result = await box.run(Command(("/bin/bash", "-c", script), cwd="/"))
    server.close()
    assert result.stdout.text == ""


async def test_c3_sockets_of_the_host_are_absent(box):
    result = await sh(box, "ls /var/run/docker.sock /run/docker.sock /run/*.sock /root/.ssh")
    assert not result.ok
    assert result.stdout.text == ""


async def test_c4_the_proxy_is_the_only_way_out_and_guards_it(runtime):
    egress = await egress_probe.prove(runtime, enabled=True)
    assert egress.proven, egress.detail


async def test_d1_magic_links_and_swapped_links_are_refused(box):
    await sh(box, "ln -s /proc/1/root/etc/passwd /work/magic; ln -s /proc/self/mem /work/mem")
    for path in ("/work/magic", "/work/mem", "/proc/self/status", "/proc/1/root/etc/passwd"):
        with pytest.raises((FailedPrecondition, InvalidArgument, NotFound)):
            await box.read_file(path, 1 << 20)
        with pytest.raises((FailedPrecondition, InvalidArgument, NotFound)):
            await box.write_file(path, b"x")
    await sh(box, "echo fine > /work/plain")
    assert await box.read_file("/work/plain", 10) == b"fine\n"


async def test_d2_replacing_a_mount_point_with_a_link_reaches_nothing(runtime, box, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "f").write_text("x")
    await sh(box, "rmdir /opt; ln -s /etc /opt; rm -rf /tmp /proc 2>/dev/null; ls -d /opt")
    layer = await box.freeze()
    with pytest.raises(Exception, match="set-up failed at mount /opt/tool"):
        await runtime.create([layer], limits=SMALL, mounts=[Mount(tmp_path / "m", "/opt/tool")])
    plain = await runtime.create([layer], limits=SMALL)
    assert (await sh(plain, "readlink /opt; ls /proc/self/status")).ok


async def test_d3_deep_and_odd_names_can_be_made_and_removed(box, runtime):
    await sh(
        box,
        "cd /work; mkdir -m 0 locked; touch \"$(printf 'a\\nb')\";"
        " for i in $(seq 600); do mkdir dddddddddd; cd dddddddddd; done",
    )
    layer = await box.freeze()
    await box.delete()
    await runtime.drop_layer(layer)


async def test_f1_nothing_leaks_over_many_sandboxes(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        await _use_and_count(runtime)


async def _use_and_count(runtime):
    async def once(number: int) -> None:
        box = await runtime.create([], limits=SMALL)
        assert (await sh(box, f"echo {number} > /work/x; cat /work/x")).stdout.text == f"{number}\n"
        if number % 5 == 0:
            await runtime.drop_layer(await box.freeze())
        await box.delete()

    await once(0)
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, 40, 8):
        await asyncio.gather(*(once(number) for number in range(start, start + 8)))
    await runtime.settle()
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    spawner, warm = runtime._seats._process.pid, 1
    children = Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split()
    assert len(children) <= warm
    for group in getattr(runtime.cgroups, "_groups", {}).values():
        assert len([entry for entry in group.iterdir() if entry.is_dir()]) <= warm
    assert os.listdir(runtime.layout.home / "run") == []
    assert os.listdir(runtime.layout.home / "trash") == []


async def test_f2_a_killed_spawner_is_replaced_and_its_sandboxes_say_so(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        lost = await runtime.create([], limits=SMALL)
        running = asyncio.create_task(sh(lost, "sleep 100"))
        await sh(lost, "until grep -q '[s]leep.100' /proc/[0-9]*/cmdline; do :; done")
        runtime._seats._process.kill()
        assert (await running).reason is EndReason.INFRA
        with pytest.raises(InfraError, match="lost its processes"):
            await sh(lost, "true")
        fresh = await runtime.create([], limits=SMALL)
        assert (await sh(fresh, "echo fine")).stdout.text == "fine\n"


async def test_f2_a_command_that_cannot_be_stopped_ends_its_sandbox_which_says_so(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(embedded_box, "_KILL_GRACE_S", 0.0)  # nothing ends that fast
    async with started("embedded", tmp_path / "home") as runtime:
        box = await runtime.create([], limits=SMALL)
        assert (await sh(box, "sleep 100", timeout_s=0.2)).reason is EndReason.TIMEOUT
        with pytest.raises(FailedPrecondition, match="it went over a limit") as refused:
            await sh(box, "true")
        assert refused.value.metadata == {"overrun": "timeout"}
        await box.delete()


async def test_f2_a_set_up_that_fails_leaves_nothing(tmp_path):
    async with started("embedded", tmp_path / "home") as runtime:
        home = runtime.layout.home
        with pytest.raises(MissingDependency, match="mount source does not exist"):
            await runtime.create([], limits=SMALL, mounts=[Mount(tmp_path / "none", "/x")])
        (tmp_path / "m").mkdir()
        with pytest.raises(InvalidArgument, match="/proc is the sandbox's own"):
            await runtime.create([], limits=SMALL, mounts=[Mount(tmp_path / "m", "/proc/x")])
        with pytest.raises(FailedPrecondition, match="not on this host"):
            await runtime.create(["0" * 12], limits=SMALL)
        await runtime.settle()
        assert os.listdir(home / "run") == []


async def test_e_requests_too_large_for_one_message_are_refused_and_harm_nothing(box):
    huge = "x" * (33 << 20)
    for command in (Command(("true", huge), cwd="/"), Command(("true",), cwd="/", env={"A": huge})):
        with pytest.raises(InvalidArgument, match="argv"):
            await box.run(command)
    with pytest.raises(InvalidArgument, match="path"):
        await box.read_file("/" + huge, 10)
    assert (await sh(box, "echo fine")).stdout.text == "fine\n"


async def test_b2_the_first_process_tells_nothing_about_the_host(box, runtime):
    seen = (await sh(box, "cat /proc/1/cmdline /proc/mounts | tr '\\0' ' '")).stdout.text
    assert str(runtime.layout.home) not in seen
