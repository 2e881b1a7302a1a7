"""Contact the server before a node joins: reachability, certificate and clock. Also read the node's own key.

The standard library makes the connection and verifies the certificate, as Flower's client does. `cryptography`, which
Flower installs, reads a refused certificate, so that the message can say what is wrong with it.
"""

import base64
import contextlib
import datetime
import email.utils
import hashlib
import http.client
import os
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.node.tables import NodeServer

_SECONDS = 10.0
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Contact:
    """Result of a connection.

    Attributes:
        answered: True if a program answers at the address.
        problem: Reason why the connection cannot be used, in words; empty if it can be used.
        expires: Time at which the server's certificate expires; None without TLS.
        ahead: Seconds by which this clock is ahead of the server's, to a second; None if the server did not send its
            time. The value is not authenticated if the certificate was refused.
    """

    answered: bool
    problem: str = ""
    expires: datetime.datetime | None = None
    ahead: float | None = None


def contact(server: NodeServer, seconds: float = _SECONDS) -> Contact:
    """Connect as the SuperNode would, ask for ``/health`` and look at the answer."""
    host, port = server.host_and_port
    try:
        if server.insecure:
            ahead, _ = _ask(http.client.HTTPConnection(host, port, timeout=seconds))
            return Contact(answered=True, ahead=ahead)
        root = None if server.root_certificates is None else str(server.root_certificates)
        verified = http.client.HTTPSConnection(
            host, port, timeout=seconds, context=ssl.create_default_context(cafile=root)
        )
        ahead, der = _ask(verified)
    except ssl.SSLCertVerificationError as refusal:
        return _refused(host, port, seconds, refusal)
    except ssl.SSLError as error:
        problem = f"{host}:{port} answers without TLS, or with a version that is refused here ({error.reason})"
        return Contact(answered=True, problem=problem)
    except socket.gaierror:
        return Contact(answered=False, problem=f"the name {host} is not known here: check the address and the DNS")
    except (OSError, http.client.HTTPException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return Contact(answered=False, problem=f"{host}:{port} cannot be reached ({reason})")
    return Contact(answered=True, expires=_expiry(der), ahead=ahead)


def proxy_on_the_way(server: NodeServer) -> str:
    """Return the proxy variable that Flower's client would use to reach the server; empty if it connects directly."""
    host, _ = server.host_and_port
    if server.is_here or urllib.request.proxy_bypass(host):
        return ""
    proxies = urllib.request.getproxies()
    scheme = "http" if server.insecure else "https"
    return f"{scheme}_proxy" if proxies.get(scheme) else "all_proxy" if proxies.get("all") else ""


def _ask(connection: http.client.HTTPConnection) -> tuple[float | None, bytes]:
    """Return the seconds by which this clock is ahead of the answer's date, and the server's certificate."""
    with contextlib.closing(connection):
        connection.connect()
        der = connection.sock.getpeercert(True) if isinstance(connection.sock, ssl.SSLSocket) else None
        connection.request("GET", "/health")
        date = connection.getresponse().getheader("Date")
        now = datetime.datetime.now(datetime.UTC)
    try:
        server_time = email.utils.parsedate_to_datetime(date or "")
    except ValueError:
        return None, der or b""
    if server_time.tzinfo is None:  # "-0000": the time zone is unknown
        return None, der or b""
    # The header has whole seconds, so on average half a second is missing.
    return (now - server_time).total_seconds() - 0.5, der or b""


def _refused(host: str, port: int, seconds: float, refusal: ssl.SSLCertVerificationError) -> Contact:
    """Describe the problem of a certificate that the SuperNode will also refuse."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only to read it: no data of this node is sent
    ahead, der = None, b""
    with contextlib.suppress(OSError, http.client.HTTPException):
        ahead, der = _ask(http.client.HTTPSConnection(host, port, timeout=seconds, context=context))
    problem = refusal.verify_message
    if not der:
        return Contact(answered=True, problem=f"the server's certificate is refused: {problem}")
    certificate, now = x509.load_der_x509_certificate(der), datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc < now or certificate.not_valid_before_utc > now:
        span = f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
        problem = f"the server's certificate is valid from {span}, and this clock says {now:%Y-%m-%d %H:%M} UTC"
    elif "mismatch" in problem.lower():
        names = ", ".join(_names(certificate)) or "no name"
        problem = f"the server's certificate is for {names}, not for {host}: use one of these, or have a new one made"
    else:
        problem = f"the server's certificate is not signed by this CA ({problem}): is it the ca.crt of this server?"
    return Contact(answered=True, problem=problem, expires=certificate.not_valid_after_utc, ahead=ahead)


def _names(certificate: x509.Certificate) -> Iterator[str]:
    with contextlib.suppress(x509.ExtensionNotFound):
        subject_names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        yield from [str(name.value) for name in list(subject_names)[:_NAMED]]


def _expiry(der: bytes) -> datetime.datetime | None:
    return x509.load_der_x509_certificate(der).not_valid_after_utc if der else None


def root_validity(file: Path) -> tuple[datetime.datetime, datetime.datetime]:
    """Return the start and the end of the time in which all certificates in a PEM file are valid.

    Raises:
        ConfigError: If the file cannot be read or holds no certificate.
    """
    try:
        certificates = x509.load_pem_x509_certificates(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} holds no certificate: give the PEM file of the CA (ca.crt)") from error
    return max(one.not_valid_before_utc for one in certificates), min(one.not_valid_after_utc for one in certificates)


def key_fingerprint(file: Path) -> str:
    """Return the fingerprint of the node's public key, as ``ssh-keygen -l`` shows it.

    Raises:
        ConfigError: If the file is not a private key that Flower accepts, or other users may read it.
    """
    try:
        content, mode = file.read_bytes(), file.stat().st_mode
        key = serialization.load_ssh_private_key(content, password=None)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{file} is not an SSH private key without a password: make one with ssh-keygen -t ecdsa -b 384 "
            f'-N "" -f {file}'
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file} is not on a NIST curve: make one with ssh-keygen -t ecdsa -b 384")
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{file} may be read by others (mode {mode & 0o777:o}): chmod 600 {file}")
    return ssh_fingerprint(key.public_key())


def ssh_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of the key in SSH format, in base 64."""
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
