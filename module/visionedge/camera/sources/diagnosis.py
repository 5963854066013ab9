"""Why a source did not open, or was lost: one line each, the same whoever decodes.

All below: `name` is the source as it may be shown, without secrets.
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
    """One line about an RTSP address that a decoder could not open: it does not say why, so we ask ourselves.

    Args:
        target: the URI with its secrets.
        waited_s: how long opening took.
        limit_s: the open limit.
        transport: what was wanted of RTSP.
        certificates: the file that a TLS server's certificate has to come from; None: any will do.
        name: the camera as it is to be shown, where it redirected to `target`; None: as `target`.
        described: how the server answered DESCRIBE before; a refusal is not asked for again, because some
            cameras lock a user out after a few logins that fail.
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
    """One line about an RTSP server that could not be reached, hung up, or said what is not RTSP."""
    if not isinstance(error, rtsp.NoRtspReplyError):
        return diagnose_connection_error(name, parts, error, limit_s)
    if error.words:
        return not_rtsp(name, parts, error.words, min(_PROBE_TIMEOUT_S, limit_s))
    return diagnose_connection_error(name, parts, ConnectionResetError(), limit_s)


def diagnose_connection_error(name: str, parts: SplitResult, error: Exception, limit_s: float) -> str:
    """One line about a server that could not be reached, or hung up before it answered."""
    server, ask_s = format_host_port(parts), min(_PROBE_TIMEOUT_S, limit_s)
    if isinstance(error, ConnectionRefusedError):
        return f"{name}: {server} refuses connections; is the camera on, and is this its port?"
    if isinstance(error, socket.gaierror):
        return f"{name}: the host name {parts.hostname} is not known; check it, or use the address"
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"the certificate of {server} is not trusted ({error.verify_message.rstrip('.')})"
        return f"{name}: {reason}; let tls.caFile name the camera's certificate or its authority's"
    return _tls_mismatch(name, parts, ask_s) or _describe_connection_error(name, server, error, limit_s)


def _tls_mismatch(name: str, parts: SplitResult, ask_s: float) -> str | None:
    """The server speaks TLS and the address does not, or the other way round."""
    server, scheme = format_host_port(parts), parts.scheme.lower()
    if scheme in ("rtsps", "https"):
        if speaks_plaintext(parts, ask_s):
            return f"{name}: {server} does not speak TLS; write {scheme[:-1]}:// or the port for TLS"
    elif speaks_tls(parts, ask_s):
        return f"{name}: {server} speaks TLS; write {scheme}s://"
    return None


def _describe_connection_error(name: str, server: str, error: Exception, limit_s: float) -> str:
    match error:
        case TimeoutError():
            return open_timed_out(name, limit_s)
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError() | ConnectionResetError() | BrokenPipeError():
            return closed_without_answer(name, server)
        case ssl.SSLError():
            return f"{name}: no TLS connection to {server} ({error.reason or 'handshake failed'})"
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
    return f"{name}{_status_remedy(refusal, 'tcp' if transport == 'udp' else 'udp')}"


def _status_remedy(refusal: rtsp.RtspResult, other_transport: str) -> str:
    match refusal.status:
        case 461:
            return f": the camera refuses this transport (461); set transport: auto or {other_transport}"
        case 453:
            return (
                f": the camera has too many viewers (453 to {refusal.step}); close some, or raise its limit"
            )
        case status if status < HTTPStatus.BAD_REQUEST:
            return f" redirects ({status}) to an address that does not open; use that address itself"
        case status:
            return f": the camera refuses {refusal.step} ({status_text(status)})"


def _describe_undecodable(name: str, refusal: rtsp.RtspResult) -> str:
    """We get everything that we ask for, and the decoder did not."""
    if refusal.login_accepted and (asked := _unsupported_digests(refusal.challenges)):
        return (
            f"{name}: the login is right, but the camera asks for {asked} (digest), and RTSP can only be "
            f"opened with MD5; set the algorithm of the camera's RTSP login to MD5"
        )
    if not refusal.media:
        return f"{name} answers, but describes no video; check the path"
    return f"{name} answers, but with nothing that can be decoded as video; check the path"


def _unsupported_digests(challenges: Sequence[Challenge]) -> str | None:
    """The algorithms of the digests that are asked for, where FFmpeg does not know them all."""
    asked = dict.fromkeys(c.algorithm for c in challenges if c.scheme == "digest")
    return " and ".join(asked) if set(asked) - {"MD5"} else None


def login_refused(name: str, parts: SplitResult, challenges: Sequence[Challenge]) -> str:
    """The server wants a login (401), or another one."""
    if parts.username is None:
        # Not as an address: what stands before an '@' there is masked wherever it is shown.
        return f"{name} asks for a login (401); write USER:PASSWORD@ before {parts.hostname} in the address"
    kinds = {c.scheme for c in challenges}
    if kinds and not kinds & {"basic", "digest"}:
        asked = redact(", ".join(sorted(kinds))[:60])
        return f"{name} asks for a login of another kind ({asked}); set the camera's login to digest"
    return f"{name} does not accept the user name or password (401)"


def http_refused(name: str, parts: SplitResult, status: int, challenges: Sequence[Challenge]) -> str:
    """The server answered with a status of 400 or above."""
    if status == HTTPStatus.UNAUTHORIZED:
        return login_refused(name, parts, challenges)
    if status == HTTPStatus.NOT_FOUND:
        return not_found(name)
    return f"{name} is refused by the server ({status_text(status)})"


def status_text(status: int) -> str:
    """Our own words for the number: the server's could be anything."""
    if status in _RTSP_STATUS:
        return f"{status} {_RTSP_STATUS[status]}"
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def not_found(name: str) -> str:
    """The path is wrong."""
    return f"{name} is not found on the server (404); check the path"


def open_timed_out(name: str, limit_s: float) -> str:
    """It answers, but no picture came while it was opened."""
    return f"{name} gave no picture within {limit_s:g} s; check address and network"


def closed_without_answer(name: str, server: str) -> str:
    """It ended the connection before it said anything."""
    return f"{name}: {server} hung up without an answer; check port and protocol, or restart the camera"


def not_rtsp(name: str, parts: SplitResult, words: bytes, ask_s: float) -> str:
    """Another protocol answers at this port."""
    server = format_host_port(parts)
    if words.startswith(b"HTTP/"):
        return f"{name}: {server} speaks HTTP, not RTSP; write http:// or the port for RTSP"
    if words[:2] == b"\x15\x03" or speaks_tls(parts, ask_s):
        return f"{name}: {server} speaks TLS; write rtsps://"
    return f"{name}: {server} does not speak RTSP; check the port"


def not_http(name: str, parts: SplitResult, words: bytes) -> str:
    """Another protocol answers at this port."""
    server = format_host_port(parts)
    if words.startswith(b"RTSP/"):
        return f"{name}: {server} speaks RTSP, not HTTP; write rtsp://"
    if words[:2] == b"\x15\x03":
        return f"{name}: {server} speaks TLS; write https://"
    return f"{name}: {server} does not speak HTTP; check the port"


def redirect_without_address(name: str) -> str:
    """The camera names something that is no address."""
    return f"{name} redirects to something that is no address; check the path"


def redirect_loop(name: str) -> str:
    """Each answer names another address, and none gives a picture."""
    return f"{name} redirects in a circle; check the path"


def redirect_to_other_host(name: str, host: str) -> str:
    """The camera names another host, which is not asked without leave."""
    return f"{name} points to another host, {redact(host)}; use its address, or set followRedirects: any"


def redirect_to_local_host(name: str, host: str) -> str:
    """The camera names a host that only this machine can reach."""
    return f"{name} points to {redact(host)}, a link-local or loopback address, which is never followed"


def redirect_to_other_scheme(name: str, scheme: str) -> str:
    """The camera names an address of another protocol than its own."""
    return f"{name} points to an address of kind '{redact(scheme[:20])}:', which is not followed"


def not_a_picture(name: str, content_type: str) -> str:
    """It answers with something for people or programs, and not with pictures."""
    kind = redact(content_type[:60]) or "no content type"
    return (
        f"{name} answers with no picture or video but with text ({kind}); is it a login page? check the path"
    )


def empty_body(name: str) -> str:
    """It answers with nothing at all."""
    return f"{name} answers with an empty body; check the path"


def undecodable_media(name: str, words: str) -> str:
    """It is neither pictures nor a page, and FFmpeg cannot read it."""
    why = f" ({redact(words)})" if words else ""
    return f"{name} answers, but with nothing that can be decoded as video{why}; check the path"


def no_jpeg(name: str) -> str:
    """A stream that calls itself MJPEG and holds none."""
    return f"{name} sends no JPEG picture; check the path, or set the camera's stream to MJPEG"


def damaged_picture(name: str) -> str:
    """What it gives calls itself a picture, and is cut off or damaged."""
    return f"{name} gives a damaged picture; restart the camera"


def unreadable_certificates(name: str, file: str) -> str:
    """The file that says which certificates are trusted is not there."""
    return f"{name}: the certificates in {file} cannot be read; check tls.caFile"


def no_video(name: str) -> str:
    """It opens, or not even that, and there is nothing to see."""
    return f"{name} is no video or picture that can be read; check that it plays elsewhere"


def too_many_pixels(name: str, width: int, height: int, max_pixels: int) -> str:
    """Its pictures would take too much memory."""
    limit = f"more than {max_pixels / 1e6:g} megapixels"
    return f"{name} is {width} x {height} pixels, {limit}; use a smaller stream"


def too_many_bytes(name: str, max_bytes: int) -> str:
    """A picture longer than any that is read."""
    return f"{name} gives a picture of more than {max_bytes >> 20} MiB; make it smaller"


def no_picture_received(name: str, limit_s: float) -> str:
    """Nothing came any more."""
    return f"{name} gave no picture for {limit_s:g} s"


def connection_closed(name: str) -> str:
    """The other end hung up."""
    return f"{name} closed the connection"


def read_failed(name: str, words: str) -> str:
    """Reading failed, and not because the other end hung up."""
    return f"{name} cannot be read further: {redact(words)}"


def ended_early(name: str, count: int) -> str:
    """A file behind a network that ended before its end."""
    return f"{name} broke off after {count} pictures"


def undecodable_stream(name: str, limit_s: float) -> str:
    """Packets come, but nothing can be made of them."""
    return f"{name} sends, but nothing that gives a picture for {limit_s:g} s; restart the camera"


def decoding_too_slow(name: str, late_s: float) -> str:
    """This machine decodes more slowly than the camera sends."""
    return (
        f"{name} is {late_s:.0f} s behind: decoding it takes longer than it plays; "
        f"use a smaller stream, or install the extra 'av', which can leave pictures out"
    )
