"""A module in a process of its own: attacked over HTTP while another client asks, started on damaged files.

What each defence does is tested beside it; here it is one module that has to stand all of it and go on.
"""

import http.client
import json
import resource
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

from edge_runtime.runtime import EdgeRuntime
from module_process import ModuleProcess
from tiny_models import TinyDetector

TOKEN = "token-of-the-test"
ANSWER_WITHIN_S = 5.0
"""A healthy module answers within a second; a machine that does other work as well must not fail the test."""
ROUNDS, ATTACK_S = 8, 1.0
"""The other client asks so often during each attack, and for so long, at least."""
GROWTH_MOST_BYTES = 400 * 2**20
FRAME_PATH = "/api/v1/cameras/dock/frame"
DETECT_PATH, INFER_PATH = "/api/v1/detect", "/v2/models/tiny/infer"
LOOPBACK = "127.0.0.1"


class Target:
    """The module under attack, what it has written and how much memory its processes take."""

    def __init__(self, folder: Path) -> None:
        TinyDetector().save(folder / "tiny.onnx")
        self._messages = folder / "messages.jsonl"
        document = {
            "cameras": {"dock": {"uri": "demo:", "fps": 10}},
            "model": {"path": str(folder / "tiny.onnx")},
            "inference": {"device": "cpu", "confidence": 0.01},
            "telemetry": {"mode": "all", "intervalSeconds": 0.2, "fillSeconds": 0},
            "http": {"token": TOKEN},
        }
        config = folder / "vision.json"
        config.write_text(json.dumps(document))
        arguments = ("--config", str(config), "--messages", str(self._messages))
        self.module = ModuleProcess(folder / "data", *arguments)
        self.port = 0
        self.rss_before_bytes = 0

    def begin(self) -> None:
        """Wait until it is ready and has analysed frames; what it takes then is its normal memory."""
        self.port = urlsplit(self.module.ready()).port or 0
        self.wait_for_new_messages()
        self.rss_before_bytes = self.rss_bytes()

    def rss_bytes(self) -> int:
        """Resident memory of the process and its descendants."""
        return sum(_rss_bytes(pid) for pid in _family(self.module.pid))

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        """A connection; with a small buffer for what it receives, if asked for."""
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(10)
        connection.connect((LOOPBACK, self.port))
        return connection

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        """Send a body with the token; the status and the body of the answer."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Authorization": f"Bearer {TOKEN}", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def wait_for_new_messages(self) -> None:
        """Wait until frames newer than the latest one so far are in the file of messages."""
        path = FRAME_PATH
        before = 0
        for _ in range(60):
            status, body = _answer(self.port, path)
            if status == 200:
                sequence = json.loads(body)["sequence"]
                before = before or sequence
                path = f"{FRAME_PATH}?after={sequence}&timeout=1"
            if before and self._last_written() > before:
                return
        raise AssertionError(f"no message is newer than frame {before}\n{self.module.log}")

    def _last_written(self) -> int:
        text = self._messages.read_text() if self._messages.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        frames = [frame for line in whole[-20:] for frame in json.loads(line).get("frames", ())]
        return max((frame["sequence"] for frame in frames), default=0)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):  # it, or one of its threads, has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _rss_bytes(pid: int) -> int:
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return 0


def _answer(port: int, path: str) -> tuple[int, bytes]:
    """Ask on a new connection, again if it is closed: the time counts from the first attempt.

    During a flood of connections the module may close one before its request has come.
    """
    until_s = time.monotonic() + ANSWER_WITHIN_S
    while True:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=ANSWER_WITHIN_S)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except ConnectionError:
            if time.monotonic() > until_s:
                raise
        finally:
            connection.close()


class OtherClient:
    """Asks for the health and the latest frame again and again on a thread, and takes the times."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._ended = threading.Event()
        self._changed = threading.Condition()
        self._rounds = 0
        self._until_s = time.monotonic() + ATTACK_S
        self._thread = threading.Thread(target=self._ask, name="other-client")
        self.error: Exception | None = None
        self.worst_s = 0.0
        self.rss_most_bytes = 0

    def __enter__(self) -> "OtherClient":
        self._thread.start()
        return self

    def __exit__(self, *_args: object) -> None:
        self._ended.set()
        self._thread.join()

    def resumed(self) -> bool:
        """Whether the attack is to go on: not all rounds are done, and none has failed."""
        is_over = self._rounds >= ROUNDS and time.monotonic() >= self._until_s
        return not is_over and self.error is None

    def wait(self) -> None:
        """Wait until so many rounds are done."""
        with self._changed:
            self._changed.wait_for(lambda: not self.resumed(), 60)

    def _ask(self) -> None:
        while not self._ended.is_set() and self.error is None:
            try:
                for path in ("/healthz", FRAME_PATH):
                    self._ask_once(path)
            except Exception as error:  # noqa: BLE001 - the test's thread raises it
                self.error = error
            self.rss_most_bytes = max(self.rss_most_bytes, self._target.rss_bytes())
            with self._changed:
                self._rounds += 1
                self._changed.notify_all()

    def _ask_once(self, path: str) -> None:
        asked_s = time.monotonic()
        status, body = _answer(self._target.port, path)
        took_s = time.monotonic() - asked_s
        self.worst_s = max(self.worst_s, took_s)
        assert status == 200, (path, status, body)
        assert took_s < ANSWER_WITHIN_S, (path, took_s)


Attack = Callable[["AttackContext"], None]
"""Goes on for as long as the other client asks, or leaves connections open that are held meanwhile."""


class AttackContext:
    """What an attack uses: the target, the other client, and what stays open until that has asked enough."""

    def __init__(self, target: Target, other: OtherClient, held: ExitStack) -> None:
        self.target = target
        self.other = other
        self.held = held

    def hold(self, connection: socket.socket) -> socket.socket:
        """Keep a connection open until the end."""
        return self.held.enter_context(connection)


def _send(connection: socket.socket, data: bytes) -> bytes:
    """What comes first after these bytes; nothing where the module has hung up."""
    with suppress(OSError):
        connection.sendall(data)
        return connection.recv(65536)
    return b""


def texts_that_are_slow_to_mask(context: AttackContext) -> None:
    """Before the token, in each part of a head, on kept connections."""
    places = (
        b"%b / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: %b\r\n\r\n",
    )
    pieces = (b"a://:", b"a.", b"a-", b"key-", b"://", b"a://a@")
    for size_bytes in (8_000, 40_000, 256_000):
        for piece in pieces:
            for place in places:
                with context.target.connect() as connection:
                    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
                    reply = _send(connection, place % (piece * (size_bytes // len(piece))))
                    assert reply == b"" or reply.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), reply[:80]


def a_thousand_silent_connections(context: AttackContext) -> None:
    """More than there are places; as many as the descriptors of the test allow."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    for _ in range(min(1_100, soft - 200)):
        context.hold(context.target.connect())


def silent_connections_until_descriptors_run_out(context: AttackContext) -> None:
    """The limit falls below what the module has read at its start, so it meets EMFILE in all its threads."""
    limits = resource.prlimit(context.target.module.pid, resource.RLIMIT_NOFILE)
    context.held.callback(resource.prlimit, context.target.module.pid, resource.RLIMIT_NOFILE, limits)
    resource.prlimit(context.target.module.pid, resource.RLIMIT_NOFILE, (128, limits[1]))
    for _ in range(300):
        context.hold(context.target.connect())


def heads_without_an_end(context: AttackContext) -> None:
    """A few hundred at once, each a byte longer from time to time."""
    connections = [context.hold(context.target.connect()) for _ in range(300)]
    for connection in connections:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    while context.other.resumed():
        for connection in connections:
            with suppress(OSError):
                connection.sendall(b"a")


def readers_that_take_nothing(context: AttackContext) -> None:
    """Event streams and live pictures, as many as are given places, and the refused ones."""
    for number in range(60):
        connection = context.hold(context.target.connect(receive_bytes=4096))
        path = "/api/v1/frames" if number % 2 else "/api/v1/cameras/dock/stream.mjpg"
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        connection.sendall(request.encode())


def large_uploads(context: AttackContext) -> None:
    """Small files of large pictures, four at once, and a body that is too large."""
    done, packed = cv2.imencode(".png", np.zeros((6000, 6000, 3), np.uint8))
    assert done
    data = packed.tobytes()
    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(lambda _number: _posted(context.target, DETECT_PATH, data), range(4)))
    assert 200 in answers
    assert answers <= {200, 503}
    assert _posted(context.target, DETECT_PATH, b"\xff\xd8\xff" + bytes(25 * 2**20)) in (_HUNG_UP, 413)


_HUNG_UP = 0


def _posted(target: Target, path: str, body: bytes) -> int:
    """The status; the module may also hang up before it has read all of the body."""
    try:
        return target.post(path, body)[0]
    except ConnectionError:
        return _HUNG_UP


def pictures_that_claim_to_be_huge(context: AttackContext) -> None:
    """30,000 x 30,000 pixels by their heads, with next to nothing behind."""
    side = 30_000
    png_head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png_data = b"IDAT" + zlib.compress(bytes(100_000))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (png_head, png_data, b"IEND")
    )
    done, packed = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))
    assert done
    small = packed.tobytes()
    at = small.index(b"\xff\xc0") + 5  # past marker, length and precision: height and width
    jpeg = small[:at] + struct.pack(">HH", side, side) + small[at + 4 :]
    while context.other.resumed():
        for picture in (png, jpeg):
            status, body = context.target.post(DETECT_PATH, picture)
            assert status == 413, body


def tensors_in_json(context: AttackContext) -> None:
    """Lists without number, nesting without end, a long text where a number stands: four at once."""
    begin = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,48,64,3],'
    bodies = (
        begin + b'"data":[' + b"[]," * 1_200_000 + b"[]]}]}",
        begin + b'"data":[' + b"[0,0,0]," * 131_000 + b"[0,0,0]]}]}",
        begin + b'"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        begin + b'"parameters":{"binary_data_size":"' + b"a://:" * 200_000 + b'"}}]}',
        begin + b'"data":[' + b"9" * 1_000_000 + b"]}]}",
    )
    with ThreadPoolExecutor(4) as pool:
        while context.other.resumed():
            answers = set(pool.map(lambda body: _posted(context.target, INFER_PATH, body), bodies))
            assert answers <= {_HUNG_UP, 400, 413, 503}
            assert answers & {400, 413}


def heads_that_are_wrong(context: AttackContext) -> None:
    """No Host, two of them, an Expect that is no text: as fast as one client can send them."""
    heads = (
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: \xff\xfe\r\n\r\n",
    )
    count = 0
    while context.other.resumed() or count < 300:
        with context.target.connect() as connection:
            reply = _send(connection, heads[count % 3])
        assert reply.split()[1] in (b"400", b"417"), reply
        count += 1


def bodies_without_an_end(context: AttackContext) -> None:
    """In chunks, to paths that want a body and to one that wants none; plain, and as gzip that swells."""
    packed = zlib.compressobj(wbits=31)
    first, again = (packed.compress(bytes(2**20)) + packed.flush(zlib.Z_SYNC_FLUSH) for _ in range(2))
    bodies = [
        EndlessBody(context, path, coding, *chunks)
        for path in (DETECT_PATH, INFER_PATH, "/healthz")
        for coding, *chunks in (("identity", b"\xff\xd8\xff", bytes(65536)), ("gzip", first, again))
    ]
    while context.other.resumed():
        for body in bodies:
            body.send_more()


class EndlessBody:
    """A request whose body has no end; begun anew whenever the module closes the connection."""

    def __init__(self, context: AttackContext, path: str, coding: str, first: bytes, again: bytes) -> None:
        self._siege = context
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Encoding: {coding}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self._first, self._again = head.encode() + _chunk(first), _chunk(again)
        self._begin()

    def _begin(self) -> None:
        self._connection = self._siege.hold(self._siege.target.connect())
        self._connection.setblocking(False)
        self._rest = self._first

    def send_more(self) -> None:
        """As much as is taken without waiting."""
        try:
            sent = self._connection.send(self._rest)
        except BlockingIOError:
            return
        except OSError:
            self._connection.close()
            self._begin()
            return
        self._rest = self._rest[sent:] or self._again


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


ATTACKS: tuple[Attack, ...] = (
    texts_that_are_slow_to_mask,
    a_thousand_silent_connections,
    silent_connections_until_descriptors_run_out,
    heads_without_an_end,
    readers_that_take_nothing,
    large_uploads,
    pictures_that_claim_to_be_huge,
    tensors_in_json,
    heads_that_are_wrong,
    bodies_without_an_end,
)


@contextmanager
def attacked(target: Target, attack: Attack) -> Iterator[OtherClient]:
    """The attack is on, and the other client has asked often enough."""
    with OtherClient(target) as other, ExitStack() as held:
        attack(AttackContext(target, other, held))
        other.wait()
        yield other


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One module for all attacks: what one leaves behind, the next one finds."""
    target = Target(tmp_path_factory.mktemp("hostile"))
    with target.module:
        target.begin()
        yield target


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_under_attack_other_clients_are_answered_and_messages_are_sent(target: Target, attack: Attack) -> None:
    """No attack costs much memory or writes a traceback."""
    with attacked(target, attack) as other:
        pass
    growth_bytes = other.rss_most_bytes - target.rss_before_bytes
    figures = f"slowest answer {other.worst_s:.2f} s, memory {growth_bytes / 2**20:+.0f} MiB"
    print(f"{attack.__name__}: {figures}")  # noqa: T201 - to be read with pytest -rP
    assert other.error is None, (other.error, target.module.log)
    assert growth_bytes < GROWTH_MOST_BYTES
    target.wait_for_new_messages()
    assert "Traceback" not in target.module.log


def test_a_module_under_attack_ends_in_time(tmp_path: Path) -> None:
    """Silent connections, streams that nobody reads and bodies without an end do not hold it up."""
    target = Target(tmp_path)
    with target.module as module:
        target.begin()
        with ExitStack() as held:
            for _ in range(50):
                held.enter_context(target.connect())
            with OtherClient(target) as other:
                readers_that_take_nothing(AttackContext(target, other, held))
                bodies_without_an_end(AttackContext(target, other, held))
            assert module.stop(15) == 0
        # HTTP itself ended the requests that were under way, and was not given up.
        assert "left behind" not in module.log
        assert "Traceback" not in module.log


def test_a_module_whose_state_files_are_all_damaged_starts_and_delivers(
    tmp_path: Path, edge_runtime: EdgeRuntime
) -> None:
    """Each is set aside as it was; the cloud is told, and gets frames."""
    damaged = {
        "spool.db": np.random.default_rng(11).bytes(40_000),
        "sequences.json": b'{"schema": "visionedge/sequences/1", "last": {"do',
        "desired.json": b'{"desired":' * 50_000,
    }
    data = tmp_path / "data"
    data.mkdir()
    for name, content in damaged.items():
        (data / name).write_bytes(content)
    TinyDetector().save(tmp_path / "tiny.onnx")
    document = {
        "cameras": {"dock": {"uri": "demo:", "fps": 5}},
        "model": {"path": str(tmp_path / "tiny.onnx")},
        "inference": {"device": "cpu", "process": False, "confidence": 0.01},
        "telemetry": {"mode": "all", "intervalSeconds": 0.2, "fillSeconds": 0},
    }
    config = tmp_path / "vision.json"
    config.write_text(json.dumps(document))
    environ = edge_runtime.environ
    with ModuleProcess(data, "--config", str(config), environ=environ) as module:
        module.ready()
        edge_runtime.wait_for(lambda got: sum(m.output == "detections" for m in got) >= 3, timeout_s=60)
        events = [m.json() for m in edge_runtime.messages if m.output == "events"]
        assert module.stop(10) == 0
    lost = {event["details"]["file"] for event in events if event["code"] == "state-lost"}
    assert lost == {"sequences.json", "desired.json"}
    assert "spool-lost" in {event["code"] for event in events}
    for name, content in damaged.items():
        assert (data / f"{name}.aside").read_bytes() == content
    assert "Traceback" not in module.log
