"""`regreen.sandbox.v1.ImageService` over a `SandboxHost`: it translates, nothing else.

- The first message of an import holds the options, the others the archive; a stream that is not so
  is refused before anything of it is kept for long.
- Imports need no memory of request ids: what they make is named by its content.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from regreen.ids import check_id
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
from sandbox_svc import translate
from sandbox_svc.images.manifest import Format
from sandbox_svc.labels import check_labels
from sandbox_svc.service import SandboxHost

Context = grpc.aio.ServicerContext[Any, Any]
_FORMATS = {
    pb.IMAGE_FORMAT_UNSPECIFIED: Format.UNKNOWN,
    pb.IMAGE_FORMAT_OCI: Format.OCI,
    pb.IMAGE_FORMAT_DOCKER: Format.DOCKER,
    pb.IMAGE_FORMAT_ROOT: Format.ROOT,
}


class ImageServicer(pb.ImageServiceServicer):
    """Images as states and states as images."""

    def __init__(self, host: SandboxHost) -> None:
        self._host = host

    async def ImportImage(
        self, requests: AsyncIterator[pb.ImportImageRequest], context: Context
    ) -> pb.ImportImageResponse:
        """Make a state of an image."""
        options = await _options(requests)
        kind = _FORMATS.get(options.format)
        if kind is None:
            raise InvalidArgument("options.format", f"{options.format} is unknown", "leave it out")
        labels = check_labels(options.labels, "options.labels")
        state, notes = await self._host.images.import_(
            _chunks(requests), kind=kind, reference=options.reference, labels=labels
        )
        return pb.ImportImageResponse(state=translate.state_to(state), notes=notes)

    async def ExportImage(
        self, request: pb.ExportImageRequest, context: Context
    ) -> AsyncIterator[pb.ExportImageResponse]:
        """Stream a state as an image archive."""
        check_id(request.state_id, "st", "state_id")
        pieces = self._host.images.export(request.state_id, request.reference)
        async with contextlib.aclosing(pieces):
            async for chunk in pieces:
                yield pb.ExportImageResponse(chunk=chunk)


async def _options(requests: AsyncIterator[pb.ImportImageRequest]) -> pb.ImageOptions:
    async for request in requests:
        if request.WhichOneof("part") == "options":
            return request.options
        break
    raise InvalidArgument("options", "are not in the first message", "send them first")


async def _chunks(requests: AsyncIterator[pb.ImportImageRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidArgument(
                "chunk",
                "is not in every message after the first",
                "send the options once, then chunks",
            )
        yield request.chunk
