"""Which number type a run computes in, found by probing this machine."""

from learner_svc.gpus import has_gpu
from regreen.cpu import cpu_flags, has_fast_bf16
from regreen.rpc.errors import InvalidArgument


def computes_in_bf16(dtype: str) -> bool:
    """Whether weights are BF16 in the forward pass, else F32; "" takes what is fast.

    Raises:
        InvalidArgument: bf16 was asked for on a host where it would be emulated.
    """
    if dtype == "fp32":
        return False
    fast = has_fast_bf16() or has_gpu()
    if dtype == "bf16" and not (fast or "avx512_bf16" in cpu_flags()):
        raise InvalidArgument(
            "hyperparameters.dtype", "is bf16, which this processor only emulates", "use fp32"
        )
    return fast or dtype == "bf16"
