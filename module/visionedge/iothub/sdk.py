"""One connection to edgeHub through azure-iot-device; the only file that imports it.

A link is one connection and is never repaired: when it is lost, a new link is made. The SDK's own
reconnecting is switched off, because it forgets subscriptions, stops after some errors, and competes with a
new client for the MQTT client id. The SDK's renewal of tokens is never used: a link is replaced before its
token expires.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from visionedge import __version__
from visionedge.iothub.identity import Identity
from visionedge.outbound.messages import CONTENT_ENCODING, CONTENT_TYPE, CORRELATION_ID, Message
from visionedge.runtime.redaction import redact

log = logging.getLogger(__name__)

T = TypeVar("T")

TOKEN_LIFETIME_S = 3600
_KEEP_ALIVE_S = 30
"""Also paho's limit for a TLS handshake. A dead peer is detected after two of these intervals."""


class LinkError(Exception):
    """The link cannot be made, or was lost. The text is one line without secrets."""


class MessageRefusedError(Exception):
    """The SDK refuses this message, now and later; the link is good."""


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A call of a direct method, to be answered over the same connection; `payload` is any JSON value."""

    name: str
    payload: Any
    request_id: str
    connection_number: int = 0


@dataclass(frozen=True, slots=True)
class InputMessage:
    """A message of another module to an input of this one, with the ids that its sender chose."""

    input: str
    body: bytes
    properties: Mapping[str, str]
    message_id: str = ""
    correlation_id: str = ""


class LinkListener(Protocol):
    """Receives what comes over a link, on threads of the SDK; must return at once and raise nothing."""

    def on_desired_changed(self) -> None:
        """The desired properties changed. The patch is not passed on: only the whole twin is reliable."""

    def on_method_call(self, call: MethodCall) -> None:
        """A direct method was called."""

    def on_message(self, message: InputMessage) -> None:
        """A message arrived at an input."""


class HubLink(Protocol):
    """One connection to the hub. Every call may block for ever."""

    def connect(self, link_listener: LinkListener | None) -> None:
        """Open the connection; the listener is active from the first moment. Raises LinkError."""

    def send(self, message: Message) -> None:
        """Send, and wait for the acknowledgement. Raises LinkError or MessageRefusedError."""

    def twin(self) -> Mapping[str, Any] | None:
        """Both halves of the twin, with their versions; None if the hub answered with an error.

        Raises LinkError.
        """

    def subscribe(self) -> None:
        """Subscribe to everything that the listener receives; once, after `connect`. Raises LinkError."""

    def report(self, patch: Mapping[str, Any]) -> bool:
        """Apply a patch to the reported properties; False if the hub refused it. Raises LinkError."""

    def answer(self, request_id: str, status: int, document: Any) -> None:
        """Answer a direct method that was called over this link. Raises LinkError."""

    def close(self) -> None:
        """Close the connection and free its resources. Raises LinkError."""


OnLost = Callable[[str], None]
LinkFactory = Callable[[Identity, OnLost], HubLink]


def open_link(identity: Identity, on_lost: OnLost) -> HubLink:
    """Make a link from the environment variables; asks the workload API for a token and the trusted CA.
    Blocks.

    `on_lost` is called from a thread of the SDK when the connection ends, with the reason.

    Raises:
        LinkError: the workload API failed, or the environment is wrong.
    """
    try:
        from azure.iot.device import IoTHubModuleClient

        _silence_sdk_logging()
        client = IoTHubModuleClient.create_from_edge_environment(
            product_info=f"visionedge/{__version__}",
            auto_connect=False,
            connection_retry=False,
            keep_alive=_KEEP_ALIVE_S,
            sastoken_ttl=TOKEN_LIFETIME_S,
        )
    except Exception as error:  # the SDK does not wrap the errors of its layers
        raise LinkError(identity.socket_problem() or describe_error(error)) from error
    return _AzureLink(client, on_lost)


class _AzureLink:
    def __init__(self, client: Any, on_lost: OnLost) -> None:
        self._client = client
        self._on_lost = on_lost
        self._handlers: dict[str, Callable[[Any], None]] = {}
        client.on_connection_state_change = self._state_changed
        client.on_background_exception = self._background_error

    def connect(self, link_listener: LinkListener | None) -> None:
        if link_listener is not None:
            self._handlers = _handlers(link_listener)
        for name, handler in self._handlers.items():
            # Setting a handler also subscribes, which fails without a connection. But the handler is set when
            # edgeHub delivers waiting messages, right after connecting if it knows the subscriptions.
            with contextlib.suppress(Exception):
                setattr(self._client, name, handler)
        self._sdk(self._client.connect)

    def send(self, message: Message) -> None:
        from azure.iot.device import Message as AzureMessage

        # Bytes, because the SDK measures a text before it is encoded, when it can be half as large.
        sdk_message = AzureMessage(  # type: ignore[no-untyped-call]  # the SDK types only half of itself
            message.body, message.message_id, CONTENT_ENCODING, CONTENT_TYPE, message.output
        )
        own = dict(message.properties)
        sdk_message.correlation_id = own.pop(CORRELATION_ID, None)
        sdk_message.custom_properties.update(own)
        try:
            self._sdk(lambda: self._client.send_message_to_output(sdk_message, message.output))
        except LinkError as error:
            if isinstance(error.__cause__, ValueError | TypeError):
                raise MessageRefusedError(str(error)) from error.__cause__
            raise

    def twin(self) -> Mapping[str, Any] | None:
        try:
            twin: Mapping[str, Any] = self._sdk(self._client.get_twin)
        except LinkError as error:
            if not _is_hub_error(error):
                raise
            return None
        return twin

    def subscribe(self) -> None:
        for name, handler in self._handlers.items():
            self._sdk(partial(setattr, self._client, name, handler))

    def report(self, patch: Mapping[str, Any]) -> bool:
        try:
            self._sdk(lambda: self._client.patch_twin_reported_properties(dict(patch)))
        except LinkError as error:
            if not _is_hub_error(error):
                raise
            log.warning("edgeHub refused a patch of reported properties: %s", error)
            return False
        return True

    def answer(self, request_id: str, status: int, document: Any) -> None:
        from azure.iot.device import MethodResponse

        response = MethodResponse(request_id, status, document)
        self._sdk(lambda: self._client.send_method_response(response))

    def close(self) -> None:
        try:
            self._sdk(self._client.shutdown)
        except LinkError:
            # If the connection breaks meanwhile, shutdown stops half-way and leaves threads; the second one
            # works.
            self._sdk(self._client.shutdown)

    def _sdk(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except Exception as error:  # OperationCancelled and others are not derived from ClientError
            raise LinkError(describe_error(error)) from error

    def _state_changed(self) -> None:
        if not self._client.connected:
            self._on_lost("the connection was closed")

    def _background_error(self, error: Exception) -> None:
        self._on_lost(describe_error(error))


def _handlers(link_listener: LinkListener) -> dict[str, Callable[[Any], None]]:
    """The handlers by the property of the SDK client that takes them; setting a property also subscribes.

    The SDK's shutdown waits for the threads that run handlers, so they must only pass on.
    """
    return {
        "on_twin_desired_properties_patch_received": lambda _patch: link_listener.on_desired_changed(),
        "on_method_request_received": lambda request: link_listener.on_method_call(
            MethodCall(request.name, request.payload, request.request_id)
        ),
        "on_message_received": lambda message: link_listener.on_message(_input_message(message)),
    }


def _is_hub_error(error: LinkError) -> bool:
    """Whether the error is an answer of the hub: then the link is good."""
    from azure.iot.device.exceptions import ServiceError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ServiceError):
        cause = cause.__cause__
    return cause is not None


def _input_message(message: Any) -> InputMessage:
    body = message.data if isinstance(message.data, bytes) else str(message.data).encode()
    properties = {str(name): value or "" for name, value in message.custom_properties.items()}
    return InputMessage(
        str(message.input_name), body, properties, message.message_id or "", message.correlation_id or ""
    )


def describe_error(error: BaseException) -> str:
    """One line with the texts of an error and its causes, each once, without secrets."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 6:
        text = " ".join(str(cause).split()) or type(cause).__name__
        if not any(text in known for known in texts):
            texts.append(text)
        cause = cause.__cause__
    return redact(": ".join(texts))[:500]


def _silence_sdk_logging() -> None:
    """Silence the SDK's log and its tracebacks, because this module logs each failure in one line.

    `--log debug` shows all of them.
    """
    if not log.isEnabledFor(logging.DEBUG):
        for name in ("azure.iot.device", "paho"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
