"""Writes infra/docker/sandbox.seccomp.json: `--check` only compares.

- Everything is refused but a list: all calls of the kernel's headers when the list was made, less
  those below. A call that a newer kernel adds is refused.
- What the embedded runtime needs beyond a container's usual calls is allowed: namespaces and
  mounts. The container has no capabilities, so they work only in namespaces of its own.
- `clone3` is answered ENOSYS, so that C libraries use `clone`, whose flags a filter can read.
- Plain OCI, without conditions on capabilities: engines and kubelets read it alike.
"""

import json
import sys
from pathlib import Path

from made import keep

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "infra" / "docker" / "sandbox.seccomp.json"
LIST = ROOT / "infra" / "docker" / "syscalls.txt"
ENOSYS = 38
REFUSED = {
    "modules and kernels": "init_module finit_module delete_module create_module query_module "
    "get_kernel_syms kexec_load kexec_file_load reboot",
    "tracing the kernel": "bpf perf_event_open kcmp lookup_dcookie syslog ptrace "
    "process_vm_readv process_vm_writev pidfd_getfd",
    "keys": "add_key request_key keyctl",
    "large or young attack surface": "io_uring_setup io_uring_enter io_uring_register userfaultfd "
    "memfd_secret",
    "files by handle": "name_to_handle_at open_by_handle_at fanotify_init fanotify_mark",
    "the host's clock, swap, quota and accounting": "settimeofday clock_settime clock_adjtime "
    "adjtimex stime swapon swapoff quotactl quotactl_fd acct",
    "hardware": "iopl ioperm vm86 vm86old pciconfig_read pciconfig_write pciconfig_iobase",
    "memory of other nodes": "mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node",
    "left from old kernels": "_sysctl sysfs uselib ustat nfsservctl vserver vhangup afs_syscall "
    "getpmsg putpmsg security tuxcall epoll_ctl_old epoll_wait_old",
}


def profile() -> str:
    """The profile as text."""
    refused = {name for names in REFUSED.values() for name in names.split()} | {"clone3"}
    allowed = sorted(set(LIST.read_text(encoding="ascii").split()) - refused)
    content = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": [
            {"names": allowed, "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def main() -> int:
    """Write or check the profile; the exit code."""
    return keep({PROFILE: profile()}, "seccomp_profile")


if __name__ == "__main__":
    sys.exit(main())
