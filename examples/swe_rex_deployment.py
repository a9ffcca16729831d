"""SWE-ReX's own tutorial on a Regreen sandbox (pip install '.[adapters]')."""

import asyncio

import grpc
from swerex.runtime.abstract import BashAction, Command, CreateBashSessionRequest, WriteFileRequest

from regreen.adapters.swe_rex import RegreenDeployment
from regreen.client.script import words
from regreen.sandbox import v1 as pb

address = words("127.0.0.1:50052")[0]
states = pb.StateServiceStub(grpc.insecure_channel(address))
*_, last = states.PrepareState(pb.PrepareStateRequest(spec={"builder": "system"}), timeout=120)
deployment = RegreenDeployment(address=address, state_id=last.state.id)


async def run_some_stuff(deployment):
    await deployment.start()
    runtime = deployment.runtime
    print(await runtime.execute(Command(command=["echo", "Hello, world!"])))
    await runtime.create_session(CreateBashSessionRequest())
    await runtime.run_in_session(BashAction(command="export MYVAR=test; cd /tmp"))
    print(await runtime.run_in_session(BashAction(command="echo $MYVAR in $PWD", timeout=10)))
    await runtime.write_file(WriteFileRequest(path="/tmp/made.py", content="print(6 * 7)\n"))
    print(await runtime.run_in_session(BashAction(command="python3 made.py")))
    await deployment.stop()


asyncio.run(run_some_stuff(deployment))
