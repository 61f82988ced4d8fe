"""TLS in front of a plain server, which the packaged one is: certificates of an authority of our own, and a terminator."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@contextmanager
def tls_before(port: int, folder: Path) -> Iterator[int]:
    """A port that asks for client certificates; ``authority``, ``server``, ``client`` and ``stranger`` (.crt, .key) lie in ``folder``."""
    authority = certificate(folder, "authority")
    for name in ("server", "client"):
        certificate(folder, name, authority)
    certificate(folder, "stranger")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "authority.crt")
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=terminate_tls, args=(listener, context, port), daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def certificate(folder, name, issuer=None):
    """An EC key and a certificate for 127.0.0.1, signed by ``issuer`` (key, certificate) or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed_by, signing = (issuer[1].subject, issuer[0]) if issuer else (subject, key)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[0].public_key())
        built = built.add_extension(authority, critical=False)
    else:
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        built = built.add_extension(usage, critical=True)
    signed = built.sign(signing, hashes.SHA256())
    plain = serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return key, signed


def relay(source, target):
    """Copy bytes until either end closes."""
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, target):
            end.close()


def terminate_tls(listener, context, port):
    """What stunnel does: TLS outside, a plain server inside."""
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        try:
            outside = context.wrap_socket(plain, server_side=True)
        except (ssl.SSLError, OSError):
            continue
        inside = socket.create_connection(("127.0.0.1", port))
        for pair in ((outside, inside), (inside, outside)):
            threading.Thread(target=relay, args=pair, daemon=True).start()
