"""Weights by a process group: SGLang's servers join the one of a sender, and take its tensors.

- Ranks are numbered from 1 in the order of replicas; the sender is 0.
- Tensors are taken in parts, since a server holds those of a request beside its weights; the last
  part names the version.
- Replicas that hold other weights than each other afterwards are found by SGLang's own checksum;
  it is over the tensors as a server keeps them, so the file's digest cannot be held against it.
- A sender that ends breaks what still waits for it; its bounds are the bounds of these calls.

Source: sglang 0.5.16, `srt/model_executor/model_runner_components/weight_updater.py`.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import Any

from policy_svc.engines.base import Offer
from policy_svc.engines.sglang_replica import Replica, all_of
from regreen.rpc.errors import InvalidArgument, Unavailable

_PART_BYTES = 512 << 20
_ITEM_BYTES = 8
"""At most; of types that weights have, the widest."""
_RECEIVE_S = 3600.0


def ranks_of(server_info: dict[str, Any]) -> int:
    """Ranks of a server that join a group; 0: it lets none."""
    if int(server_info.get("dp_size") or 1) > 1 or int(server_info.get("pp_size") or 1) > 1:
        return 0
    return int(server_info.get("tp_size") or 1)


async def join(replicas: Sequence[Replica], offer: Offer) -> None:
    """Have every rank in the sender's group."""
    calls, rank = [], 1
    for replica in replicas:
        body = {
            "master_address": offer.address,
            "master_port": offer.port,
            "rank_offset": rank,
            "world_size": offer.receivers + 1,
            "group_name": offer.group,
            "backend": offer.backend,
        }
        calls.append(_ask(replica, "/init_weights_update_group", body))
        rank += replica.ranks
    await all_of(calls)


async def take(replicas: Sequence[Replica], offer: Offer, label: str) -> None:
    """Have every rank take every tensor, as a version of that name."""
    parts = list(_parts(offer))
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        body: dict[str, Any] = {
            "names": [name for name, _, _ in part],
            "dtypes": [dtype for _, dtype, _ in part],
            "shapes": [list(shape) for _, _, shape in part],
            "group_name": offer.group,
            "flush_cache": last,
            "abort_all_requests": False,
        }
        if last:
            body["weight_version"] = label
        await all_of([_ask(one, "/update_weights_from_distributed", body) for one in replicas])
    if len({replica.ranks for replica in replicas}) == 1:
        sums = await asyncio.gather(*(_checksum(replica) for replica in replicas))
        if len(set(sums)) > 1:
            raise Unavailable("the servers received different weights", retry_after_s=1.0)


async def leave(replicas: Sequence[Replica], offer: Offer) -> None:
    """Undo `join`; a server that never joined, or is gone, is left alone."""
    body = {"group_name": offer.group}
    calls = (
        replica.json("POST", "/destroy_weights_update_group", body, retry_s=0.0)
        for replica in replicas
    )
    await asyncio.gather(*calls, return_exceptions=True)


def _parts(offer: Offer) -> Iterator[list[tuple[str, str, tuple[int, ...]]]]:
    part: list[tuple[str, str, tuple[int, ...]]] = []
    size_bytes = 0
    for tensor in offer.tensors:
        own_bytes = _ITEM_BYTES * math.prod(tensor[2])
        if part and size_bytes + own_bytes > _PART_BYTES:
            yield part
            part, size_bytes = [], 0
        part.append(tensor)
        size_bytes += own_bytes
    yield part


async def _checksum(replica: Replica) -> str:
    try:
        told = await replica.json("POST", "/weights_checker", {"action": "checksum"})
    except InvalidArgument:
        return ""  # a release without it
    return str(told.get("per_engine_checksum", ""))


async def _ask(replica: Replica, route: str, body: dict[str, Any]) -> None:
    """Raises: Unavailable: it did not do it, for whatever reason."""
    try:
        answer = await replica.json("POST", route, body, timeout_s=_RECEIVE_S, retry_s=0.0)
    except InvalidArgument as error:
        raise Unavailable(f"{replica.url}: {error.message}", retry_after_s=1.0) from error
    if not answer.get("success"):
        raise Unavailable(f"{replica.url}: {answer.get('message')}", retry_after_s=1.0)
