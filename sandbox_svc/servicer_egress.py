"""`regreen.sandbox.v1.EgressService`: what sandboxes and preparations asked of the network.

- Translation only; records are kept by `egress_log.Ledger` and, of preparations, by their States.
"""

from collections.abc import Mapping
from typing import Any

from regreen.ids import check_id
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as pb
from sandbox_svc import translate
from sandbox_svc.service import SandboxHost
from sandbox_svc.servicer import Context, filled_page


class EgressServicer(pb.EgressServiceServicer):
    """`regreen.sandbox.v1.EgressService`."""

    def __init__(self, host: SandboxHost) -> None:
        self._host = host

    async def ListEgress(
        self, request: pb.ListEgressRequest, context: Context
    ) -> pb.ListEgressResponse:
        """List requests of a sandbox or of a preparation, oldest first."""
        if bool(request.sandbox_id) == bool(request.state_id):
            raise InvalidArgument("sandbox_id", "and state_id: one must be given", "give one")
        if request.state_id:
            found = self._host.fetched(check_id(request.state_id, "st", "state_id"))
        else:
            asked = check_id(request.sandbox_id, "sbx", "sandbox_id")
            found = self._host.asked(asked)
        records, token = filled_page(
            found, _record_to, _place, request.page_size, request.page_token
        )
        return pb.ListEgressResponse(records=records, next_page_token=token)


def _place(facts: Mapping[str, Any]) -> tuple[float, str]:
    return float(facts["number"]), ""


def _record_to(facts: Mapping[str, Any]) -> pb.EgressRecord:
    fields = {name: value for name, value in facts.items() if name not in ("number", "created_s")}
    return pb.EgressRecord(create_time=translate.timestamp(facts["created_s"]), **fields)
