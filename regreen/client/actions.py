"""Client of the sandbox service's actions: commands as functions of a state.

- Each method is one RPC; `execute` returns the whole answer, because the result alone does not say
  where it comes from.
- The command's time limit travels in the request; the deadline allows for the queue as well.
"""

from collections.abc import Mapping, Sequence

import grpc

from regreen.client.channel import READ_S, Caller, new_request_id
from regreen.client.sandbox import duration
from regreen.sandbox import v1 as pb

_SLACK_S = 60.0


class ActionClient(Caller):
    """`regreen.sandbox.v1.ActionService`."""

    def __init__(self, channel: grpc.aio.Channel, *, patience_s: float = 30.0) -> None:
        super().__init__(channel, patience_s=patience_s)
        self._stub = pb.ActionServiceStub(channel)

    async def execute(
        self,
        state_id: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: bytes = b"",
        timeout_s: float = 600.0,
        output_bytes: int = 0,
        limits: pb.Limits | None = None,
        do_not_cache: bool = False,
        skip_cache_lookup: bool = False,
        keep_state: bool = False,
        request_id: str = "",
    ) -> pb.ExecuteResponse:
        """What a command gives on a state, run now or known before."""
        command = pb.Command(
            argv=argv,
            environment=environment or {},
            cwd=cwd,
            stdin=stdin,
            timeout=duration(timeout_s),
            output_bytes=output_bytes,
        )
        request = pb.ExecuteRequest(
            request_id=request_id or new_request_id(),
            state_id=state_id,
            command=command,
            limits=limits,
            do_not_cache=do_not_cache,
            skip_cache_lookup=skip_cache_lookup,
            keep_state=keep_state,
        )
        response: pb.ExecuteResponse = await self._call(
            self._stub.Execute, request, timeout_s + _SLACK_S
        )
        return response

    async def list_quarantined(
        self, *, page_size: int = 0, page_token: str = ""
    ) -> pb.ListQuarantinedResponse:
        """One page of the actions whose runs differed, oldest first."""
        request = pb.ListQuarantinedRequest(page_size=page_size, page_token=page_token)
        response: pb.ListQuarantinedResponse = await self._call(
            self._stub.ListQuarantined, request, READ_S
        )
        return response
