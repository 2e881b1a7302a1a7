"""Make the certificates of a federation: a CA, the server's certificate, and optional keys for nodes.

    python deploy/certificates.py certs --host fl.example.org --host localhost --host 127.0.0.1 [--nodes 3] [--days 365]

The SuperLink's process that runs the server's side of an app connects to 127.0.0.1, so the certificate must name this
address. ``ca.key`` signs server certificates: keep it off the server and off the nodes. Copy ``ca.crt`` to every node
and to every user who starts runs. Copy ``server.pem`` and ``server.key`` to the server.

It is best to make a node's key on the node, so that it never leaves the node:
``ssh-keygen -t ecdsa -b 384 -N "" -f node.key``. Only ``node.key.pub`` goes to the server, which registers it. With
``--nodes`` the script makes keys here, for a trial.

Existing files are kept. To make a new server certificate of the same CA for other hosts, remove ``server.pem`` and
``server.key`` and call the script again.
"""

import argparse
import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS = 3650
_BACKDATED = datetime.timedelta(hours=1)  # a node's clock may be a little behind


def make(folder: Path, hosts: Sequence[str], *, nodes: int = 0, days: int = 365) -> list[Path]:
    """Write the files that are not there yet.

    Args:
        folder: Folder for the files. It is made if it does not exist, and only its owner can read it.
        hosts: Names and addresses under which nodes reach the server. The certificate names all of them.
        nodes: Number of key pairs ``node-0.key``, ``node-0.key.pub`` and so on.
        days: Days until the server's certificate expires.

    Returns:
        The files that were written.

    Raises:
        ValueError: If there is no host, or a host is neither a name nor an address.
    """
    names = [_host(host) for host in hosts]
    if not names:
        raise ValueError("give at least one --host: the name or address that nodes connect to")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    written: list[Path] = []
    if not (folder / "ca.key").exists():
        key = ec.generate_private_key(ec.SECP384R1())
        written += [_write_key(folder / "ca.key", key), _write_ca(folder / "ca.crt", key)]
    if not (folder / "server.pem").exists():
        written += _write_server(folder, names, days)
    for number in range(nodes):
        if not (file := folder / f"node-{number}.key").exists():
            written += _write_node(file)
    return written


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not host or not all(c.isascii() and (c.isalnum() or c in "-.") for c in host):
            raise ValueError(f"--host {host!r}: give a host name or an IP address, without a port") from None
        return x509.DNSName(host)


def _builder(subject: str, issuer: str, public_key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_ca(file: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    name = "fl-dualpriv CA"
    certificate = (
        _builder(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return file


def _write_server(folder: Path, names: Sequence[x509.GeneralName], days: int) -> list[Path]:
    ca_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder("fl-dualpriv server", "fl-dualpriv CA", key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), critical=False)  # type: ignore[arg-type]
        .sign(ca_key, hashes.SHA384())
    )
    pem = folder / "server.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return [_write_key(folder / "server.key", key), pem]


def _write_node(file: Path) -> list[Path]:
    """Write an SSH key on the curve that Flower requires."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = file.with_name(file.name + ".pub")
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"
    )
    return [_write_key(file, key, serialization.PrivateFormat.OpenSSH), public]


def _write_key(
    file: Path,
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> Path:
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(
        os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
    ) as stream:  # never readable to others
        stream.write(content)
    return file


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the files")
    parser.add_argument("--host", action="append", default=[], help="name or address of the server; may be repeated")
    parser.add_argument("--nodes", type=int, default=0, help="number of nodes to make keys for, for a trial")
    parser.add_argument("--days", type=int, default=365, help="days until the server's certificate expires")
    options = parser.parse_args()
    try:
        written = make(options.folder, options.host, nodes=options.nodes, days=options.days)
    except ValueError as error:
        parser.error(str(error))
    for file in written:
        print(file)


if __name__ == "__main__":
    main()
