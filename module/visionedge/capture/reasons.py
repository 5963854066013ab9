"""Why a source did not open, or was lost: one line each, the same whoever decodes.

Why a network source did not open the decoder does not say, so the server is asked once more."""

import base64
import socket
import ssl
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import SplitResult, unquote, urlsplit

from visionedge.uris import masked_address, redact

_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}

_ASK_S = 1.0


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    challenge: str

    @property
    def wants_basic(self) -> bool:
        """Whether the server asks for a login that is sent as it is. Nothing else makes us send it."""
        return self.status == HTTPStatus.UNAUTHORIZED and self.challenge == "basic"


def why_not_open(target: str, waited_s: float, limit_s: float, certificates: str | None = None) -> str:
    """One line for people, without secrets, about an RTSP or HTTP address that a decoder could not open.

    Args:
        target: the URI with its secrets.
        waited_s: how long opening took.
        limit_s: the open limit; where it was reached, nothing is asked.
        certificates: the file that a TLS server's certificate has to come from; None: any will do.
    """
    name = masked_address(target)
    parts = urlsplit(target)
    if waited_s >= limit_s * 0.95:
        return f"{name} gave no picture within {limit_s:g} s; check address and network"
    where = f"{parts.hostname}:{parts.port or _PORTS[parts.scheme.lower()]}"
    try:
        answer = _ask(parts, _ASK_S, certificates)
        if parts.username is not None and answer is not None and answer.wants_basic:
            answer = _ask(parts, _ASK_S, certificates, login=True)
    except ConnectionRefusedError:
        return f"{name}: {where} refuses connections; is the camera on, and is this its port?"
    except socket.gaierror:
        return f"{name}: the host name {parts.hostname} is not known; check it, or use the address"
    except TimeoutError:
        return f"{name}: {where} does not answer; check address and network"
    except (OSError, ValueError) as error:
        return _fault(name, where, error)
    return _in_words(name, parts, answer)


def _fault(name: str, where: str, error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"the certificate of {where} is not trusted ({error.verify_message.rstrip('.')})"
        return f"{name}: {reason}; let tls.caFile name the camera's certificate or its authority's"
    return f"{name} cannot be opened: {redact(str(error))}"


def _in_words(name: str, parts: SplitResult, answer: _Answer | None) -> str:
    if answer is None or answer.status < 400:
        return f"{name} answers, but with nothing that can be decoded as video; check the path"
    if answer.status == HTTPStatus.UNAUTHORIZED:
        if parts.username is None:
            return f"{name} asks for a login (401); write {parts.scheme}://USER:PASSWORD@{parts.hostname}/…"
        if answer.challenge == "basic":
            return f"{name} does not accept the user name or password (401)"
        # Without computing the digest nobody can tell a wrong password from a wrong path.
        return f"{name} did not open with the login given (401); check user name, password and path"
    if answer.status == HTTPStatus.NOT_FOUND:
        return f"{name} is not found on the server (404); check the path"
    return f"{name} is refused by the server ({_status_words(answer.status)})"


def _status_words(status: int) -> str:
    # Our own words for the number: the server's could be anything.
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _ask(
    parts: SplitResult, timeout_s: float, certificates: str | None, *, login: bool = False
) -> _Answer | None:
    """The status the server gives for this address; None where it speaks another protocol.

    `login` sends user name and password: over TLS where the address says so, as the decoder does.
    """
    scheme = parts.scheme.lower()
    with socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), timeout_s) as plain:
        if scheme in ("rtsp", "http"):
            return _exchange(plain, _request(parts, login=login))
        with _context(certificates).wrap_socket(plain, server_hostname=parts.hostname) as secure:
            return _exchange(secure, _request(parts, login=login))


def _context(certificates: str | None) -> ssl.SSLContext:
    """What is asked of a certificate: the same as the decoder asks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificates is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(certificates)
    return context


def _exchange(connection: socket.socket, request: bytes) -> _Answer | None:
    connection.sendall(request)
    with connection.makefile("rb") as reply:
        first = reply.readline(1024).split()
        if len(first) < 2 or not first[1].isdigit():
            return None
        challenge = ""
        for _ in range(64):
            line = reply.readline(4096).decode("latin-1").strip()
            if not line:
                break
            field, _, value = line.partition(":")
            # A server that offers a digest as well is never sent the password itself.
            if field.strip().lower() == "www-authenticate" and challenge != "digest":
                challenge = value.split()[0].lower() if value.split() else ""
        return _Answer(int(first[1]), challenge)


def _request(parts: SplitResult, *, login: bool) -> bytes:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme.lower().startswith("rtsp"):
        lines = [f"DESCRIBE {parts.scheme}://{host}{path} RTSP/1.0", "CSeq: 1", "Accept: application/sdp"]
    else:
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    if login:
        pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        lines.append(f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a line break in the URI")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


# All below: `name` is the source as it may be shown, without secrets.


def no_video(name: str) -> str:
    """It opens, or not even that, and there is nothing to see."""
    return f"{name} is no video or picture that can be read; check that it plays elsewhere"


def too_large(name: str, width: int, height: int, max_pixels: int) -> str:
    """Its pictures would take too much memory."""
    limit = f"more than {max_pixels / 1e6:g} megapixels"
    return f"{name} is {width} x {height} pixels, {limit}; use a smaller stream"


def silent(name: str, limit_s: float) -> str:
    """Nothing came any more."""
    return f"{name} gave no picture for {limit_s:g} s"


def closed(name: str) -> str:
    """The other end hung up."""
    return f"{name} closed the connection"


def broke_off(name: str, count: int) -> str:
    """A file behind a network that ended before its end."""
    return f"{name} broke off after {count} pictures"


def only_rubbish(name: str, limit_s: float) -> str:
    """Packets come, but nothing can be made of them."""
    return f"{name} sends, but nothing that gives a picture for {limit_s:g} s; restart the camera"


def too_slow(name: str, late_s: float) -> str:
    """This machine decodes more slowly than the camera sends."""
    return (
        f"{name} is {late_s:.0f} s behind: decoding it takes longer than it plays; "
        f"use a smaller stream, or install the extra 'av', which can leave pictures out"
    )
