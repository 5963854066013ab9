"""The data that the parts of the edge runtime share: the account of the module, received messages, faults."""

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote


@dataclass(frozen=True, slots=True)
class Account:
    """The only module of this runtime: its names and its key, which only the workload API knows."""

    hub: str
    device: str
    module: str
    generation: str
    key: bytes

    @property
    def client_id(self) -> str:
        return f"{self.device}/{self.module}"

    @property
    def resource(self) -> str:
        return f"{self.hub}/devices/{self.device}/modules/{self.module}"

    @property
    def topic(self) -> str:
        """The prefix of the topics of the module."""
        return f"devices/{self.device}/modules/{self.module}"

    def sign(self, data: bytes) -> str:
        """Base64 of the HMAC-SHA256 of `data`, as the workload API returns it."""
        return base64.b64encode(hmac.digest(self.key, data, hashlib.sha256)).decode()

    def token_problem(self, token: str) -> str | None:
        """The problem of a shared access signature; None if it is valid."""
        scheme, _, rest = token.partition(" ")
        parts = dict(part.partition("=")[::2] for part in rest.split("&"))
        if scheme != "SharedAccessSignature" or not {"sr", "sig", "se"} <= parts.keys():
            return "no shared access signature"
        if unquote(parts["sr"]) != self.resource:
            return f"for {unquote(parts['sr'])}"
        if not parts["se"].isdigit() or int(parts["se"]) <= time.time():
            return "expired"
        expected = self.sign(f"{quote(self.resource, safe='')}\n{parts['se']}".encode())
        return None if hmac.compare_digest(unquote(parts["sig"]), expected) else "wrongly signed"


def token_left_s(token: str) -> float:
    """For how many seconds a token is valid."""
    _, _, rest = token.partition("&se=")
    return int(rest.partition("&")[0]) - time.time()


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A telemetry message as it was received. A message that is sent again is received again."""

    output: str
    body: bytes
    message_id: str
    content_type: str
    content_encoding: str
    correlation_id: str
    properties: dict[str, str]
    topic: str
    qos: int
    dup: bool
    received_ns: int

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


@dataclass(slots=True)
class Faults:
    """The faults from now on. May be set from any thread.

    `swallow`: packets of the client are lost and nothing is answered, as on a half-open connection.
    `reset_publishes`, `reset_pubacks`: this number of next messages end in a reset, in their middle (not
    received) or instead of their acknowledgement (received). `puback_delay_s`: a slow hub. `forget_sessions`:
    a new connection finds no session and keeps no subscription. `twin_status`: the status of all answers of
    the twin.
    """

    swallow: bool = False
    swallow_pubacks: bool = False
    swallow_connacks: bool = False
    swallow_subacks: bool = False
    silent_twin: bool = False
    forget_sessions: bool = False
    refuse_code: int | None = None
    twin_status: int | None = None
    reset_publishes: int = 0
    reset_pubacks: int = 0
    puback_delay_s: float = 0.0
    fail_signing: bool = False
    hang_signing: bool = False
    drop_signing: bool = False
    wrong_signing: bool = False
    fail_trust_bundle: bool = False

    def end(self) -> None:
        """End all faults."""
        fresh = Faults()
        for name in Faults.__slots__:
            setattr(self, name, getattr(fresh, name))
