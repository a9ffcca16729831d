"""Speak to a command while it runs: a prompt on a terminal, keys, a signal, how it ended."""

import asyncio
import sys

from regreen.client.channel import connect
from regreen.client.exec import ExecClient
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.sandbox import v1 as pb


async def main(address: str) -> None:
    async with connect(address) as channel:
        states, sandboxes, execs = StateClient(channel), SandboxClient(channel), ExecClient(channel)
        prepared = states.prepare_state(pb.EnvironmentSpec(builder="system"))
        *_, last = [event async for event in prepared]
        box = (await sandboxes.create_sandbox(last.state.id)).id
        answers: asyncio.Queue[bytes] = asyncio.Queue()

        async def keys():
            yield b"6 * 7\n"
            while b"42" not in await answers.get():
                pass
            yield b"exit(3)\n"

        size = pb.TerminalSize(rows=30, columns=100)
        async for event in execs.exec_stream(box, ["python3"], stdin=keys(), terminal=size):
            if event.HasField("stdout"):  # goes on by itself after a dropped connection
                answers.put_nowait(event.stdout.data)
                print(event.stdout.data.decode(), end="")
        print("exit", event.ended.exit_code)
        slow = await execs.start_exec(box, ["sleep", "600"])
        print("still running:", await execs.signal_exec(box, slow.id, 15))
        ended = [event async for event in execs.follow_exec(box, slow.id)][-1].ended
        print("signal", ended.signal)
        await sandboxes.delete_sandbox(box)


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50052"))
