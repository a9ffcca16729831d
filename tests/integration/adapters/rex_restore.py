"""Restores the sandbox of a SWE-ReX deployment and goes on in its session; see test_swe_rex.py."""

import asyncio
import json
import sys

from swerex.runtime.abstract import BashAction, CreateBashSessionRequest

from regreen.adapters.swe_rex import RegreenDeployment
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient


async def main():
    config = json.loads(sys.argv[1])
    deployment = RegreenDeployment(**config)
    await deployment.start()
    runtime = deployment.runtime

    async def say(command):
        return (await runtime.run_in_session(BashAction(command=command))).output.strip()

    await runtime.create_session(CreateBashSessionRequest())
    await say("mkdir sub; cd sub; x=kept")
    channel = connect(config["address"])
    sandboxes = SandboxClient(channel)
    state = await sandboxes.snapshot_sandbox(deployment.sandbox_id)
    await say("touch later")
    await sandboxes.restore_sandbox(deployment.sandbox_id, state.id)
    told = [await say("echo $x $PWD"), await say("[ -e later ] && echo there || echo gone")]
    await channel.close()
    await deployment.stop()
    print(json.dumps(told))


asyncio.run(main())
