"""The reasons why a source did not open or was lost, in one line each, the same for every decoder.

A reason is `NAME: what happened; what to do`, where NAME is the source without secrets (`name` below). The
camera shows it as `lastError` and logs it.
"""

import socket
import ssl
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import SplitResult, urlsplit

from visionedge.camera.sources import rtsp
from visionedge.camera.sources.network import Challenge, format_host_port, speaks_plaintext, speaks_tls
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
        again,
            because some cameras lock a user out after a few failed logins.
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
        return open_timed_out(name, limit_s)
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
            return open_timed_out(name, limit_s)
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError() | ConnectionResetError() | BrokenPipeError():
            return closed_without_answer(name, server)
        case ssl.SSLError():
            return f"{name}: TLS connection to {server} failed ({error.reason or 'handshake failed'})"
        case OSError():
            return f"{name}: {server} cannot be reached: {redact(error.strerror or str(error))}"
        case _:
            return closed_without_answer(name, server)


def _describe_refusal(name: str, parts: SplitResult, refusal: rtsp.RtspResult, transport: str) -> str:
    status = refusal.status
    if status == HTTPStatus.UNAUTHORIZED:
        return login_refused(name, parts, refusal.challenges)
    if status == HTTPStatus.NOT_FOUND:
        return not_found(name)
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
        return not_found(name)
    return f"{name}: the server refuses the request ({status_text(status)})"


def status_text(status: int) -> str:
    """Return the standard text of a status; the server's own text is not trusted."""
    if status in _RTSP_STATUS:
        return f"{status} {_RTSP_STATUS[status]}"
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def not_found(name: str) -> str:
    """404."""
    return f"{name}: not found on the server (404); check the path"


def open_timed_out(name: str, limit_s: float) -> str:
    """No picture came while the source was opened."""
    return f"{name}: no picture within {limit_s:g} s; check address and network"


def closed_without_answer(name: str, server: str) -> str:
    """The server closed the connection before it answered."""
    remedy = "check port and protocol, or restart the camera"
    return f"{name}: {server} closed the connection without an answer; {remedy}"


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


def redirect_without_address(name: str) -> str:
    """The camera redirects to an invalid address."""
    return f"{name}: redirects to an invalid address; check the path"


def redirect_loop(name: str) -> str:
    """The camera redirects too often."""
    return f"{name}: redirect loop; check the path"


def redirect_to_other_host(name: str, host: str) -> str:
    """A redirect or playlist names another host, which the configuration does not allow."""
    return f"{name}: points to another host, {redact(host)}; use its address, or set followRedirects: any"


def redirect_to_local_host(name: str, host: str) -> str:
    """A redirect or playlist names a host that only this machine can reach."""
    return f"{name}: points to {redact(host)}, a link-local or loopback address, which is never followed"


def redirect_to_other_scheme(name: str, scheme: str) -> str:
    """A redirect or playlist names an address of another protocol."""
    return f"{name}: points to an address of kind '{redact(scheme[:20])}:', which is not followed"


def not_a_picture(name: str, content_type: str) -> str:
    """The answer is text, such as HTML or JSON."""
    kind = redact(content_type[:60]) or "no content type"
    return f"{name}: the answer is text ({kind}), not a picture or video (a login page?); check the path"


def empty_body(name: str) -> str:
    """The answer has no body."""
    return f"{name}: empty answer; check the path"


def undecodable_media(name: str, error: str) -> str:
    """The decoder cannot read the answer, which is no text; `error` is the decoder's message, if any."""
    detail = f" ({redact(error)})" if error else ""
    return f"{name}: the answer cannot be decoded as video{detail}; check the path"


def no_jpeg(name: str) -> str:
    """A stream of type MJPEG without JPEG pictures."""
    return f"{name}: no JPEG picture in the stream; check the path, or set the camera's stream to MJPEG"


def damaged_picture(name: str) -> str:
    """A picture is cut off or damaged."""
    return f"{name}: damaged picture; restart the camera"


def unreadable_certificates(name: str, file: str) -> str:
    """The file of trusted certificates cannot be read."""
    return f"{name}: the certificates in {file} cannot be read; check tls.caFile"


def no_video(name: str) -> str:
    """There is no video in it."""
    return f"{name}: not a readable video or picture; check that it plays elsewhere"


def too_many_pixels(name: str, width: int, height: int, max_pixels: int) -> str:
    """The pictures would take too much memory."""
    limit = f"more than the limit of {max_pixels / 1e6:g} megapixels"
    return f"{name}: {width} x {height} pixels, {limit}; use a smaller stream"


def too_many_bytes(name: str, max_bytes: int) -> str:
    """A picture has more bytes than are read."""
    return f"{name}: a picture of more than {max_bytes >> 20} MiB; reduce its size"


def no_picture_received(name: str, limit_s: float) -> str:
    """No data came."""
    return f"{name}: no picture for {limit_s:g} s"


def connection_closed(name: str) -> str:
    """The server closed the connection while it was read."""
    return f"{name}: the camera closed the connection"


def read_failed(name: str, error: str) -> str:
    """Reading failed, and the server did not close the connection."""
    return f"{name}: reading failed: {redact(error)}"


def ended_early(name: str, count: int) -> str:
    """A file at a network address ended before its end."""
    return f"{name}: ended early, after {count} pictures"


def undecodable_stream(name: str, limit_s: float) -> str:
    """Data comes, but no picture can be decoded."""
    return f"{name}: data without a decodable picture for {limit_s:g} s; restart the camera"


def decoding_too_slow(name: str, late_s: float) -> str:
    """This machine decodes more slowly than the camera sends."""
    return (
        f"{name}: {late_s:.0f} s behind, decoding is slower than the camera; "
        f"use a smaller stream, or install the extra 'av', which can skip pictures"
    )
