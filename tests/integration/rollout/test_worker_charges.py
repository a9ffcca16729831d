"""A worker for everybody names, in each call for a rollout, the tenant whose run it is of."""

from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from dataset_svc.__main__ import serving
from dataset_svc.settings import DatasetSettings
from regreen.client.access import Access
from regreen.client.stack import Endpoints, Stack
from regreen.rollout.episode import Runner
from regreen.rollout.worker import Worker
from regreen.rpc.tenants import CHARGED
from regreen.tokens import TokenFile
from tests.integration.rollout.test_worker import enqueue
from tests.integration.rollout.world import PIN, VALIDATE, says

pytestmark = pytest.mark.asyncio(loop_scope="session")
TENANTS = {"a": "a", "b": "b", "worker": "*"}


class Heard:
    """A channel that notes whom each call names to be charged."""

    def __init__(self, channel, calls) -> None:
        self._channel, self._calls = channel, calls

    def __getattr__(self, name):
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return getattr(self._channel, name)

        def make(method, *codecs, **options):
            begin = getattr(self._channel, name)(method, *codecs, **options)

            def call(*given, **options):
                charged = dict(options.get("metadata") or ()).get(CHARGED, "")
                self._calls.append((method.rpartition("/")[2], charged))
                return begin(*given, **options)

            return call

        return make


@pytest_asyncio.fixture(loop_scope="session")
async def dataset(database_url, tmp_path):
    """Address of a dataset service with tokens."""
    file, now = TokenFile(tmp_path / "tokens.json"), datetime.now(UTC)
    for name, tenant in TENANTS.items():
        _, text = file.create(name, ["dataset:admin"], tenant, timedelta(days=1), now)
        (tmp_path / name).write_text(text)
    settings = DatasetSettings(
        listen="127.0.0.1:0", metrics="127.0.0.1:0", home=tmp_path, drain_s=0.5, fsync=False,
        tokens=file.path,
    )  # fmt: skip
    async with serving(settings, database_url) as server:
        yield server.address


async def test_each_call_for_a_rollout_names_the_tenant_of_its_run(world, dataset, tmp_path):
    async with world.playing(says(PIN, VALIDATE), dataset=dataset) as playing:
        found = playing.endpoints.addresses
        of = {name: Access(token_file=tmp_path / name) for name in TENANTS}
        for tenant in ("a", "b"):
            async with Stack(Endpoints(**found, access=of[tenant])) as stack:
                await enqueue(stack, world, size=1)
        calls: list[tuple[str, str]] = []
        endpoints = Endpoints(**found, access=of["worker"])
        async with Stack(endpoints, wrap=lambda channel: Heard(channel, calls)) as stack:
            stats = await Worker(stack, Runner(stack), concurrency=2).run(until_idle=True)
        assert stats.committed == 2
    by_call: dict[str, set[str]] = {}
    for name, charged in calls:
        by_call.setdefault(name, set()).add(charged)
    for name in ("CreateSandbox", "Generate", "Validate", "CommitRollout", "DeleteSandbox"):
        assert by_call[name] == {"a", "b"}, name
    for name in ("LeaseRollouts", "GetQueue"):
        assert by_call[name] == {""}, name
