"""gRPC credentials that follow the certificates in their files.

- Servers look at every handshake, so a connection never gets an older certificate than the disk's.
"""

from collections.abc import Callable
from typing import cast

import grpc

from regreen.rpc import metrics
from regreen.rpc.certificates import Pem, Tls, Watched
from regreen.rpc.logging import get


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials of a server; with a `ca`, clients must show a certificate of it.

    Raises:
        FailedPrecondition: as `Watched`.
    """
    files = Watched(tls)
    metrics.tell_expiry(files.pem.cert)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        pem = files.renewed()
        if pem is None:
            return None
        metrics.tell_expiry(pem.cert)
        get().info("certificates renewed")
        return _configuration(pem)

    # Its types know no None, which means no change.
    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", renewed)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(files.pem), fetch, require_client_authentication=tls.ca is not None
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    pairs = [(pem.key or b"", pem.cert or b"")]
    return grpc.ssl_server_certificate_configuration(pairs, pem.ca)


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """Credentials of a client."""
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
