"""Whose a kill for want of memory is, in a container of which the engine forgets none."""

import asyncio

import pytest

from sandbox_svc.backends.base import EndReason
from tests.contract.runtimes import SMALL, sh, started

pytestmark = [pytest.mark.asyncio(loop_scope="function"), pytest.mark.slow]


async def test_a_kill_is_for_want_of_memory_only_where_the_kernel_did_it(tmp_path):
    async with started("docker", tmp_path) as runtime:
        box = await runtime.create([], limits=SMALL)
        hungry, kill = """perl -e '$x = "x" x 300000000; sleep 1'""", "kill -9 $$"
        wait = f"until [ -e /work/go ]; do sleep 0.1; done; {kill}"
        for script, reason in (
            (kill, EndReason.SIGNAL),
            (f"{hungry}; true", EndReason.EXIT),  # its shell lives on
            (kill, EndReason.SIGNAL),
            (f"exec {hungry}", EndReason.OOM),
            (kill, EndReason.SIGNAL),
        ):
            assert (await sh(box, script)).reason is reason
        long = asyncio.create_task(sh(box, wait))
        await asyncio.sleep(0.5)
        assert (await sh(box, f"exec {hungry}")).reason is EndReason.OOM
        assert (await sh(box, "touch /work/go")).ok
        assert (await long).reason is EndReason.SIGNAL  # that kill was another's
        await box.delete()
