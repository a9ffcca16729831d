"""The GPUs of this machine, as a process sees them that has no use for one itself.

- The service decides here what a run may ask for; it never opens a device: a context takes half a
  gigabyte of it. A short-lived process of its own asks for what is free.
- The tensor library is asked only where there is a device for it to find: the service, which has no
  other use for it, starts without.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

from regreen.rpc.errors import InfraError

_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA, of AMD, and of either under Windows."""
_ASK = (
    "import json, torch; count = torch.cuda.device_count(); "
    "print(json.dumps([torch.cuda.mem_get_info(i)[0] for i in range(count)]))"
)
_ASK_S = 120.0


@functools.cache
def has_gpu() -> bool:
    """Whether runs on this machine compute on GPUs."""
    if not any(Path(device).exists() for device in _DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


def free_bytes() -> list[int]:
    """Free memory of each GPU that this process may use, in order.

    Raises:
        InfraError: it cannot be told; says why.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, timeout=_ASK_S, check=True
        )
        free: list[int] = json.loads(asked.stdout)
    except subprocess.CalledProcessError as error:
        tail = error.stderr.decode(errors="replace").strip()[-300:]
        raise InfraError(f"the free memory of the GPUs cannot be told: {tail}") from error
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise InfraError(f"the free memory of the GPUs cannot be told: {error}") from error
    return free
