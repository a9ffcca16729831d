"""A TCP proxy whose connections can be cut, to see what a client makes of that."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

_READ_BYTES = 65_536


class CuttingProxy:
    """Passes bytes on to a unix socket until it is told to cut."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.removeprefix("unix:")
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0
        self.target = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        far_reader, far_writer = await asyncio.open_unix_connection(self._upstream)
        both = {writer, far_writer}
        self._writers |= both
        passing = (_pass_on(reader, far_writer), _pass_on(far_reader, writer))
        try:
            await asyncio.gather(*passing, return_exceptions=True)
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()

    def cut(self) -> int:
        """Break every connection at once, without a farewell; how many there were."""
        for writer in list(self._writers):
            writer.transport.abort()
        return len(self._writers) // 2


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_READ_BYTES):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@contextlib.asynccontextmanager
async def cutting(upstream: str) -> AsyncIterator[CuttingProxy]:
    """A proxy on a free port of this host."""
    proxy = CuttingProxy(upstream)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    proxy.target = f"{host}:{port}"
    async with server:
        yield proxy
        server.close()
        proxy.cut()
