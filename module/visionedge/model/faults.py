"""What goes wrong on the way to a server, in one line each, for people who cannot see its wire."""

import contextlib
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp

from visionedge.errors import FetchError
from visionedge.runtime.redaction import redact

_OWN_AUTHORITY = "for an authority of your own let SSL_CERT_FILE name its certificate"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one try may wait: for a connection with its TLS, for the next bytes, for everything."""

    connect_s: float = 15.0
    silence_s: float = 30.0
    all_s: float = 1800.0


@contextlib.contextmanager
def told(patience: Patience) -> Iterator[None]:
    """Errors of the network become one line.

    Raises:
        FetchError: in place of whatever the client raises.
    """
    try:
        yield
    except FetchError:
        raise
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchError(" ".join(redact(_words(error, patience)).split())) from None


def _words(error: Exception, patience: Patience) -> str:
    words = ""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            words = f"its certificate is not trusted ({_certificate(error)}); {_OWN_AUTHORITY}"
        case aiohttp.ClientConnectorError():
            words = f"{_where(error)}: {_system(error.os_error)}"
        case aiohttp.ClientHttpProxyError():
            words = f"the proxy answers {error.status}"
        case TimeoutError():
            words = _late(error, patience)
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError():
            words = "the connection broke before all had arrived"
        case aiohttp.ClientError():
            words = f"the server's answer cannot be read: {redact(str(error))[:200] or type(error).__name__}"
        case _:
            words = redact(str(error))[:200] or type(error).__name__
    return words


def _where(error: aiohttp.ClientConnectorError) -> str:
    match error:
        case aiohttp.ClientSSLError():
            return "no TLS with the server"
        case aiohttp.ClientProxyConnectionError():
            return "the proxy cannot be reached"
        case aiohttp.ClientConnectorDNSError():
            return "its host cannot be found"
        case _:
            return "the server cannot be reached"


def _late(error: TimeoutError, patience: Patience) -> str:
    match error:
        case aiohttp.ConnectionTimeoutError():
            return f"no connection within {patience.connect_s:g} s"
        case aiohttp.ServerTimeoutError():
            return f"nothing came for {patience.silence_s:g} s"
        case _:
            return f"not all had arrived within {patience.all_s:g} s"


def _certificate(error: aiohttp.ClientConnectorCertificateError) -> str:
    cause = error.certificate_error
    return cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else str(cause)


def _system(error: OSError) -> str:
    """The system's word for it; OpenSSL's are written like constants."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.errno < 0 else os.strerror(error.errno)
