"""Which number type a run computes in, found by probing this machine.

- The tensor library is asked only where there is a device for it to find: the service, which has no
  other use for it, starts without.
"""

from pathlib import Path

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
    fast = _cpu_has("amx_bf16") or _has_gpu()
    if dtype == "bf16" and not (fast or _cpu_has("avx512_bf16")):
        raise InvalidArgument(
            "hyperparameters.dtype", "is bf16, which this processor only emulates", "use fp32"
        )
    return fast or dtype == "bf16"


def _has_gpu() -> bool:
    if not any(Path(device).exists() for device in _DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


def _cpu_has(flag: str) -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(line.startswith("flags") and flag in line.split() for line in text.splitlines())
