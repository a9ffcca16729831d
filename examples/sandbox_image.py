"""ADDRESS SOURCE TARGET: a State of an image (`docker save`, OCI), changed, saved as an image."""

from itertools import chain

import grpc

from regreen.client.script import words
from regreen.sandbox import v1 as pb

address, source, target = words(None, None, None)
channel = grpc.insecure_channel(address)
images, sandboxes = pb.ImageServiceStub(channel), pb.SandboxServiceStub(channel)
with open(source, "rb") as archive:
    parts = (pb.ImportImageRequest(chunk=part) for part in iter(lambda: archive.read(1 << 20), b""))
    options = pb.ImportImageRequest(options=pb.ImageOptions())
    state = images.ImportImage(chain([options], parts), timeout=600).state
box = sandboxes.CreateSandbox(pb.CreateSandboxRequest(state_id=state.id), timeout=30).sandbox
command = pb.Command(argv=["/bin/sh", "-c", "echo hello > /made.txt"])
ended = sandboxes.Run(pb.RunRequest(sandbox_id=box.id, command=command), timeout=60).result
kept = sandboxes.SnapshotSandbox(pb.SnapshotSandboxRequest(id=box.id), timeout=60).state
saved = images.ExportImage(pb.ExportImageRequest(state_id=kept.id, reference="made:1"), timeout=600)
with open(target, "wb") as out:
    size = sum(out.write(piece.chunk) for piece in saved)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)
print(state.base, "exit", ended.exit_code, "saved", size, "bytes; now: docker load -i", target)
