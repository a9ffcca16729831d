"""What becomes of calls whose callers are not there: they left, or do not read.

- A mutation with a `request_id`, once begun, goes on to its end and is remembered, but for these.
- A stream that sends an archive ends when nothing of it is taken; one that follows a command waits,
  for that is how a slow reader slows it.
"""

from collections.abc import Mapping

from regreen.rpc.idempotency import Leaving
from sandbox_svc.settings import SandboxSettings

_PACKAGE = "regreen.sandbox.v1"
LEAVING: Mapping[str, Leaving] = {
    f"{_PACKAGE}.SandboxService/Run": Leaving.BREAKS,
    f"{_PACKAGE}.SandboxService/Validate": Leaving.ENDS,
    f"{_PACKAGE}.ActionService/Execute": Leaving.ENDS,
}


def idle_s(settings: SandboxSettings) -> Mapping[str, float]:
    """By method, how long a stream waits for its reader."""
    sent = (f"{_PACKAGE}.StateService/ExportState", f"{_PACKAGE}.ImageService/ExportImage")
    return dict.fromkeys(sent, settings.transfer_idle_s)
