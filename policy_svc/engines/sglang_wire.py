"""Bodies and answers of SGLang's HTTP routes.

Source: sglang 0.5.16 and 0.5.23, `srt/sampling/sampling_params.py`, `srt/managers/io_struct.py`.
"""

import itertools
from typing import Any

import httpx

from policy_svc.engines.base import Sampling

_ASLEEP = "asleep:"
"""What the name of a version begins with while a server sleeps; its own name follows."""


def sampling_params(sampling: Sampling, end_id: int, index: int) -> dict[str, Any]:
    """Return `sampling_params` of `/generate` for one sample, with no key that SGLang lacks."""
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop_token_ids": sorted({end_id, *sampling.stop_token_ids}),
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "sampling_seed": (sampling.seed + 0x9E3779B97F4A7C15 * index) & 0x7FFFFFFF,
    }
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if structure := sampling.structure:
        params[structure.kind.value] = structure.text
    return params


def object_of(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer; empty where it has none."""
    if "json" not in answer.headers.get("content-type", ""):
        return {}
    value = answer.json()
    return value if isinstance(value, dict) else {}


def release_of(version: str) -> tuple[int, ...]:
    """Numbers of a release, to compare."""
    parts = []
    for part in version.split(".")[:3]:
        digits = "".join(itertools.takewhile(str.isdigit, part))
        parts.append(int(digits or 0))
    return tuple(parts)


def asleep(label: str) -> str:
    """The name of a version while its server sleeps."""
    return _ASLEEP + label


def sleeps(label: object) -> bool:
    """Whether a server of that version's name sleeps."""
    return str(label).startswith(_ASLEEP)


def own_label(label: object) -> str:
    """The name of a version, asleep or not."""
    return str(label).removeprefix(_ASLEEP)
