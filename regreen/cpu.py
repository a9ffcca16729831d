"""What this machine's processor can do, by its own word.

- A number type is chosen by probing, never by a machine's name.
"""

import os
from pathlib import Path


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The extensions of the instruction set; none where the kernel does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(flag for line in lines if line.startswith("flags") for flag in line.split())


def has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether BF16 matrix units (AMX) are there; AVX-512 alone emulates BF16 slowly."""
    return "amx_bf16" in cpu_flags(cpuinfo)


def cpu_count() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))
