"""Connections to cameras (plain or TLS, never through a proxy) and logins for HTTP and RTSP (RFC 7616)."""

import base64
import hashlib
import re
import secrets
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


def format_host_port(parts: SplitResult) -> str:
    """Return host and port of an address, to show."""
    return f"{parts.hostname}:{port_of(parts)}"


def strip_login(url: str) -> str:
    """Return the address without user name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def port_of(parts: SplitResult) -> int:
    """Return the port of an address, or the default port of its scheme."""
    return parts.port or DEFAULT_PORTS[parts.scheme.lower()]


def connect(
    parts: SplitResult, timeout_s: float, *, tls: bool, certificates: str | None = None
) -> socket.socket:
    """Connect to the server of an address.

    With `certificates` (a file) a TLS server must present one of them, or one signed by them.

    Raises:
        OSError: no connection, or (ssl.SSLCertVerificationError) the server is not trusted.
    """
    plain = socket.create_connection((parts.hostname, port_of(parts)), timeout_s)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _tls_context(certificates).wrap_socket(plain, server_hostname=parts.hostname) if tls else plain
    except BaseException:
        plain.close()
        raise


def speaks_tls(parts: SplitResult, timeout_s: float) -> bool:
    """Whether the server of an address accepts TLS."""
    try:
        connect(parts, timeout_s, tls=True).close()
    except (OSError, ValueError):
        return False
    return True


def speaks_plaintext(parts: SplitResult, timeout_s: float) -> bool:
    """Whether the server of an address answers a request without TLS."""
    rtsp = parts.scheme.lower().startswith("rtsp")
    request = b"OPTIONS * RTSP/1.0\r\nCSeq: 1\r\n\r\n" if rtsp else b"HEAD / HTTP/1.0\r\n\r\n"
    try:
        with connect(parts, timeout_s, tls=False) as connection:
            connection.sendall(request)
            return connection.recv(5).startswith((b"RTSP", b"HTTP"))
    except (OSError, ValueError):
        return False


def _tls_context(certificates: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificates is not None:
        context.load_verify_locations(certificates)
        return context
    # Cameras sign their own certificates, and old ones support only TLS 1.0.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    return context


_HASHES = {"MD5": "md5", "SHA-256": "sha256", "SHA-512-256": "sha512_256"}
"""Digest algorithms and their names in hashlib, the weakest first."""

# One header may hold two challenges: a scheme begins a header or follows a comma, and has no '=' after it.
_SCHEME = re.compile(r"(?:^|,)\s*([A-Za-z][A-Za-z0-9-]*)(?=\s+[A-Za-z]|\s*(?:,|$))")
_PARAMETER = re.compile(r'([A-Za-z][\w-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))')


@dataclass(frozen=True, slots=True)
class Challenge:
    """A login that a server asks for; `scheme` and the names of `parameters` in lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        """The hash algorithm of a digest in upper case, without `-SESS`."""
        return self.parameters.get("algorithm", "MD5").upper().removesuffix("-SESS")


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Parse all `WWW-Authenticate` headers into challenges, in their order."""
    found = []
    for header in headers:
        # Quoted text may look like a scheme, so it is blanked for the search.
        starts = list(_SCHEME.finditer(re.sub(r'"(?:[^"\\]|\\.)*"', lambda m: "_" * len(m[0]), header)))
        for number, start in enumerate(starts):
            end = starts[number + 1].start() if number + 1 < len(starts) else len(header)
            rest = _PARAMETER.finditer(header[start.end() : end])
            found.append(Challenge(start[1].lower(), {m[1].lower(): m[2] or m[3] or "" for m in rest}))
    return found


class HttpLogin:
    """A user name and a password, and the challenge that they answer."""

    def __init__(self, user: str, password: str) -> None:
        self._user, self._password = user, password
        self._challenge: Challenge | None = None
        self._count = 0

    def __repr__(self) -> str:
        return f"<HttpLogin {self._challenge.scheme if self._challenge else 'unasked'}>"

    def accept(self, challenges: Iterable[Challenge], *, basic: bool) -> bool:
        """Choose the strongest supported challenge for `header`; False if none is supported.

        Args:
            challenges: the challenges of the server.
            basic: whether the password may be sent in clear.
        """
        answerable = [
            c
            for c in challenges
            if c.scheme == "digest" and c.algorithm in _HASHES and "nonce" in c.parameters
        ]
        answerable.sort(key=lambda c: list(_HASHES).index(c.algorithm), reverse=True)
        if basic:
            answerable += [c for c in challenges if c.scheme == "basic"]
        self._challenge, self._count = (answerable[0] if answerable else None), 0
        return bool(answerable)

    def header(self, method: str, uri: str, *, basic: bool = True) -> str | None:
        """Return the `Authorization` header of a request.

        None before a challenge, and where the challenge asks for the password in clear but `basic` is False.
        """
        if self._challenge is None:
            return None
        if self._challenge.scheme == "basic":
            if not basic:
                return None
            return f"Basic {base64.b64encode(f'{self._user}:{self._password}'.encode()).decode()}"
        return self._digest(self._challenge, method, uri)

    def _digest(self, challenge: Challenge, method: str, uri: str) -> str:
        asked = challenge.parameters
        self._count += 1
        nonce, count, client_nonce = asked["nonce"], f"{self._count:08x}", secrets.token_hex(8)

        def digest(*words: str) -> str:
            return hashlib.new(_HASHES[challenge.algorithm], ":".join(words).encode()).hexdigest()

        ha1 = digest(self._user, asked.get("realm", ""), self._password)
        if asked.get("algorithm", "").upper().endswith("-SESS"):
            ha1 = digest(ha1, nonce, client_nonce)
        # 'auth-int' alone would need a hash of the body; no camera asks for it.
        uses_auth = "auth" in re.split(r"[\s,]+", asked.get("qop", ""))
        middle = (count, client_nonce, "auth") if uses_auth else ()
        # Values of the server are returned and hashed as received, with their escapes (RFC 7616, `unq`).
        parts = {"username": re.sub(r'(["\\])', r"\\\1", self._user), "realm": asked.get("realm", "")}
        parts |= {"nonce": nonce, "uri": uri}
        parts["response"] = digest(ha1, nonce, *middle, digest(method, uri))
        text = ", ".join(f'{name}="{value}"' for name, value in parts.items())
        text += f', opaque="{asked["opaque"]}"' if "opaque" in asked else ""
        text += f", algorithm={asked['algorithm']}" if "algorithm" in asked else ""
        text += f', qop=auth, nc={count}, cnonce="{client_nonce}"' if uses_auth else ""
        text += (
            f', cnonce="{client_nonce}"'
            if not uses_auth and "-SESS" in asked.get("algorithm", "").upper()
            else ""
        )
        return f"Digest {text}"
