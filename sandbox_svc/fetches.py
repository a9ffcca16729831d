"""What the service itself fetches while it prepares a State: by an allow list, all recorded.

- Whoever fetches asks through `Fetches`: the package indexes that this service is set up with and
  the hosts that its operator adds are asked, no other, whatever a page links or redirects to. A
  spec names files by digest, never places.
- A refused request is never sent; it is recorded like any other.
- The digest of what came back is of the bytes as they came: of a release file, the file's own.
- Records hold no header and no query of a URL: both can carry credentials.
- The requests of a preparation that succeeded are part of the State's record, as text.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx

from regreen.allowlist import AllowList, normal_host
from regreen.pkgindex import PackageIndex, place_of
from regreen.rpc.errors import MissingDependency
from regreen.rpc.tenants import charged
from sandbox_svc.egress_log import Decision, Ledger, Record, cut

METADATA = "egress"
"""Where the metadata of a State has the requests of its preparation."""
_MOST_KEPT = 1000
_RECORD = "regreen.record"


class Fetches:
    """The requests of one preparation; `close` ends it."""

    def __init__(self, ledger: Ledger, state_id: str, allow: AllowList) -> None:
        self._ledger, self._state_id, self._allow = ledger, state_id, allow
        self._tenant = charged()
        self._records: list[Record] = []
        self._open: dict[int, Record] = {}

    def watch(self, index: PackageIndex) -> None:
        """See to every request of a client, whose own indexes it may ask."""
        own = frozenset((normal_host(host), port) for host, port in index.places)

        async def asked(request: httpx.Request) -> None:
            self._asked(request, own)

        index.watch(asked, self._answered)

    def _asked(self, request: httpx.Request, own: frozenset[tuple[str, int]]) -> None:
        """Record a request that is about to be sent.

        Raises:
            MissingDependency: its host is not one that may be asked.
        """
        host, port = place_of(request.url)
        record = self._ledger.begin(self._state_id, tenant=self._tenant)
        self._open[record.number] = record
        if len(self._records) < _MOST_KEPT:
            self._records.append(record)
        record.method, record.port = request.method, port
        record.path = cut(request.url.raw_path.split(b"?", 1)[0].decode("ascii", "replace"))
        try:
            record.host = normal_host(host)
        except ValueError as error:
            self._end(record, Decision.MALFORMED, f"the host {error}")
            raise self._refused(host[:100], port) from error
        if (record.host, port) not in own and not self._allow.permits(record.host, port):
            self._end(record, Decision.HOST, "is not among the hosts of preparations")
            raise self._refused(record.host, port)
        request.extensions = {**request.extensions, _RECORD: record}

    def _refused(self, host: str, port: int) -> MissingDependency:
        return MissingDependency(
            f"the package index leads to {host}:{port}, which preparations may not ask; "
            "if it should, add it to the setting prepare_hosts of the sandbox service",
            metadata={"host": f"{host}:{port}"},
        )

    async def _answered(self, response: httpx.Response) -> None:
        record = response.request.extensions[_RECORD]
        record.status = response.status_code
        stream = response.stream
        if isinstance(stream, httpx.AsyncByteStream):
            response.stream = _Counted(self, record, stream)

    def finished(self, record: Record, *, whole: bool) -> None:
        """An answer was read, or given up."""
        if record.number in self._open:
            self._end(record, record.decision, "" if whole else "was not read to its end")

    def _end(self, record: Record, decision: Decision, detail: str) -> None:
        record.decision, record.detail = decision, detail
        self._open.pop(record.number, None)
        self._ledger.end(record)

    def close(self) -> None:
        """End what has no answer; from now on the records are kept for a while."""
        for record in list(self._open.values()):
            self._end(record, Decision.FAILED, "there was no answer")
        self._ledger.closed(self._state_id)

    def encode(self) -> str:
        """The requests as text, oldest first: one value in a State's record, cheap to copy."""
        return json.dumps([record.facts() for record in self._records], separators=(",", ":"))


def decode(text: str) -> Sequence[Mapping[str, Any]]:
    """The requests of a text that `Fetches.encode` made."""
    requests: Sequence[Mapping[str, Any]] = json.loads(text)
    return requests


class _Counted(httpx.AsyncByteStream):
    """A body whose bytes are counted as they come."""

    def __init__(self, fetches: Fetches, record: Record, inner: httpx.AsyncByteStream) -> None:
        self._fetches, self._record, self._inner = fetches, record, inner
        self._whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            self._record.received.add(chunk)
            yield chunk
        self._whole = True

    async def aclose(self) -> None:
        """End the answer."""
        try:
            await self._inner.aclose()
        finally:
            self._fetches.finished(self._record, whole=self._whole)
