"""Prometheus metrics of every call, and the HTTP endpoint that shows them.

- Names and labels as in go-grpc-middleware, so that stock dashboards fit.
- Labels are bounded: service, method and code come from descriptors and enums, never from requests.
- `/healthz` answers 200 while the service serves and 503 before and while it drains.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

import regreen
from regreen.rpc.errors import FailedPrecondition

_SILENT_S, _CONNECTIONS = 10.0, 64
_CALL = ["grpc_type", "grpc_service", "grpc_method"]
STARTED = Counter("grpc_server_started", "Calls started.", _CALL)
HANDLED = Counter("grpc_server_handled", "Calls ended.", [*_CALL, "grpc_code"])
SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time from start to end of calls.",
    _CALL,
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)
BUILD_INFO = Gauge("regreen_build_info", "Always 1; the version is a label.", ["version"])
BUILD_INFO.labels(regreen.__version__).set(1)
CERTIFICATE_ENDS = Gauge(
    "regreen_tls_certificate_expires_seconds",
    "Unix time at which the certificate that is served ends; 0 without TLS.",
)


def tell_expiry(chain: bytes | None) -> None:
    """Show when the first certificate of a PEM chain ends."""
    if chain:
        from cryptography import x509  # only where there is TLS

        certificate = x509.load_pem_x509_certificate(chain)
        CERTIFICATE_ENDS.set(certificate.not_valid_after_utc.timestamp())


class _Quiet(WSGIRequestHandler):
    timeout = _SILENT_S  # of one read; without it a connection that says nothing stays for ever

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing; scrapes are not worth a log line."""

    def get_environ(self) -> dict[str, Any]:
        """What was asked, which is whole now."""
        if isinstance(self.server, _Server):
            self.server.note_whole(self.connection)
        return super().get_environ()


class _Server(ThreadingWSGIServer):
    """Keeps a number of connections, of which each takes a thread.

    One too many has the oldest shut that has not yet asked for anything: a flood of silent ones
    drives itself out, and whoever asks is answered.
    """

    request_queue_size = _CONNECTIONS

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, bool] = {}
        """Connections, oldest first, and whether their request is whole."""

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        with self._lock:
            if len(self._open) >= _CONNECTIONS:
                silent = (one for one, whole in self._open.items() if not whole)
                oldest = next(silent, None) or next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and ends
            self._open[request] = False
        super().process_request(request, client_address)

    def note_whole(self, request: socket.socket) -> None:
        """A connection has said all that it asks for."""
        with self._lock:
            if request in self._open:
                self._open[request] = True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)


class _Server6(_Server):
    address_family = socket.AF_INET6


class MetricsServer:
    """Serves `/metrics` and `/healthz` from a thread of its own.

    Raises:
        FailedPrecondition: the address cannot be bound.
    """

    def __init__(self, address: str, healthy: Callable[[], bool]) -> None:
        self._healthy = healthy
        self._metrics = make_wsgi_app(REGISTRY)
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        server_class = _Server6 if ":" in host else _Server
        try:
            self._httpd = make_server(
                host, int(port), self._app, server_class, handler_class=_Quiet
            )
        except OSError as error:
            raise FailedPrecondition(
                f"metrics: cannot bind {address}; is another instance running? "
                f"--metrics {address.rpartition(':')[0]}:0 takes a free port ({error})"
            ) from error
        self.port: int = self._httpd.server_port
        self._thread = threading.Thread(
            target=self._httpd.serve_forever, args=(0.05,), name="metrics", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._httpd.shutdown()
        self._httpd.server_close()

    def _app(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/healthz":
            ok = self._healthy()
            status, body = (
                ("200 OK", b"ok\n") if ok else ("503 Service Unavailable", b"not serving\n")
            )
            start_response(status, [("Content-Type", "text/plain")])
            return [body]
        if path == "/metrics":
            result: Iterable[bytes] = self._metrics(environ, start_response)
            return result
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"try /metrics or /healthz\n"]
