"""The seccomp deny list of a sandbox, as classic BPF.

- Denied calls answer EPERM, except `clone3` and `io_uring_setup` (ENOSYS), which make callers
  fall back to calls that the filter can inspect.
- Flags are masked, not compared: no combination of other bits gets a new namespace through.
- Limits and scheduling of another process cannot be set, so that the first process of a sandbox
  outlives what runs in it.
- Calls of a foreign architecture (32-bit, x32) answer ENOSYS.
"""

import errno
import struct
from collections.abc import Sequence

from sandbox_svc.backends import linux

_LOAD, _JA, _JEQ, _JGE, _JSET, _RET = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_FEW = 3
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NAMESPACES = (
    linux.CLONE_NEWNS
    | linux.CLONE_NEWCGROUP
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUSER
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
)
_FAMILIES = (17, 21, 30, 38, 40, 44)
"""AF_PACKET, AF_RDS, AF_TIPC, AF_ALG, AF_VSOCK, AF_XDP."""
_IOCTLS = (0x5412, 0x541C)
"""TIOCSTI, TIOCLINUX: typing into a terminal."""

# name -> (x86_64, aarch64); calls from 424 on have one number everywhere.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "syslog": (103, 116),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "pidfd_getfd": (438, 438),
    "memfd_secret": (447, 447),
}
_ABSENT = {"clone3": (435, 435), "io_uring_setup": (425, 425)}
_FILTERED = {
    "clone": (56, 220),
    "unshare": (272, 97),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "personality": (135, 92),
    "prlimit64": (302, 261),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, k & 0xFFFFFFFF)


def _ret(code: int | None) -> bytes:
    return _op(_RET, _ALLOW if code is None else _ERRNO | code)


def _on_number(number: int, body: bytes) -> bytes:
    """Run `body`, which returns, when the loaded call number equals `number`."""
    return _op(_JEQ, number, 0, len(body) // 8) + body


def _argument(index: int) -> bytes:
    """Load the low 32 bits of an argument (little-endian machines only)."""
    return _op(_LOAD, 16 + 8 * index)


def _deny_values(index: int, values: tuple[int, ...]) -> bytes:
    body = _argument(index)
    for value in values:
        body += _op(_JEQ, value, 0, 1) + _ret(errno.EPERM)
    return body + _ret(None)


def _deny_bits(index: int, mask: int) -> bytes:
    return _argument(index) + _op(_JSET, mask, 0, 1) + _ret(errno.EPERM) + _ret(None)


def _allow_values(index: int, values: tuple[int, ...]) -> bytes:
    body = _argument(index)
    for value in values:
        body += _op(_JEQ, value, 0, 1) + _ret(None)
    return body + _ret(errno.EPERM)


def _only_reading(index: int) -> bytes:
    """Allow a call whose 64-bit argument is no pointer."""
    body = _argument(index) + _op(_JEQ, 0, 1, 0) + _ret(errno.EPERM)
    body += _op(_LOAD, 16 + 8 * index + 4) + _op(_JEQ, 0, 1, 0) + _ret(errno.EPERM)
    return body + _ret(None)


def _on_self(index: int, other: bytes) -> bytes:
    """Allow a call whose argument 0 means the caller itself; run `other` for another process."""
    return _argument(index) + _op(_JEQ, 0, 0, 1) + _ret(None) + other


def _search(calls: Sequence[tuple[int, bytes]]) -> bytes:
    """Run the body of the loaded call number, or allow it, found by halving.

    The kernel runs a new filter for every call number there is, to remember what it allows: a list
    of comparisons would take most of a sandbox's confinement.
    """
    if len(calls) <= _FEW:
        return b"".join(_on_number(number, body) for number, body in calls) + _ret(None)
    middle = len(calls) // 2
    low, high = _search(calls[:middle]), _search(calls[middle:])
    over_low = _op(_JA, len(low) // 8)
    return _op(_JGE, calls[middle][0], 0, 1) + over_low + low + high


def deny_list() -> bytes:
    """The filter program for this machine's architecture."""
    column = 0 if linux.ARCH == "x86_64" else 1
    program = _op(_LOAD, 4) + _op(_JEQ, _AUDIT[linux.ARCH], 1, 0) + _ret(errno.ENOSYS)
    program += _op(_LOAD, 0)
    if linux.ARCH == "x86_64":
        program += _op(_JGE, 0x40000000, 0, 1) + _ret(errno.ENOSYS)
    calls = {numbers[column]: _ret(errno.ENOSYS) for numbers in _ABSENT.values()}
    for row in _DENIED.values():
        number = row[column]
        if number is not None:
            calls[number] = _ret(errno.EPERM)
    bodies = {
        "clone": _deny_bits(0, _NAMESPACES),
        "unshare": _deny_bits(0, _NAMESPACES | linux.CLONE_NEWTIME),
        "socket": _deny_values(0, _FAMILIES),
        "socketpair": _deny_values(0, _FAMILIES),
        "ioctl": _deny_values(1, _IOCTLS),
        "personality": _allow_values(0, (0, 0xFFFFFFFF)),
        "prlimit64": _on_self(0, _only_reading(2)),
        "sched_setparam": _allow_values(0, (0,)),
        "sched_setscheduler": _allow_values(0, (0,)),
        "sched_setattr": _allow_values(0, (0,)),
        "setpriority": _argument(0)
        + _op(_JEQ, 2, 0, 1)
        + _ret(errno.EPERM)
        + _allow_values(1, (0,)),
    }
    calls |= {_FILTERED[name][column]: body for name, body in bodies.items()}
    return program + _search(sorted(calls.items()))
