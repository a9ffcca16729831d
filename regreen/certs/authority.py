"""Makes authorities and certificates: X.509 in memory, no file is touched.

- A service's certificate serves and calls; a client's only calls: no client can pose as a service.
- Lives are short and end no later than their authority's; they begin a little early, for clocks
  that go behind.
- Time is an argument.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from regreen.rpc.errors import InvalidArgument

_EARLY = timedelta(minutes=5)
_SHA256 = hashes.SHA256()


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def cert_pem(self) -> bytes:
        """The certificate as PEM."""
        return self.cert.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as PEM, without a password: gRPC takes no other."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def read_pair(cert: bytes, key: bytes) -> Pair:
    """A pair from its PEM texts.

    Raises:
        ValueError: they are none.
    """
    found = serialization.load_pem_private_key(key, None)
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not of an elliptic curve")
    return Pair(x509.load_pem_x509_certificate(cert), found)


def make_authority(life: timedelta, now: datetime) -> Pair:
    """A new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Regreen authority")
    builder = (
        _builder(name, name, key, now, now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return Pair(builder.sign(key, _SHA256), key)


def issue(authority: Pair, name: str, hosts: Sequence[str], life: timedelta, now: datetime) -> Pair:
    """A certificate of `authority`: with `hosts`, of a service that serves them; else a client's.

    Raises:
        InvalidArgument: a host is none, or the authority has ended.
    """
    end = min(now + life, authority.cert.not_valid_after_utc)
    if end <= now:
        raise InvalidArgument(
            "authority", "it has ended", "make a new one with `regreen certs renew --ca`"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(_name(name), authority.cert.subject, key, now, end)
    if hosts:
        purposes.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    signer = authority.cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer.value),
            critical=False,
        )
    )
    return Pair(builder.sign(authority.key, _SHA256), key)


def hosts_of(cert: x509.Certificate) -> list[str]:
    """What a service's certificate serves; nothing of a client's."""
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def name_of(cert: x509.Certificate) -> str:
    """Whose it is."""
    return str(cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def is_of(cert: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` has signed it."""
    try:
        cert.verify_directly_issued_by(authority)
    except Exception:  # noqa: BLE001 - the library raises several kinds for one answer
        return False
    return True


def fingerprint(cert: x509.Certificate) -> str:
    """A short name of a certificate that no other has."""
    return cert.fingerprint(_SHA256).hex()[:16]


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _EARLY)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        return x509.DNSName(text)
    except ValueError as error:
        raise InvalidArgument(
            "host", f"{text!r} is no name", "give an ASCII name or an address"
        ) from error


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
