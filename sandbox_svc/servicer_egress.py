"""`regreen.sandbox.v1.EgressService`: what sandboxes asked of the network.

- Translation only; records are kept by `egress_log.Ledger`.
"""

from regreen.ids import check_id
from regreen.sandbox import v1 as pb
from sandbox_svc import translate
from sandbox_svc.egress_log import Record
from sandbox_svc.service import SandboxHost
from sandbox_svc.servicer import Context, page


class EgressServicer(pb.EgressServiceServicer):
    """`regreen.sandbox.v1.EgressService`."""

    def __init__(self, host: SandboxHost) -> None:
        self._host = host

    async def ListEgress(
        self, request: pb.ListEgressRequest, context: Context
    ) -> pb.ListEgressResponse:
        """List requests of a sandbox, oldest first."""
        records = self._host.egress.ledger.list(check_id(request.sandbox_id, "sbx", "sandbox_id"))
        chosen, token = page(records, _place, request.page_size, request.page_token)
        return pb.ListEgressResponse(
            records=[_record_to(record) for record in chosen], next_page_token=token
        )


def _place(record: Record) -> tuple[float, str]:
    return float(record.number), ""


def _record_to(record: Record) -> pb.EgressRecord:
    return pb.EgressRecord(
        sandbox_id=record.sandbox_id,
        create_time=translate.timestamp(record.created_s),
        method=record.method,
        host=record.host,
        port=record.port,
        path=record.path,
        allowed=record.allowed,
        detail=record.detail,
        status=record.status,
        sent_bytes=record.sent.size_bytes,
        received_bytes=record.received.size_bytes,
        sent_sha256=record.sent.sha256,
        received_sha256=record.received.sha256,
    )
