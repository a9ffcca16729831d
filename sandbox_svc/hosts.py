"""What of a host decides which states it can run, and which of its writes a crash may have taken.

- A state on the host's programs needs the same machine, C library and distribution; one of an
  image only the same operating system and processor.
- What was remembered of a state on the host's programs is not of others that were put there since.
"""

import contextlib
import os
import platform
from pathlib import Path

PROGRAMS = (
    *("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/usr/local/bin", "/usr/local/lib"),
    *(f"/usr/lib/{platform.machine()}-linux-gnu", "/etc/alternatives", "/etc/ld.so.cache"),
    *("/var/lib/dpkg/status", "/var/lib/rpm", "/lib/apk/db/installed"),
)
"""What changes when programs or libraries of a host are installed, replaced or removed."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def host_fingerprint() -> str:
    """What a state's binaries depend on: machine, C library, distribution."""
    release = ""
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
            if line.startswith(("ID=", "VERSION_ID=")):
                release += line.split("=", 1)[1].strip('"') + "-"
    return f"{release}{platform.machine()}-{'-'.join(platform.libc_ver())}"


def program_stamps() -> list[list[object]]:
    """What tells the host's programs from what they were: names and times of their places."""
    found: list[list[object]] = []
    for place in PROGRAMS:
        with contextlib.suppress(OSError):
            info = os.stat(place)
            found.append([place, info.st_ino, info.st_mtime_ns])
    return found


def platform_name() -> str:
    """What the programs of an image depend on: operating system and processor."""
    machine = platform.machine()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def boot_id() -> str:
    """Changes when the host starts anew."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
