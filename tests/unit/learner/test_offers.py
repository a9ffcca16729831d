"""Weights that a learner offers, over the wire: where to join, what is sent, and of which file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from regreen.batch import Batch
from regreen.rpc.errors import InvalidArgument, NotFound
from tests.unit.learner.test_restarts import start
from tests.unit.learner.test_service import learner


async def test_what_was_published_is_offered(
    tiny_model: Path, make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    async with learner(tmp_path) as (client, _):
        with pytest.raises(NotFound):
            await client.offer_weights("run_l", 2)
        await start(client, tiny_model)
        with pytest.raises(NotFound, match="published no weights"):
            await client.offer_weights("run_l", 2)
        await client.step("run_l", 1, batch=make_batch(seed=1).to_bytes(), lend_memory=True)
        made = await client.publish_weights("run_l", policy_version=12, driver_step=1)
        with pytest.raises(InvalidArgument, match="receivers"):
            await client.offer_weights("run_l", 0)
        offer = await client.offer_weights("run_l", 2)
        assert (offer.digest, offer.receivers, offer.backend) == (made.digest, 2, "gloo")
        assert offer.port > 0
        sent = load_file(Path(made.uri) / "model.safetensors")
        told = {one.name: (one.dtype, tuple(one.shape)) for one in offer.tensors}
        assert told == {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in sent.items()
        }
        again = await client.offer_weights("run_l", 2)
        assert again.group != offer.group
