"""The stand-in's cloud side: twin, methods, inputs, sessions, and faults, as edgeHub has them."""

import json
import re
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from edge_runtime import packets
from edge_runtime.broker import MAX_METHOD_BYTES, MethodAnswer
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.session import matches
from edge_runtime.twin import RefusedError, Twin
from test_edge_runtime import MqttClient, topic

pytestmark = pytest.mark.system

EVERYTHING = (
    "$iothub/twin/res/#",
    "$iothub/twin/PATCH/properties/desired/#",
    "$iothub/methods/POST/#",
)


class SubscribedClient(MqttClient):
    """A module that has subscribed to everything."""

    def __init__(self, runtime: EdgeRuntime) -> None:
        super().__init__(runtime)
        self.connect()
        for name in (*EVERYTHING, f"{runtime.account.topic}/inputs/#"):
            self.subscribe(name)

    def next_publish(self) -> tuple[str, bytes, int, bool]:
        """The next PUBLISH (`next_publish`)."""
        return next_publish(self)

    def silent(self, timeout_s: float = 0.3) -> bool:
        """Whether nothing comes for a while."""
        self._socket.settimeout(timeout_s)
        try:
            return not self._socket.recv(1)
        except TimeoutError:
            return True


def next_publish(client: MqttClient) -> tuple[str, bytes, int, bool]:
    """Topic, body, packet id (0: QoS 0) and whether it is a duplicate, of the next PUBLISH."""
    while True:
        first, length, shift = client._read(1)[0], 0, 0
        while True:
            byte = client._read(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        body = client._read(length)
        if first >> 4 == packets.PUBLISH:
            got = packets.parse_publish(packets.Packet(packets.PUBLISH, first & 15, body))
            return got.topic, got.payload, got.packet_id, got.dup


@pytest.fixture
def module(edge_runtime: EdgeRuntime) -> Iterator[SubscribedClient]:
    """A connected module."""
    module = SubscribedClient(edge_runtime)
    yield module
    module.close()


def meanwhile(work: Callable[[], Any]) -> "BackgroundCall":
    """Do something on another thread."""
    return BackgroundCall(work)


class BackgroundCall:
    def __init__(self, work: Callable[[], Any]) -> None:
        self._result: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._result.append(work()))
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(20)
        return self._result[0]


# --- the twin ---------------------------------------------------------------------------------------------


def test_desired_patches_are_pushed_with_their_version(edge_runtime: EdgeRuntime, module: SubscribedClient) -> None:
    """The body holds the nulls that take keys away; a GET has what is left."""
    edge_runtime.desire({"cameras": {"dock": {"uri": "demo:"}}, "x": 1})
    version = edge_runtime.desire({"x": None})
    first, body, packet_id, _ = module.next_publish()
    assert first == "$iothub/twin/PATCH/properties/desired/?$version=2"
    assert packet_id == 0
    assert json.loads(body)["$version"] == 2
    second, body, _, _ = module.next_publish()
    assert (second, json.loads(body)) == (
        f"$iothub/twin/PATCH/properties/desired/?$version={version}",
        {"x": None, "$version": 3},
    )

    module.publish("$iothub/twin/GET/?$rid=1", b" ")
    _, body, _, _ = module.next_publish()
    assert json.loads(body)["desired"] == {"cameras": {"dock": {"uri": "demo:"}}, "$version": 3}


def test_a_patch_without_a_subscriber_is_not_kept(edge_runtime: EdgeRuntime) -> None:
    """edgeHub does not queue desired patches: whoever connects must ask."""
    edge_runtime.desire({"x": 1})
    module = SubscribedClient(edge_runtime)
    assert module.silent()
    module.close()


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        ('{"a": NaN}', "not JSON"),
        ("[1]", "not an object"),
        ('{"a.b": 1}', "the key"),
        ('{"a b": 1}', "the key"),
        ('{"$a": 1}', "the key"),
        (json.dumps({"x": "y" * 4097}), "a text above"),
        ('{"a": [1, null]}', "null inside an array"),
        ('{"a": 4503599627370496}', "the integer"),
        (json.dumps({str(n): "x" * 4000 for n in range(9)}), "above 32768 bytes"),
        (json.dumps({"a" * 1025: 1}), "a key above"),
    ],
)
def test_patches_that_edgehub_refuses_are_refused(
    edge_runtime: EdgeRuntime, module: SubscribedClient, patch: str, why: str
) -> None:
    """A patch against the rules is answered with 400 and changes nothing."""
    module.publish("$iothub/twin/PATCH/properties/reported/?$rid=7", patch.encode())
    answer, _, _, _ = module.next_publish()
    assert answer.startswith("$iothub/twin/res/400/?$rid=7")
    assert edge_runtime.broker.twin.reported == {}
    assert re.search(why, edge_runtime.broker.refusals[-1])


def test_ten_levels_are_allowed_and_eleven_are_not() -> None:
    """As edgeHub counts them: the values of the outermost object are on the first."""

    def nested(levels: int) -> bytes:
        value: Any = 1
        for _ in range(levels):
            value = {"a": value}
        return json.dumps(value).encode()

    Twin().report(nested(10))
    with pytest.raises(RefusedError, match="deeper"):
        Twin().report(nested(11))


def test_arrays_and_strings_of_the_allowed_size_pass() -> None:
    """The rules forbid no more than they say."""
    twin = Twin()
    twin.report(json.dumps({"a": [1, "x" * 4096, {"b": True}], "big": 2**52 - 1}).encode())
    assert twin.reported_version == 2
    assert twin.patches[0]["a"][2] == {"b": True}


# --- methods ----------------------------------------------------------------------------------------------


def test_a_method_is_answered_with_status_and_json(edge_runtime: EdgeRuntime, module: SubscribedClient) -> None:
    """The request travels with QoS 0, its id comes back."""
    call = meanwhile(lambda: edge_runtime.invoke("ping", {"a": 1}))
    name, body, packet_id, _ = module.next_publish()
    assert packet_id == 0
    assert json.loads(body) == {"a": 1}
    request = re.fullmatch(r"\$iothub/methods/POST/ping/\?\$rid=(\w+)", name)
    assert request
    module.publish(f"$iothub/methods/res/207/?$rid={request[1]}", b'{"ok":true}')
    assert call.result() == MethodAnswer(207, {"ok": True})


def test_a_method_without_subscriber_or_answer_has_an_error_status(edge_runtime: EdgeRuntime) -> None:
    """404 without a module, 504 without an answer; nothing is queued."""
    assert edge_runtime.invoke("ping") == MethodAnswer(404, None)
    module = SubscribedClient(edge_runtime)
    assert module.silent()
    module.close()
    module = SubscribedClient(edge_runtime)
    assert edge_runtime.invoke("ping", timeout_s=0.2) == MethodAnswer(504, None)
    module.close()


def test_an_answer_above_128_kb_is_rejected(edge_runtime: EdgeRuntime, module: SubscribedClient) -> None:
    """The caller gets an error, and the refusal is on record."""
    call = meanwhile(lambda: edge_runtime.invoke("snapshot"))
    name, _, _, _ = module.next_publish()
    module.publish(
        f"$iothub/methods/res/200/?$rid={name.partition('$rid=')[2]}", b'"' + b"x" * MAX_METHOD_BYTES + b'"'
    )
    assert call.result() == MethodAnswer(500, None)
    assert "a method's answer of" in edge_runtime.broker.refusals[-1]


# --- inputs and sessions ----------------------------------------------------------------------------------


def test_a_message_to_an_input_waits_for_its_module_and_its_acknowledgement(
    edge_runtime: EdgeRuntime,
) -> None:
    """Sent while the module is away, again after a reconnect as a duplicate, and never after its PUBACK."""
    first = SubscribedClient(edge_runtime)
    first.close()
    edge_runtime.wait_until(lambda: all(s.connection is None for s in edge_runtime.broker.sessions.values()))
    edge_runtime.input("frames", b"picture", {"$.ct": "image/jpeg", "k 1": "v"})

    second = MqttClient(edge_runtime)
    assert second.connect() == b"\x01\x00"
    again = next_publish(second)
    assert again[0] == f"{edge_runtime.account.topic}/inputs/frames/" + "&".join(
        [
            f"{quote('$.cdid', safe='')}=edge-device-1",
            f"{quote('$.cmid', safe='')}=other",
            f"{quote('$.ct', safe='')}={quote('image/jpeg', safe='')}",
            "k%201=v",
        ]
    )
    assert again[1] == b"picture"
    assert not again[3]
    second.close()

    third = MqttClient(edge_runtime)
    third.connect()
    _, _, packet_id, dup = next_publish(third)
    assert dup
    third._socket.sendall(packets.packet(packets.PUBACK, struct.pack(">H", packet_id)))
    third.publish(topic(edge_runtime) + "%24.on=events&%24.mid=m")
    edge_runtime.wait_for(lambda got: len(got) == 1)
    third.close()
    fourth = SubscribedClient(edge_runtime)
    assert fourth.silent()
    fourth.close()


def test_after_a_lost_session_only_telemetry_works(
    edge_runtime: EdgeRuntime, module: SubscribedClient
) -> None:
    """PUBACKs go on: only a round trip finds out."""
    edge_runtime.lose_sessions()
    module.publish("$iothub/twin/GET/?$rid=1", b" ")
    assert module.receive()[0] == packets.PUBACK
    assert edge_runtime.invoke("ping") == MethodAnswer(404, None)
    assert module.silent()


def test_a_forgotten_session_is_reported_as_new(edge_runtime: EdgeRuntime) -> None:
    """CONNACK without session-present, and no subscription left."""
    SubscribedClient(edge_runtime).close()
    edge_runtime.faults.forget_sessions = True
    client = MqttClient(edge_runtime)
    assert client.connect() == b"\x00\x00"
    assert not any(session.subscriptions for session in edge_runtime.broker.sessions.values())
    client.close()


def test_a_connection_ends_with_its_token(edge_runtime: EdgeRuntime) -> None:
    """As edgeHub cuts who does not renew."""
    client = MqttClient(edge_runtime)
    assert client.connect(password=client.token(lives_s=1)) == b"\x00\x00"
    assert client.ended()
    client.close()


@pytest.mark.parametrize(
    ("pattern", "name", "taken"),
    [
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a/b/c", False),
        ("a/b", "a/b", True),
        ("a/b/c", "a/b", False),
    ],
)
def test_topic_filters_are_those_of_mqtt(pattern: str, name: str, taken: bool) -> None:
    """`+` is one level, `#` is the rest."""
    assert matches(pattern, name) is taken


# --- faults -----------------------------------------------------------------------------------------------


def test_a_reset_publish_is_not_received_and_a_reset_puback_is(edge_runtime: EdgeRuntime) -> None:
    """Both end in a reset."""
    edge_runtime.faults.reset_publishes = 1
    first = SubscribedClient(edge_runtime)
    first.publish(topic(edge_runtime) + "%24.on=events", b"x" * 100)
    assert first.ended()
    assert edge_runtime.messages == []
    first.close()
    edge_runtime.faults.reset_pubacks = 1
    second = SubscribedClient(edge_runtime)
    second.publish(topic(edge_runtime) + "%24.on=events", b"x" * 100)
    assert second.ended()
    assert len(edge_runtime.messages) == 1
    second.close()


def test_a_hanging_hub_answers_when_it_resumes(edge_runtime: EdgeRuntime, module: SubscribedClient) -> None:
    """Nothing is lost by it, everything is late."""
    edge_runtime.hang()
    module.publish("$iothub/twin/GET/?$rid=1", b" ")
    assert module.silent()
    edge_runtime.resume()
    module._socket.settimeout(5)
    assert module.next_publish()[0].startswith("$iothub/twin/res/200")


def test_all_faults_end_at_once(edge_runtime: EdgeRuntime) -> None:
    """Whatever was set."""
    edge_runtime.faults.swallow = True
    edge_runtime.faults.refuse_code = 5
    edge_runtime.faults.end()
    client = MqttClient(edge_runtime)
    assert client.connect() == b"\x00\x00"
    client.close()
