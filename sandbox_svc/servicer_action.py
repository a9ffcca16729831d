"""`regreen.sandbox.v1.ActionService` over a `SandboxHost`: it translates, nothing else.

- A repeated request_id is answered from memory; a missing one means once.
"""

from typing import Any

import grpc

from regreen.ids import check_id
from regreen.sandbox import v1 as pb
from sandbox_svc import translate
from sandbox_svc.action_store import Quarantined
from sandbox_svc.actions import Answer
from sandbox_svc.service import SandboxHost
from sandbox_svc.servicer import page

Context = grpc.aio.ServicerContext[Any, Any]


class ActionServicer(pb.ActionServiceServicer):
    """`regreen.sandbox.v1.ActionService`."""

    def __init__(self, host: SandboxHost) -> None:
        self._host = host

    async def Execute(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteResponse:
        """Run a command in a fresh fork, or answer with what it gave before."""
        check_id(request.state_id, "st", "state_id")
        limits = translate.limits_from(request.limits)
        cwd = self._host.states.get(request.state_id).cwd
        command = translate.command_from(request.command, limits, cwd)
        answer = await self._host.actions.execute(
            request.state_id,
            command,
            limits=limits,
            do_not_cache=request.do_not_cache,
            skip_cache_lookup=request.skip_cache_lookup,
            keep_state=request.keep_state,
        )
        return _answer_to(answer)

    async def ListQuarantined(
        self, request: pb.ListQuarantinedRequest, context: Context
    ) -> pb.ListQuarantinedResponse:
        """List actions whose runs differed, oldest first."""
        chosen, token = page(
            self._host.actions.quarantined(), _place, request.page_size, request.page_token
        )
        messages = [
            pb.QuarantinedAction(
                action_sha256=item.key,
                state_id=item.state_id,
                argv=item.argv,
                create_time=translate.timestamp(item.created_s),
                detail=item.detail,
            )
            for item in chosen
        ]
        return pb.ListQuarantinedResponse(actions=messages, next_page_token=token)


def _place(item: Quarantined) -> tuple[float, str]:
    return item.created_s, item.key


def _answer_to(answer: Answer) -> pb.ExecuteResponse:
    response = pb.ExecuteResponse(
        result=translate.result_to(answer.outcome.result),
        cached=answer.cached,
        action_sha256=answer.key,
        quarantined=answer.quarantined,
    )
    if answer.state is not None:
        response.state.CopyFrom(translate.state_to(answer.state))
    return response
