"""Connections to cameras, without a proxy; certificates are checked where that is asked for."""

import socket
import ssl
from urllib.parse import SplitResult, urlsplit

PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


def where(parts: SplitResult) -> str:
    """Host and port of an address, for people."""
    return f"{parts.hostname}:{port_of(parts)}"


def without_login(url: str) -> str:
    """The address without user name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def port_of(parts: SplitResult) -> int:
    """The port of an address, or that of its scheme."""
    return parts.port or PORTS[parts.scheme.lower()]


def connect(
    parts: SplitResult, timeout_s: float, *, tls: bool, certificates: str | None = None
) -> socket.socket:
    """A connection to the server of an address.

    With `certificates` a TLS server has to show one of those in this file, or one signed by them.

    Raises:
        OSError: there is none, or (ssl.SSLCertVerificationError) the server cannot be trusted.
    """
    plain = socket.create_connection((parts.hostname, port_of(parts)), timeout_s)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _tls(certificates).wrap_socket(plain, server_hostname=parts.hostname) if tls else plain
    except BaseException:
        plain.close()
        raise


def speaks_tls(parts: SplitResult, timeout_s: float) -> bool:
    """Whether the server of an address begins a connection with TLS."""
    try:
        connect(parts, timeout_s, tls=True).close()
    except (OSError, ValueError):
        return False
    return True


def speaks_plainly(parts: SplitResult, timeout_s: float) -> bool:
    """Whether the server of an address answers a question without TLS."""
    rtsp = parts.scheme.lower().startswith("rtsp")
    question = b"OPTIONS * RTSP/1.0\r\nCSeq: 1\r\n\r\n" if rtsp else b"HEAD / HTTP/1.0\r\n\r\n"
    try:
        with connect(parts, timeout_s, tls=False) as connection:
            connection.sendall(question)
            return connection.recv(5).startswith((b"RTSP", b"HTTP"))
    except (OSError, ValueError):
        return False


def _tls(certificates: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificates is not None:
        context.load_verify_locations(certificates)
        return context
    # Cameras sign their own certificates, and old ones know nothing newer than TLS 1.0.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    return context
