"""The stand-in itself: a test double that lets everything pass would prove nothing."""

import json
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from edge_runtime import packets
from edge_runtime.broker import MAX_PUBLISH_BYTES, PORT
from edge_runtime.runtime import EdgeRuntime

pytestmark = pytest.mark.system


class MqttClient:
    """A bare MQTT client over TLS, that can also do what no SDK would."""

    def __init__(self, runtime: EdgeRuntime) -> None:
        self._account = runtime.account
        context = ssl.create_default_context(cadata=runtime.ca_pem)
        plain = socket.create_connection((runtime.address, PORT), timeout=5)
        self._socket = context.wrap_socket(plain, server_hostname=runtime.address)

    def connect(
        self, *, client_id: str | None = None, username: str | None = None, password: str | None = None
    ) -> bytes:
        """Send CONNECT; the two bytes of CONNACK (session present, code)."""
        account = self._account
        body = (
            packets.text("MQTT")
            + bytes([4, 0b1100_0000, 0, 60])
            + packets.text(account.client_id if client_id is None else client_id)
            + packets.text(username or f"{account.hub}/{account.client_id}/?api-version=2019-10-01")
            + packets.text(password or self.token())
        )
        self._socket.sendall(packets.packet(packets.CONNECT, body))
        return self.receive()[1]

    def token(self, *, lives_s: int = 60, resource: str | None = None) -> str:
        """A shared access signature, rightly signed."""
        resource = quote(resource or self._account.resource, safe="")
        expiry = int(time.time()) + lives_s
        signature = quote(self._account.sign(f"{resource}\n{expiry}".encode()), safe="")
        return f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}"

    def publish(self, topic: str, payload: bytes = b"{}") -> None:
        """Send PUBLISH with QoS 1 and packet id 7."""
        body = packets.text(topic) + struct.pack(">H", 7) + payload
        self._socket.sendall(packets.packet(packets.PUBLISH, body, flags=0b0010))

    def subscribe(self, topic: str) -> None:
        """Subscribe and wait for the SUBACK."""
        body = struct.pack(">H", 8) + packets.text(topic) + b"\x01"
        self._socket.sendall(packets.packet(packets.SUBSCRIBE, body, flags=0b0010))
        assert self.receive()[0] == packets.SUBACK

    def receive(self) -> tuple[int, bytes]:
        """Type and body of the next packet."""
        kind, length, shift = self._read(1)[0] >> 4, 0, 0
        while True:
            byte = self._read(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return kind, self._read(length)

    def ended(self) -> bool:
        """Whether the broker has closed the connection."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            assert part, "the broker has closed the connection"
            data += part
        return data


@pytest.fixture
def client(edge_runtime: EdgeRuntime) -> Iterator[MqttClient]:
    """A client that is not connected yet."""
    client = MqttClient(edge_runtime)
    yield client
    client.close()


def topic(runtime: EdgeRuntime) -> str:
    """Where telemetry goes, without properties."""
    return f"devices/{runtime.account.device}/modules/{runtime.account.module}/messages/events/"


def test_a_correctly_signed_token_is_accepted(client: MqttClient) -> None:
    """The other refusals mean something only because this works."""
    assert client.connect() == b"\x00\x00"


@pytest.mark.parametrize("wrong", ["another signature", "expired", "another resource", "no token"])
def test_a_wrong_token_is_not_authorised(client: MqttClient, wrong: str) -> None:
    """The signature, the time and the resource are all checked."""
    password = {
        "another signature": client.token()[:-20].replace("sig=", "sig=A") + client.token()[-20:],
        "expired": client.token(lives_s=-1),
        "another resource": client.token(resource="other/devices/d/modules/m"),
        "no token": "hunter2",
    }[wrong]
    assert client.connect(password=password) == bytes([0, packets.NOT_AUTHORIZED])
    assert client.ended()


def test_another_client_id_or_user_name_is_refused(edge_runtime: EdgeRuntime, client: MqttClient) -> None:
    """edgeHub wants the identity as client id, and an api-version in the user name."""
    assert client.connect(client_id="edge-device-1/other") == bytes([0, packets.BAD_CLIENT_ID])
    second = MqttClient(edge_runtime)
    account = edge_runtime.account
    username = f"{account.hub}/{account.client_id}/"
    assert second.connect(username=username) == bytes([0, packets.BAD_CREDENTIALS])
    second.close()


def test_telemetry_is_recorded_with_its_properties(edge_runtime: EdgeRuntime, client: MqttClient) -> None:
    """System properties apart from the module's own, percent signs decoded."""
    client.connect()
    client.publish(topic(edge_runtime) + "%24.on=events&%24.mid=m1&%24.ct=a%2Fb&k%201=v%3D%C3%BC", b"\xff")
    assert client.receive() == (packets.PUBACK, b"\x00\x07")
    [message] = edge_runtime.messages
    assert (message.output, message.message_id, message.content_type) == ("events", "m1", "a/b")
    assert message.properties == {"k 1": "v=ü"}
    assert message.body == b"\xff"


def test_a_foreign_topic_and_too_large_a_message_end_the_connection(
    edge_runtime: EdgeRuntime, client: MqttClient
) -> None:
    """As edgeHub does; nothing of it is recorded."""
    client.connect()
    client.publish("devices/other/modules/vision/messages/events/")
    assert client.ended()
    second = MqttClient(edge_runtime)
    second.connect()
    second.publish(topic(edge_runtime), b"x" * MAX_PUBLISH_BYTES)
    assert second.ended()
    second.close()
    assert edge_runtime.messages == []


def test_a_session_outlives_its_connection(edge_runtime: EdgeRuntime, client: MqttClient) -> None:
    """Subscriptions are kept and CONNACK says that there was a session; a new connection ends the old."""
    client.connect()
    client.subscribe("$iothub/twin/res/#")
    second = MqttClient(edge_runtime)
    assert second.connect() == b"\x01\x00"
    assert client.ended()

    second.publish("$iothub/twin/GET/?$rid=r1", b" ")

    kind, body = second.receive()
    second.close()
    assert kind == packets.PUBLISH
    assert b"$iothub/twin/res/200/?$rid=r1" in body


def test_the_twin_answers_those_who_subscribed(edge_runtime: EdgeRuntime, client: MqttClient) -> None:
    """GET gives both halves with versions; a reported patch is merged and answered with its version."""
    client.connect()
    client.subscribe("$iothub/twin/res/#")
    client.publish("$iothub/twin/PATCH/properties/reported/?$rid=r2", b'{"a":{"b":1,"c":null}}')
    _, body = client.receive()
    assert b"$iothub/twin/res/204/?$rid=r2&$version=2" in body
    assert client.receive()[0] == packets.PUBACK
    twin = json.loads(edge_runtime.broker.twin.document())
    assert twin == {"desired": {"$version": 1}, "reported": {"a": {"b": 1}, "$version": 2}}


def test_two_runtimes_run_side_by_side(edge_runtime: EdgeRuntime) -> None:
    """The port is fixed, so each has an address of its own."""
    with EdgeRuntime(device="another") as other:
        assert other.address != edge_runtime.address
        client = MqttClient(other)
        assert client.connect() == b"\x00\x00"
        client.close()
