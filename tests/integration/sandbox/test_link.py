"""A link whose other side ends: nobody is left with an error that nobody asked for."""

import asyncio
import contextlib
import gc
import socket

from sandbox_svc.backends.link import Link, LinkClosed


async def test_a_request_that_could_not_be_sent_leaves_no_error_behind():
    told: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(ours)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"{}" * 500)
    asking = [asyncio.create_task(link.request("read", str(number))) for number in range(5)]
    await asyncio.sleep(0.01)
    theirs.close()
    for ended in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(ended, LinkClosed)
    del asking, ended
    gc.collect()
    await asyncio.sleep(0)
    assert told == []
