"""Pages: tokens are those of their query, and whoever makes one of his own is refused."""

import base64
import hashlib
import json
from collections.abc import AsyncIterator

import pytest

from regreen.client.channel import connect
from regreen.dataset import v1 as pb
from regreen.rpc.errors import InvalidArgument
from tests.integration import dataset_samples as samples
from tests.integration.dataset_samples import Clients, imported, new_run


@pytest.fixture
async def clients(dataset_address: str) -> AsyncIterator[Clients]:
    async with connect(dataset_address) as channel:
        yield Clients(channel)


async def test_page_tokens_are_checked(clients: Clients):
    await imported(clients, 3)
    page = await clients.tasks.list_tasks(page_size=1)
    assert page.next_page_token
    tampered = ("A" if page.next_page_token[0] != "A" else "B") + page.next_page_token[1:]
    for token in ("garbage", "%%%", tampered, "AAAA"):
        with pytest.raises(InvalidArgument) as caught:
            await clients.tasks.list_tasks(page_token=token)
        assert caught.value.field == "page_token"
    with pytest.raises(InvalidArgument):
        await clients.tasks.list_tasks(
            page_token=page.next_page_token, filter=pb.TaskFilter(split="train")
        )
    with pytest.raises(InvalidArgument) as caught:
        await clients.tasks.list_tasks(page_size=1001)
    assert caught.value.field == "page_size"


@pytest.mark.parametrize(
    "after",
    ["[]", '["x"]', '[1.5]', "[true]", "[null]", "[[1]]", '{"a": 1}', "7", f"[{1 << 63}]",
     "[1, 2]", "[" * 20_000, "NaN", "[NaN]", ""],
)  # fmt: skip
async def test_a_token_that_somebody_made_is_refused(clients: Clients, after: str):
    """Its checksum is no secret: what it holds is checked as any input is."""
    (task_id,), run_id = await imported(clients), await new_run(clients)
    for number in range(2):
        made = samples.trajectory(task_id, salt=f"{run_id}{number}")
        made.run_id = run_id
        await clients.trajectories.commit_trajectory(made)

    async def listed(token: str) -> str:
        page = await clients.trajectories.list_trajectories(
            page_size=1, page_token=token, filter=pb.TrajectoryFilter(run_id=run_id)
        )
        return page.next_page_token

    def made_of(token: str) -> str:
        signed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        tag = json.loads(signed[12:])[0]
        body = f'["{tag}",{after}]'.encode()
        return base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:12] + body).decode()

    token = await listed("")
    assert await listed(token) == ""
    with pytest.raises(InvalidArgument) as caught:
        await listed(made_of(token))
    assert caught.value.field == "page_token"


async def test_metrics_of_any_name_are_paged(clients: Clients, dataset_address: str):
    run_id = await new_run(clients)
    wanted = ["a\0b", "a\0c", "plain", "\ufdd0"]
    await clients.runs.record_metrics(run_id, 1, dict.fromkeys(wanted, 0.5))
    found, token = [], ""
    async with connect(dataset_address) as channel:
        stub = pb.RunServiceStub(channel)
        for _ in wanted:
            request = pb.ListMetricsRequest(run_id=run_id, page_size=1, page_token=token)
            page = await stub.ListMetrics(request, timeout=10)
            found += [point.name for point in page.points]
            token = page.next_page_token
    assert (sorted(found), token) == (sorted(wanted), "")
