"""Which number type a run computes in, found by probing this machine.

- The tensor library is asked only where there is a device for it to find: the service, which has no
  other use for it, starts without.
"""

from pathlib import Path

from regreen.cpu import cpu_flags, has_fast_bf16
from regreen.rpc.errors import InvalidArgument

_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA, of AMD, and of either under Windows."""


def computes_in_bf16(dtype: str) -> bool:
    """Whether weights are BF16 in the forward pass, else F32; "" takes what is fast.

    Raises:
        InvalidArgument: bf16 was asked for on a host where it would be emulated.
    """
    if dtype == "fp32":
        return False
    fast = has_fast_bf16() or _has_gpu()
    if dtype == "bf16" and not (fast or "avx512_bf16" in cpu_flags()):
        raise InvalidArgument(
            "hyperparameters.dtype", "is bf16, which this processor only emulates", "use fp32"
        )
    return fast or dtype == "bf16"


def _has_gpu() -> bool:
    if not any(Path(device).exists() for device in _DEVICES):
        return False
    import torch

    return torch.cuda.is_available()
