"""Linux system calls that the standard library does not wrap, through ctypes.

- Every wrapper raises `OSError` with the errno of the call; none returns an error code.
- Argument types are declared once: a sandbox's first process makes a hundred of these calls, and
  each object that a fresh fork makes for one may cost it a page.
- `clone` keeps the GIL and may only be called in a process with one thread.
- Nothing here writes to /proc/sys or to a device.
"""

import ctypes
import fcntl
import os
import platform
import socket
import struct
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x00000080
SIGCHLD = 17

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
AT_EMPTY_PATH = 0x1000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_EMPTY_PATHS = MOVE_MOUNT_F_EMPTY_PATH | 0x40

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

ARCH = platform.machine()
_NUMBERS = {
    "x86_64": {"clone": 56, "pivot_root": 155, "capset": 126},
    "aarch64": {"clone": 220, "pivot_root": 41, "capset": 91},
}
_SHARED_NUMBERS = {
    "open_tree": 428,
    "move_mount": 429,
    "openat2": 437,
    "mount_setattr": 442,
}
_libc = ctypes.PyDLL(None, use_errno=True)
_libc_nogil = ctypes.CDLL(None, use_errno=True)
_WORD, _TEXT = ctypes.c_ulong, ctypes.c_char_p


def _typed(name: str, *types: Any) -> Any:
    """A function of the C library with argument types of its own."""
    function = _libc[name]
    function.argtypes = types
    return function


_prctl = _typed("prctl", ctypes.c_int, _WORD, _WORD, _WORD, _WORD)
_mount = _typed("mount", _TEXT, _TEXT, _TEXT, _WORD, _TEXT)
_umount = _typed("umount2", _TEXT, ctypes.c_int)
_unshare = _typed("unshare", ctypes.c_int)
_SYSCALLS = {
    "clone": _typed("syscall", ctypes.c_long, _WORD, _WORD, _WORD, _WORD, _WORD),
    "pivot_root": _typed("syscall", ctypes.c_long, _TEXT, _TEXT),
    "capset": _typed("syscall", ctypes.c_long, _TEXT, _TEXT),
    "open_tree": _typed("syscall", ctypes.c_long, ctypes.c_long, _TEXT, _WORD),
    "move_mount": _typed(
        "syscall", ctypes.c_long, ctypes.c_long, _TEXT, ctypes.c_long, _TEXT, _WORD
    ),
    "openat2": _typed("syscall", ctypes.c_long, ctypes.c_long, _TEXT, _TEXT, _WORD),
    "mount_setattr": _typed("syscall", ctypes.c_long, ctypes.c_long, _TEXT, _WORD, _TEXT, _WORD),
}


def supported_machine() -> bool:
    """Whether this processor's system call numbers are known here."""
    return ARCH in _NUMBERS


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _call(name: str, *args: object) -> int:
    number = _SHARED_NUMBERS.get(name) or _NUMBERS[ARCH][name]
    return _check(int(_SYSCALLS[name](number, *args)), name)


def _text(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def clone(flags: int) -> int:
    """Fork into new namespaces; returns 0 in the child, its pid in the parent."""
    return _call("clone", flags | SIGCHLD, 0, 0, 0, 0)


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _check(_unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    """mount(2)."""
    result = _mount(_text(source), _text(target), _text(kind), flags, _text(data))
    _check(result, f"mount {kind or 'bind'} on {target}")


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2)."""
    _check(_umount(_text(target), flags), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _call("pivot_root", _text(new), _text(old))


def open_tree(path: str, directory: int = AT_FDCWD) -> int:
    """Clone the mount tree at a path, detached; returns its descriptor."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE
    return _call("open_tree", directory, _text(path), flags)


def move_mount(tree: int, target: int) -> None:
    """Attach a detached mount tree on the object that `target` refers to."""
    _call("move_mount", tree, b"", target, b"", MOVE_MOUNT_EMPTY_PATHS)


def move_mount_at(tree: int, directory: int, name: str) -> None:
    """Attach a detached mount tree on an entry of a directory, which is not followed as a link."""
    _call("move_mount", tree, b"", directory, _text(name), MOVE_MOUNT_F_EMPTY_PATH)


def mount_setattr(fd: int, attributes: int, *, recursive: bool = True) -> None:
    """Set read-only, nosuid, nodev on a mount tree."""
    attr = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _call("mount_setattr", fd, b"", flags, attr, len(attr))


def openat2(directory: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2): open with bounds on how the path may resolve."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return _call("openat2", directory, _text(path), how, len(how))


def prctl(option: int, value: int = 0, third: int = 0) -> None:
    """prctl(2) with integer arguments."""
    if _prctl(option, value, third, 0, 0) < 0:
        _check(-1, f"prctl {option}")


def last_capability() -> int:
    """The highest capability that this kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as source:
        return int(source.read())


def drop_capabilities(last: int) -> None:
    """Empty the bounding (up to `last`), ambient, inheritable, permitted and effective sets."""
    for capability in range(last + 1):
        if _prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            _check(-1, f"capability {capability}")
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    _call("capset", struct.pack("=II", 0x20080522, 0), bytes(24))


class SeccompFilter:
    """A classic BPF program, laid out once for any number of forks to install."""

    def __init__(self, program: bytes) -> None:
        self._instructions = ctypes.create_string_buffer(program, len(program))
        address = ctypes.addressof(self._instructions)
        fprog = struct.pack("HxxxxxxP", len(program) // 8, address)
        self._fprog = ctypes.create_string_buffer(fprog, len(fprog))

    def install(self) -> None:
        """Install it on this thread; needs no_new_privs."""
        _check(_prctl(PR_SET_SECCOMP, 2, ctypes.addressof(self._fprog), 0, 0), "seccomp")


def loopback_up() -> None:
    """Bring `lo` up in this network namespace."""
    siocgifflags, siocsifflags, up = 0x8913, 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, siocgifflags, request))[1]
        fcntl.ioctl(sock, siocsifflags, struct.pack("16sh14x", b"lo", flags | up))


def syncfs(fd: int) -> None:
    """Write the file system of `fd` to its disk; call it from a worker thread."""
    _check(_libc_nogil.syncfs(fd), "syncfs")
