"""The reasons why a source did not open or was lost, in one line each, the same for every decoder.

A reason is `NAME: what happened; what to do`, where NAME is the source without secrets (`name` below). The
camera shows it as `lastError` and logs it.
"""

import socket
import ssl
from collections.abc import Sequence
from enum import StrEnum
from http import HTTPStatus
from urllib.parse import SplitResult, urlsplit

from visionedge.camera.sources import rtsp
from visionedge.camera.sources.network import Challenge, format_host_port, speaks_plaintext, speaks_tls
from visionedge.errors import SourceError
from visionedge.runtime.redaction import mask_address, redact

_PROBE_TIMEOUT_S = 1.0

_RTSP_STATUS = {
    451: "Parameter Not Understood",
    453: "Not Enough Bandwidth",
    454: "Session Not Found",
    455: "Method Not Valid in This State",
    457: "Invalid Range",
    459: "Aggregate Operation Not Allowed",
    460: "Only Aggregate Operation Allowed",
    461: "Unsupported Transport",
    462: "Destination Unreachable",
    551: "Option Not Supported",
}


class SourceFault(StrEnum):
    """The reasons that need no inquiry: what happened, and what to do."""

    # opening
    OPEN_TIMED_OUT = "no picture within {limit_s:g} s; check address and network"
    CLOSED_WITHOUT_ANSWER = (
        "{server} closed the connection without an answer; check port and protocol, or restart the camera"
    )
    NOT_FOUND = "not found on the server (404); check the path"
    EMPTY_BODY = "empty answer; check the path"
    NO_VIDEO = "not a readable video or picture; check that it plays elsewhere"
    NOT_A_PICTURE = (
        "the answer is text ({content_type}), not a picture or video (a login page?); check the path"
    )
    CONTAINER_NOT_ALLOWED = (
        "the container {container} is not allowed; add it to the camera's extraContainers, or convert it"
    )
    CODEC_NOT_ALLOWED = (
        "the codec {codec} is not allowed; add it to the camera's extraCodecs, or use H.264 or H.265"
    )
    UNREADABLE_CERTIFICATES = "the certificates in {file} cannot be read; check tls.caFile"
    # redirects and playlists
    REDIRECT_WITHOUT_ADDRESS = "redirects to an invalid address; check the path"
    REDIRECT_LOOP = "redirect loop; check the path"
    REDIRECT_TO_OTHER_HOST = "points to another host, {host}; use its address, or set followRedirects: any"
    REDIRECT_TO_LOCAL_HOST = "points to {host}, a link-local or loopback address, which is never followed"
    REDIRECT_TO_OTHER_SCHEME = "points to an address of kind '{scheme}:', which is not followed"
    # pictures
    NO_JPEG = "no JPEG picture in the stream; check the path, or set the camera's stream to MJPEG"
    DAMAGED_PICTURE = "damaged picture; restart the camera"
    TOO_MANY_PIXELS = (
        "{width} x {height} pixels, more than the limit of {megapixels:g} megapixels; use a smaller stream"
    )
    TOO_MANY_BYTES = "a picture of more than {mebibytes} MiB; reduce its size"
    # reading
    NO_PICTURE_RECEIVED = "no picture for {limit_s:g} s"
    CONNECTION_CLOSED = "the camera closed the connection"
    READ_FAILED = "reading failed: {error}"
    ENDED_EARLY = "ended early, after {count} pictures"
    UNDECODABLE_STREAM = "data without a decodable picture for {limit_s:g} s; restart the camera"
    DECODING_TOO_SLOW = (
        "{late_s:.0f} s behind, decoding is slower than the camera; use a smaller stream, or install the"
        " extra 'av', which can skip pictures"
    )

    def describe(self, name: str, **values: str | float) -> str:
        """Return the line for a source; secrets in the values of the placeholders are masked."""
        shown = {key: redact(value) if isinstance(value, str) else value for key, value in values.items()}
        return f"{name}: {self.value.format(**shown)}"

    def error(self, name: str, **values: str | float) -> SourceError:
        """Return the error with that line."""
        return SourceError(self.describe(name, **values))


def diagnose_rtsp_open(
    target: str,
    waited_s: float,
    limit_s: float,
    transport: str = "tcp",
    certificates: str | None = None,
    *,
    name: str | None = None,
    describe_reply: rtsp.RtspResult | None = None,
) -> str:
    """Return why an RTSP address did not open. A decoder does not report the reason, so the server is asked.

    Args:
        target: the URI with its secrets.
        waited_s: how long opening took.
        limit_s: the open limit.
        transport: `SourceLimits.transport`.
        certificates: the file of trusted certificates; None: they are not checked.
        name: the camera's address to show, if it redirected to `target`; None: that of `target`.
        describe_reply: the server's earlier answer to DESCRIBE. After a refusal the server is not asked
            again, because some cameras lock a user out after a few failed logins.
    """
    name, parts = name or mask_address(target), urlsplit(target)
    try:
        if describe_reply is not None and describe_reply.status >= HTTPStatus.BAD_REQUEST:
            refusal = describe_reply
        else:
            refusal = rtsp.probe_rtsp(target, min(_PROBE_TIMEOUT_S, limit_s), transport, certificates)
    except (OSError, ValueError, rtsp.NoRtspReplyError) as error:
        return diagnose_rtsp_error(name, parts, error, limit_s)
    if refusal.status == 200 and waited_s >= limit_s * 0.95:
        return SourceFault.OPEN_TIMED_OUT.describe(name, limit_s=limit_s)
    return _describe_refusal(name, parts, refusal, transport)


def diagnose_rtsp_error(name: str, parts: SplitResult, error: Exception, limit_s: float) -> str:
    """Return why a request to an RTSP server failed: no connection, no answer, or another protocol."""
    if not isinstance(error, rtsp.NoRtspReplyError):
        return diagnose_connection_error(name, parts, error, limit_s)
    if error.reply:
        return not_rtsp(name, parts, error.reply, min(_PROBE_TIMEOUT_S, limit_s))
    return diagnose_connection_error(name, parts, ConnectionResetError(), limit_s)


def diagnose_connection_error(name: str, parts: SplitResult, error: Exception, limit_s: float) -> str:
    """Return why a connection to a server failed, or was closed before the answer."""
    server, ask_s = format_host_port(parts), min(_PROBE_TIMEOUT_S, limit_s)
    if isinstance(error, ConnectionRefusedError):
        return f"{name}: connection refused by {server} (camera off, or another port?)"
    if isinstance(error, socket.gaierror):
        return f"{name}: unknown host name {parts.hostname}; check the name, or use the IP address"
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"the certificate of {server} is not trusted ({error.verify_message.rstrip('.')})"
        return f"{name}: {reason}; set tls.caFile to the camera's certificate or that of its authority"
    return _tls_mismatch(name, parts, ask_s) or _describe_connection_error(name, server, error, limit_s)


def _tls_mismatch(name: str, parts: SplitResult, ask_s: float) -> str | None:
    """Return the reason if the server speaks TLS and the address does not, or the other way round."""
    server, scheme = format_host_port(parts), parts.scheme.lower()
    if scheme in ("rtsps", "https"):
        if speaks_plaintext(parts, ask_s):
            return f"{name}: {server} does not speak TLS; use {scheme[:-1]}://, or the port for TLS"
    elif speaks_tls(parts, ask_s):
        return f"{name}: {server} speaks TLS; use {scheme}s://"
    return None


def _describe_connection_error(name: str, server: str, error: Exception, limit_s: float) -> str:
    match error:
        case TimeoutError():
            return SourceFault.OPEN_TIMED_OUT.describe(name, limit_s=limit_s)
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError() | ConnectionResetError() | BrokenPipeError():
            return SourceFault.CLOSED_WITHOUT_ANSWER.describe(name, server=server)
        case ssl.SSLError():
            return f"{name}: TLS connection to {server} failed ({error.reason or 'handshake failed'})"
        case OSError():
            return f"{name}: {server} cannot be reached: {redact(error.strerror or str(error))}"
        case _:
            return SourceFault.CLOSED_WITHOUT_ANSWER.describe(name, server=server)


def _describe_refusal(name: str, parts: SplitResult, refusal: rtsp.RtspResult, transport: str) -> str:
    status = refusal.status
    if status == HTTPStatus.UNAUTHORIZED:
        return login_refused(name, parts, refusal.challenges)
    if status == HTTPStatus.NOT_FOUND:
        return SourceFault.NOT_FOUND.describe(name)
    if status < HTTPStatus.MULTIPLE_CHOICES:
        return _describe_undecodable(name, refusal)
    return f"{name}: {_status_remedy(refusal, 'tcp' if transport == 'udp' else 'udp')}"


def _status_remedy(refusal: rtsp.RtspResult, other_transport: str) -> str:
    match refusal.status:
        case 461:
            return f"the camera refuses this transport (461); set transport: auto or {other_transport}"
        case 453:
            return f"too many viewers (453 to {refusal.step}); close some, or raise the camera's limit"
        case status if status < HTTPStatus.BAD_REQUEST:
            return f"redirects ({status}) to an address that does not open; use that address itself"
        case status:
            return f"the camera refuses {refusal.step} ({status_text(status)})"


def _describe_undecodable(name: str, refusal: rtsp.RtspResult) -> str:
    """Our own requests succeed, but the decoder could not open the stream."""
    if refusal.login_accepted and (asked := _unsupported_digests(refusal.challenges)):
        return (
            f"{name}: the login is right, but the camera asks for {asked} (digest), and the decoder supports "
            f"only MD5; set the algorithm of the camera's RTSP login to MD5"
        )
    if not refusal.media:
        return f"{name}: the camera describes no video; check the path"
    return undecodable_media(name, "")


def _unsupported_digests(challenges: Sequence[Challenge]) -> str | None:
    """Return the digest algorithms that the server asks for, if FFmpeg does not support them all."""
    asked = dict.fromkeys(c.algorithm for c in challenges if c.scheme == "digest")
    return " and ".join(asked) if set(asked) - {"MD5"} else None


def login_refused(name: str, parts: SplitResult, challenges: Sequence[Challenge]) -> str:
    """401: no login was given, or a wrong one."""
    if parts.username is None:
        # Not written as an address: the text before an '@' of an address is masked.
        return f"{name}: login required (401); write USER:PASSWORD@ before {parts.hostname} in the address"
    kinds = {c.scheme for c in challenges}
    if kinds and not kinds & {"basic", "digest"}:
        asked = redact(", ".join(sorted(kinds))[:60])
        return f"{name}: unsupported kind of login ({asked}); set the camera's login to digest"
    return f"{name}: login refused (401); check user name and password"


def http_refused(name: str, parts: SplitResult, status: int, challenges: Sequence[Challenge]) -> str:
    """The server answered with a status of 300 or above."""
    if status == HTTPStatus.UNAUTHORIZED:
        return login_refused(name, parts, challenges)
    if status == HTTPStatus.NOT_FOUND:
        return SourceFault.NOT_FOUND.describe(name)
    return f"{name}: the server refuses the request ({status_text(status)})"


def status_text(status: int) -> str:
    """Return the standard text of a status; the server's own text is not trusted."""
    if status in _RTSP_STATUS:
        return f"{status} {_RTSP_STATUS[status]}"
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def not_rtsp(name: str, parts: SplitResult, reply: bytes, ask_s: float) -> str:
    """Another protocol answers at this port."""
    server = format_host_port(parts)
    if reply.startswith(b"HTTP/"):
        return f"{name}: {server} speaks HTTP, not RTSP; use http://, or the port for RTSP"
    if reply[:2] == b"\x15\x03" or speaks_tls(parts, ask_s):
        return f"{name}: {server} speaks TLS; use rtsps://"
    return f"{name}: {server} does not speak RTSP; check the port"


def not_http(name: str, parts: SplitResult, reply: bytes) -> str:
    """Another protocol answers at this port."""
    server = format_host_port(parts)
    if reply.startswith(b"RTSP/"):
        return f"{name}: {server} speaks RTSP, not HTTP; use rtsp://"
    if reply[:2] == b"\x15\x03":
        return f"{name}: {server} speaks TLS; use https://"
    return f"{name}: {server} does not speak HTTP; check the port"


def undecodable_media(name: str, error: str) -> str:
    """The decoder cannot read the answer, which is no text; `error` is the decoder's message, if any."""
    detail = f" ({redact(error)})" if error else ""
    return f"{name}: the answer cannot be decoded as video{detail}; check the path"
