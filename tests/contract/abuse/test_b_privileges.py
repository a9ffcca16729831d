"""B: attacks on the kernel, on privileges and on other processes.

Protected files are only looked at (`access`), never written.
"""

import asyncio
import errno
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from sandbox_svc.backends.base import Command, EndReason, Mount, TerminalSize
from tests.contract.abuse.walls import (
    DUMPABLE,
    IS_ROOT,
    NO_MASKS,
    apart,
    needs_python,
    needs_root,
    plain,
    python,
    weakened,
    x86_64,
)
from tests.contract.runtimes import SMALL, sh

pytestmark = pytest.mark.asyncio(loop_scope="module")

_CALLS = r"""
import ctypes, errno, json, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    ctypes.set_errno(0)
    given = [a if isinstance(a, bytes) else ctypes.c_long(a) for a in args]
    result = libc.syscall(number, *given)
    return errno.errorcode.get(ctypes.get_errno(), "OK") if result < 0 else "OK"
NEWUSER, NEWNS = 0x10000000, 0x20000
"""
_SYSCALLS = f"""{_CALLS}
print(json.dumps({{
    "mount": call(165, 0, 0, 0, 0, 0), "umount2": call(166, 0, 0), "pivot_root": call(155, 0, 0),
    "chroot": call(161, b"/work"), "open_tree": call(428, -100, b"/usr", 0),
    "move_mount": call(429, -100, 0, -100, 0, 0), "fsopen": call(430, 0, 0),
    "mount_setattr": call(442, -100, 0, 0, 0, 0), "setns": call(308, 0, 0),
    "ptrace": call(101, 0, 0, 0, 0), "process_vm_readv": call(310, 1, 0, 0, 0, 0, 0),
    "keyctl": call(250, 0, 0, 0), "add_key": call(248, b"user", b"a", b"b", 1, -2),
    "bpf": call(321, 0, 0, 0), "perf_event_open": call(298, 0, 0, -1, -1, 0),
    "userfaultfd": call(323, 1), "io_uring_setup": call(425, 1, 0),
    "kexec_load": call(246, 0, 0, 0, 0), "kexec_file_load": call(320, 0, 0, 0, 0, 0),
    "personality": call(135, 0x40000), "reboot": call(169, 0, 0, 0, 0),
    "vsock": call(41, 40, 1, 0), "alg": call(41, 38, 5, 0), "clone3": call(435, 0, 0),
    "x32": call(0x40000000 + 39), "unshare_user": call(272, NEWUSER),
    "unshare_both": call(272, NEWUSER | NEWNS), "clone_user": call(56, NEWUSER | 17, 0, 0, 0, 0),
}}))
"""
_ABSENT = {"clone3", "io_uring_setup", "x32"}


@needs_python
@x86_64
async def test_b3_b4_b8_dangerous_calls_are_refused(box):
    answers = json.loads((await python(box, _SYSCALLS)).stdout.text)
    assert {name: answers[name] for name in _ABSENT} == dict.fromkeys(_ABSENT, "ENOSYS")
    others = {name: answer for name, answer in answers.items() if name not in _ABSENT}
    assert others == dict.fromkeys(others, "EPERM")


@needs_python
@x86_64
async def test_b3_b4_b8_without_the_filter_they_reach_the_kernel(unfiltered_box):
    """Where the kernel refuses by itself, other walls stand; those are named in the docs."""
    answers = json.loads((await python(unfiltered_box, _SYSCALLS)).stdout.text.splitlines()[0])
    reached = {name for name, answer in answers.items() if answer not in ("EPERM", "ENOSYS")}
    assert {
        *("ptrace", "process_vm_readv", "keyctl", "add_key", "personality", "clone3"),
        *("unshare_user", "io_uring_setup", "open_tree", "bpf", "perf_event_open", "userfaultfd"),
    } - reached <= _refused_by_this_kernel()
    needs_privilege = {"pivot_root", "chroot", "kexec_load", "reboot"}
    assert not needs_privilege & reached, "the sandbox has no capability, filter or not"


def _refused_by_this_kernel() -> set[str]:
    """Calls that this host refuses to every ordinary user."""
    found = plain(["/usr/bin/python3", "-c", _SYSCALLS])
    answers = json.loads(found.stdout.splitlines()[0])
    return {name for name, answer in answers.items() if answer in ("EPERM", "ENOSYS")}


async def test_b1_kernel_settings_are_not_writable(box):
    paths = (
        "/proc/sys/kernel/core_pattern /proc/sys/vm/overcommit_memory /proc/sysrq-trigger"
        " /proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward"
        " /usr/bin /bin/sh /etc/alternatives/../../usr/lib"
    )
    result = await sh(box, f"for p in {paths}; do test -w $p && echo $p; done; echo done")
    assert result.stdout.text == "done\n"


async def test_b1_without_walls_the_same_look_says_writable():
    """Only looked at: by this process if it is root, and by the owner of a new network."""
    looks = ["/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory"]
    if IS_ROOT:
        trigger = "/proc/sysrq-trigger"  # not every kernel has it
        looks += [trigger] if os.path.exists(trigger) else []
        assert all(os.access(path, os.W_OK) for path in looks)
    look = ["sh", "-c", "test -w /proc/sys/net/ipv4/ip_forward && echo writable"]
    assert apart(look, "-n").stdout == "writable\n"


_LOOK_AT_OTHERS = (
    "cat /proc/1/environ /proc/1/mem /proc/1/maps 2>/dev/null; ls /proc/1/root /proc/1/fd;"
    " cat /proc/kcore /proc/keys; ls /sys /sys/fs/cgroup; ls /proc | grep -c '^[0-9]'"
)


async def test_b2_other_processes_and_kernel_memory_are_hidden(box):
    result = await sh(box, _LOOK_AT_OTHERS)
    assert int(result.stdout.text.split()[-1]) <= 5
    assert result.stdout.text.split()[:-1] == ["/sys:"] or len(result.stdout.text.split()) == 1
    gone = await sh(box, "ls /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent")
    assert gone.stdout.text == ""


async def test_b2_the_first_process_tells_nothing_about_the_host(box, runtime):
    seen = (await sh(box, "cat /proc/1/cmdline /proc/mounts | tr '\\0' ' '")).stdout.text
    assert str(runtime.layout.home) not in seen


async def test_b2_without_masks_the_kernels_lists_are_shown(box, tmp_path):
    look = "for f in kallsyms keys; do head -c 1 /proc/$f | wc -c; done"
    assert (await sh(box, look)).stdout.text.split() == ["0", "0"]
    async with weakened(tmp_path / "home", NO_MASKS) as runtime:
        bare = await runtime.create([], limits=SMALL)
        assert "1" in (await sh(bare, look)).stdout.text


async def test_b2_b7_a_first_process_that_can_be_dumped_is_open_to_all(box, tmp_path):
    look = "head -c 1 /proc/1/environ | wc -c; ls -d /proc/1/root/usr; wc -l < /proc/1/maps"
    assert (await sh(box, look)).stdout.text.split() == ["0"]
    async with weakened(tmp_path / "home", DUMPABLE) as runtime:
        bare = await runtime.create([], limits=SMALL)
        seen = (await sh(bare, look)).stdout.text.split()
        assert seen[:2] == ["0", "/proc/1/root/usr"]  # and still nothing in its environment
        assert int(seen[2]) > 10


async def test_b2_without_a_sandbox_one_user_reads_another_process(box, monkeypatch):
    secret = "hunter2-of-the-service"
    argv = ["sh", "-c", "sleep 5 & sleep 0.2; tr '\\0' ' ' < /proc/$!/environ; kill $!"]
    assert secret in plain(argv, env={"PATH": "/usr/bin:/bin", "TOKEN": secret}).stdout
    monkeypatch.setenv("TOKEN", secret)
    seen = await sh(box, "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '")
    assert secret not in seen.stdout.text


_MOUNTS = f"""{_CALLS}
import sys
where = sys.argv[1]
print("unshare", call(272, NEWUSER | NEWNS))
try:
    for name, text in ("setgroups", "deny"), ("uid_map", "0 1000 1"), ("gid_map", "0 1000 1"):
        open("/proc/self/" + name, "w").write(text)
except OSError:
    pass
print("mount", call(165, b"none", where.encode(), b"tmpfs", 0, 0))
open(where + "/own", "w").close()
print("seen", os.listdir(where))
print("umount", call(166, where.encode(), 0))
print("chroot", call(161, where.encode()))
"""


@needs_python
@x86_64
async def test_b3_b4_without_the_filter_a_nested_root_mounts(box, unfiltered_box):
    for one, first in ((box, "EPERM"), (unfiltered_box, "OK")):
        await sh(one, "mkdir -p /work/m")
        seen = (await python(one, _MOUNTS, "/work/m")).stdout.text.splitlines()
        assert seen[0] == f"unshare {first}"
    assert seen == ["unshare OK", "mount OK", "seen ['own']", "umount OK", "chroot OK"]


_UNDER = (
    "cd {0}; mkdir -p seen ro; echo secret > seen/s; mount --bind ro ro;"
    " mount -o remount,bind,ro ro; test -w ro || echo sealed; mount -t tmpfs none seen; ls seen;"
)
_UNDO = " mount -o remount,bind,rw ro; test -w ro && echo open; umount seen; cat seen/s"


async def test_b3_b4_who_owns_the_mounts_can_undo_them(box, unfiltered_box, common):
    assert apart(["sh", "-c", _UNDER.format(common) + _UNDO], "-m").stdout.split() == [
        *("sealed", "open", "secret"),
    ]
    undo = "mount -o remount,bind,rw /usr; test -w /usr/bin && echo open; umount /proc/sys && echo"
    if shutil.which("unshare") and shutil.which("mount"):
        nested = await sh(unfiltered_box, f"unshare -Urm sh -c '{undo}'")
        assert nested.stdout.text == ""  # the mounts belong to a user above, filter or not
    assert (await sh(box, f"unshare -Urm sh -c '{undo}'")).stdout.text == ""
    assert (await sh(box, undo)).stdout.text == ""


_PIVOT = f"""{_CALLS}
import sys
print("mount", call(165, b"none", sys.argv[1].encode(), b"tmpfs", 0, 0))
os.chdir(sys.argv[1])
print("open_tree", call(428, -100, b"/usr", 1))
print("pivot_root", call(155, b".", b"."))
"""


@needs_python
@x86_64
async def test_b3_who_owns_the_mounts_moves_the_root(box, common):
    done = apart(["/usr/bin/python3", "-c", _PIVOT, str(common)], "-m")
    assert done.stdout == "mount OK\nopen_tree OK\npivot_root OK\n"
    await sh(box, "mkdir -p /work/m")
    inside = (await python(box, _PIVOT, "/work/m")).stdout.text
    assert inside == "mount EPERM\nopen_tree EPERM\npivot_root EPERM\n"


async def test_b5_only_the_standard_descriptors_are_open(box):
    result = await sh(box, "ls /proc/self/fd | sort -n | tr '\\n' ' '")
    assert result.stdout.text == "0 1 2 3 "


async def test_b5_an_inherited_descriptor_leads_out_but_none_is_inherited(runtime, common):
    (common / "secret").write_text("of the host")
    held = os.open(common, os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        look = f"cat /proc/self/fd/{held}/secret"
        leaked = plain(["sh", "-c", look], close_fds=False)
        assert leaked.stdout == "of the host"
        box = await runtime.create([], limits=SMALL)
        shown = await sh(box, f"{look}; ls /proc/self/fd | sort -n | tr '\\n' ' '")
        assert shown.stdout.text == "0 1 2 3 "
        await box.delete()
    finally:
        os.close(held)


_ESCAPE = """
import os, sys
out = os.open("/", os.O_RDONLY)
os.chroot(sys.argv[1])
os.chdir("/")
try:
    os.chroot("/inner")
    os.fchdir(out)
    print(open(sys.argv[2].lstrip("/")).read())
except OSError as error:
    print("refused", error.errno)
"""


@needs_python
async def test_b5_a_held_directory_leads_out_of_a_bare_chroot_only(box, common):
    (common / "jail/inner").mkdir(parents=True)
    (common / "secret").write_text("of the host")
    escape = ["/usr/bin/python3", "-c", _ESCAPE, f"{common}/jail", f"{common}/secret"]
    assert apart(escape).stdout == "of the host\n"
    await sh(box, "mkdir -p /work/jail/inner")
    inside = await python(box, _ESCAPE, "/work/jail", f"{common}/secret")
    assert "PermissionError" in inside.stderr.text
    walked = await sh(box, f"cat ../../../../../../../../{common}/secret")
    assert (walked.stdout.text, walked.ok) == ("", False)


_BENEATH = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
space = os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY)
def enter():
    assert libc.setns(space, 0x20000) == 0
enter()
top = os.open("/", os.O_RDONLY)
os.chroot("/work")
os.fchdir(top)
for _ in range(20):
    os.chdir("..")
os.chroot(".")
print(os.path.exists("/work/mine"), os.path.exists(sys.argv[2]))
enter()
assert libc.umount2(b"/", 2) == 0
enter()
print(sorted((name, os.listdir("/" + name)) for name in os.listdir("/") if name != "programs"))
print([name for kind in os.listdir("/programs") for name in os.listdir("/programs/" + kind)])
try:
    open("/host/new", "w")
except OSError as error:
    print(error.errno)
"""


@needs_root
@needs_python
async def test_b5_beneath_a_sandboxs_root_is_nothing_of_the_host(runtime, common):
    """What root of the host finds, in there, that leaves a chroot and takes the root away."""
    (common / "secret").write_text("of the host")
    box = await runtime.create([], limits=SMALL)
    await sh(box, "touch /work/mine")
    look = ["/usr/bin/python3", "-c", _BENEATH, str(box.seat.pid), f"{common}/secret"]
    done = await asyncio.to_thread(
        subprocess.run, look, capture_output=True, text=True, timeout=20, check=False
    )
    empty = [("dev", []), ("empty", []), ("host", []), ("proc", []), ("root", [])]
    assert done.stdout == f"True False\n{empty}\n[]\n{errno.EROFS}\n", done.stderr
    await box.delete()


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
    assert not (await sh(box, "sudo -n id 2>&1 </dev/null")).ok
    setuid = await sh(box, "cp /bin/sh /work/s; chmod 4755 /work/s; /work/s -p -c 'id -u'")
    assert setuid.stdout.text == "1000\n"


@needs_root
async def test_b6_set_id_and_capability_files_gain_only_outside(runtime, common):
    shutil.copy(shutil.which("id"), common / "id")
    (common / "id").chmod(0o4755)
    shutil.copy(shutil.which("cat"), common / "cat")
    (common / "cat").chmod(0o755)
    bits = 1 << 13  # CAP_NET_RAW
    capability = struct.pack("<IIIII", 0x02000001, bits, 0, 0, 0)
    os.setxattr(common / "cat", "security.capability", capability)
    assert plain([f"{common}/id", "-u"]).stdout == "0\n"
    look = [f"{common}/cat", "/proc/self/status"]
    assert f"CapEff:\t{bits:016x}" in plain(look).stdout
    box = await runtime.create([], limits=SMALL, mounts=[Mount(common, "/trap")])
    assert (await sh(box, "/trap/id -u")).stdout.text == "1000\n"
    shown = (await sh(box, "/trap/cat /proc/self/status")).stdout.text
    assert f"CapEff:\t{0:016x}" in shown
    await box.delete()


_SU = "su -c true {} & p=$!; until grep -q ^su /proc/$p/comm; do :; done; grep Uid /proc/$p/status"


@pytest.mark.skipif(not shutil.which("su"), reason="no su on this host")
async def test_b6_su_becomes_root_only_outside(box):
    waits = "</dev/zero >/dev/null 2>&1"
    look = _SU.format(waits) + "; kill $p 2>/dev/null"
    outside = plain(["sh", "-c", look]).stdout.split()
    assert outside[2] == "0", "its effective user"
    inside = (await sh(box, look, timeout_s=10)).stdout.text.split()
    assert inside[1:] == ["1000"] * 4


async def test_b7_killing_everything_hits_only_the_own_sandbox(runtime, box):
    other = await runtime.create([], limits=SMALL)
    result = await sh(
        box, "kill -9 -1; kill -9 1; kill -INT 1; kill -HUP 1; kill -STOP 1; echo here"
    )
    assert result.stdout.text == "here\n" or result.reason is EndReason.SIGNAL
    assert (await sh(box, "echo again")).stdout.text == "again\n"
    assert (await sh(other, "echo fine")).stdout.text == "fine\n"


async def test_b7_in_one_process_namespace_a_sibling_and_a_parent_die():
    siblings = "sleep 9 & p=$!; (kill -9 -1); wait $p; echo $?"
    assert apart(["sh", "-c", siblings], "-p", "-f", "--mount-proc").stdout == "137\n"
    parent = plain(["sh", "-c", "sh -c 'sh -c \"kill -9 \\$PPID\"; sleep 3'; echo $?"])
    assert parent.stdout == "137\n"


_READ_SIBLING = """
import ctypes, os, sys
secret = ctypes.create_string_buffer(b"hunter2")
pid = os.fork()
if pid == 0:
    import time; time.sleep(5)
class Vec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
target = int(sys.argv[1]) or pid
got = ctypes.create_string_buffer(7)
near = Vec(ctypes.addressof(got), 7)
far = Vec(ctypes.addressof(secret), 7)
libc = ctypes.CDLL(None, use_errno=True)
n = libc.process_vm_readv(target, ctypes.byref(near), 1, ctypes.byref(far), 1, 0)
print(n, got.raw if n == 7 else ctypes.get_errno())
attached = libc.ptrace(16, target, 0, 0)
print(attached)
os.kill(pid, 9)
"""


@needs_python
async def test_b7_memory_of_a_sibling_is_read_only_without_the_filter(box, unfiltered_box):
    assert (await python(box, _READ_SIBLING, "0")).stdout.text == "-1 1\n-1\n"
    assert (await python(unfiltered_box, _READ_SIBLING, "0")).stdout.text == "7 b'hunter2'\n0\n"
    first = (await python(unfiltered_box, _READ_SIBLING, "1")).stdout.text
    assert first == "-1 1\n-1\n"  # the first process cannot be looked into even then


_TYPE = """
import fcntl, os, sys
try:
    for byte in b"x": fcntl.ioctl(0, 0x5412, bytes([byte]))
    print("typed")
except OSError as error:
    print("refused", error.errno)
"""


async def _typed(box) -> str:
    argv = ("/usr/bin/python3", "-c", _TYPE)
    process = await box.start(Command(argv, cwd="/", terminal=TerminalSize()))
    return (await process.wait()).stdout.text


@needs_python
async def test_b9_nobody_types_into_a_terminal(box, unfiltered_box):
    assert "refused 1" in await _typed(box)
    allowed = Path("/proc/sys/dev/tty/legacy_tiocsti")
    if allowed.exists() and allowed.read_text().strip() != "1":
        pytest.skip("this kernel lets no ordinary user type into a terminal")
    assert "typed" in await _typed(unfiltered_box)


@needs_python
async def test_b9_names_of_unix_sockets_belong_to_the_network_of_the_sandbox(outside, box):
    async def greet(reader, writer):
        writer.write(b"REACHED")
        writer.close()

    name = f"regreen-abuse-{os.getpid()}"
    server = await asyncio.start_unix_server(greet, f"\0{name}")
    script = (
        "import socket\ns = socket.socket(socket.AF_UNIX)\n"
        f"s.connect('\\0{name}')\nprint(s.recv(9).decode())"
    )
    try:
        assert "ConnectionRefused" in (await python(box, script)).stderr.text
        hosts = await outside.create([], limits=SMALL)
        assert (await python(hosts, script)).stdout.text == "REACHED\n"
        await hosts.delete()
    finally:
        server.close()


@needs_python
async def test_b9_no_socket_to_the_hypervisor_without_leave_of_the_filter(box, unfiltered_box):
    script = "import socket; socket.socket(40, socket.SOCK_STREAM); print('made')"
    assert "PermissionError" in (await python(box, script)).stderr.text
    outside = plain(["/usr/bin/python3", "-c", script])
    if outside.stdout != "made\n":
        pytest.skip("this kernel has no vsock")
    assert (await python(unfiltered_box, script)).stdout.text == "made\n"


async def test_b10_no_device_can_be_made_or_found(box):
    result = await sh(box, "mknod /work/d b 8 0; ls /dev | tr '\\n' ' '; ls /dev/vda /dev/kvm")
    expected = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert " ".join(result.stdout.text.split()) == expected
    found = await sh(box, "ls /dev/loop* /dev/fuse /dev/kvm /dev/mem /dev/disk /dev/mapper")
    assert found.stdout.text == ""
    assert len(plain(["ls", "/dev"]).stdout.split()) > len(expected.split())


async def test_b10_a_device_of_the_host_keeps_its_times_and_mode(box):
    before = [os.stat(f"/dev/{name}") for name in ("null", "zero", "urandom")]
    changed = await sh(box, "touch -d @5 /dev/null; chmod 600 /dev/zero; touch -a /dev/urandom")
    assert changed.stderr.text.count("Read-only file system") == 3
    after = [os.stat(f"/dev/{name}") for name in ("null", "zero", "urandom")]
    assert [(s.st_mode, s.st_mtime_ns) for s in after] == [
        (s.st_mode, s.st_mtime_ns) for s in before
    ]
    assert (
        await sh(box, "echo gone > /dev/null && head -c 2 /dev/zero | wc -c")
    ).stdout.text == "2\n"


@needs_root
async def test_b10_a_device_node_opens_only_outside(runtime, common):
    os.mknod(common / "zero", 0o20666, os.makedev(1, 5))
    (common / "zero").chmod(0o666)
    look = "head -c 2 {} | wc -c"
    assert plain(["sh", "-c", look.format(common / "zero")]).stdout == "2\n"
    box = await runtime.create([], limits=SMALL, mounts=[Mount(common, "/trap")])
    assert (await sh(box, look.format("/trap/zero"))).stdout.text == "0\n"
    await box.delete()
