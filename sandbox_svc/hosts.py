"""What of a host decides which states it can run, and which of its writes a crash may have taken.

- A state on the host's programs needs the same machine, C library and distribution; one of an
  image only the same operating system and processor.
"""

import contextlib
import platform
from pathlib import Path

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def host_fingerprint() -> str:
    """What a state's binaries depend on: machine, C library, distribution."""
    release = ""
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
            if line.startswith(("ID=", "VERSION_ID=")):
                release += line.split("=", 1)[1].strip('"') + "-"
    return f"{release}{platform.machine()}-{'-'.join(platform.libc_ver())}"


def platform_name() -> str:
    """What the programs of an image depend on: operating system and processor."""
    machine = platform.machine()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def boot_id() -> str:
    """Changes when the host starts anew."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
