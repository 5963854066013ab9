"""Connections: their number and duration, and answers to malformed requests."""

import asyncio
import json
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest

from fake_backend import FakeBackend, result, until
from visionedge.config.schema import HttpConfig
from visionedge.runtime.logs import LogLimiter
from visionedge.web import connections
from visionedge.web.server import HttpServer

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

FRAME = "/api/v1/cameras/dock/frame"


def asks(path: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    """A request as it goes over the line."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """The next answer: status, headers by their lower-case names, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    headers = {name.lower(): value for name, value in headers.items()}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


@asynccontextmanager
async def connected(server: HttpServer, host: str = "127.0.0.1") -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection(host, server.port)
    try:
        yield reader, writer
    finally:
        writer.close()


def serve(
    scenario: Callable[[HttpServer, FakeBackend], Awaitable[None]], http: HttpConfig | None = None
) -> None:
    """A real server over a module with one frame, and its events."""

    async def whole() -> None:
        module = FakeBackend("dock", "yard")
        module.latest_results.publish(result("dock", 7))
        server = await HttpServer.start(module, http or HttpConfig(port=0))
        try:
            async with asyncio.timeout(20):
                await scenario(server, module)
        finally:
            await server.close()

    asyncio.run(whole())


async def ended(reader: asyncio.StreamReader) -> None:
    """Wait until the server has hung up; it sends nothing before."""
    with suppress(ConnectionResetError):
        assert await reader.read() == b""


async def is_alive(stream: Stream) -> bool:
    """Whether a connection still answers."""
    reader, writer = stream
    writer.write(asks("/healthz"))
    try:
        return (await answer(reader))[0] == 200
    except (asyncio.IncompleteReadError, ConnectionError):
        return False


# --- time limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beginning", [b"", b"GET /healthz HTTP/1.1\r\nHo"])
def test_a_client_with_an_incomplete_head_is_disconnected(
    beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.02)
    monkeypatch.setattr(connections, "SWEEP_S", 0.01)

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            writer.write(beginning)
            await ended(reader)

    serve(scenario)


def test_a_head_that_begins_on_a_kept_connection_has_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SWEEP_S", 0.01)

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as stream:
            assert await is_alive(stream)
            monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.02)
            stream[1].write(b"GET /heal")
            await ended(stream[0])

    serve(scenario)


def test_an_idle_kept_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_LIMIT_S", 0.02)
    monkeypatch.setattr(connections, "SWEEP_S", 0.01)

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as stream:
            assert await is_alive(stream)
            await ended(stream[0])

    serve(scenario)


def test_a_client_that_waits_for_an_answer_is_not_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_LIMIT_S", "IDLE_LIMIT_S", "SWEEP_S"):
        monkeypatch.setattr(connections, name, 0.01)

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            writer.write(asks(f"{FRAME}?after=7&timeout=0.1"))
            assert b" 204 " in await reader.readuntil(b"\r\n\r\n")

    serve(scenario)


def test_a_client_that_does_not_read_its_answers_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep them in memory, and its place."""
    monkeypatch.setattr(connections, "IDLE_LIMIT_S", 0.05)
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.05)
    monkeypatch.setattr(connections, "SWEEP_S", 0.01)

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", server.port))
            with suppress(ConnectionError):
                await loop.sock_sendall(client, asks("/openapi.json") * 2_000)
            await until(lambda: "connections=0" in repr(server))

    serve(scenario)


# --- how many -----------------------------------------------------------------------------------------------


def test_if_all_places_are_taken_the_longest_idle_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS_AT_ONCE", 3)

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as first, connected(server) as second, connected(server) as third:
            await until(lambda: "connections=3" in repr(server))
            assert await is_alive(first), "now the second has waited longest"
            async with connected(server) as fourth:
                assert await is_alive(fourth)
                assert not await is_alive(second)
                assert await is_alive(first)
                assert await is_alive(third)

    serve(scenario)


def test_a_stream_keeps_its_place_however_many_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS_AT_ONCE", 4)

    async def scenario(server: HttpServer, module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            writer.write(asks("/api/v1/frames"))
            await reader.readuntil(b"frame objects follow\n\n")
            for _ in range(20):
                async with connected(server) as visitor:
                    assert await is_alive(visitor)
            module.latest_results.publish(result("dock", 8))
            assert b'"sequence":8' in await reader.readuntil(b"\n\n")

    serve(scenario)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """No more than so many further descriptors can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        lowest = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, lowest + count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_server_still_answers_with_more_connections_than_descriptors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stream continues. The clients, in this process, get their descriptors before the limit is lowered."""

    async def scenario(server: HttpServer, module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            writer.write(asks("/api/v1/frames"))
            await reader.readuntil(b"frame objects follow\n\n")
            with opened_sockets(200) as clients, descriptors_left(20):
                for sequence, client in enumerate(clients, start=8):
                    with suppress(BlockingIOError):
                        client.connect(("127.0.0.1", server.port))
                    module.latest_results.publish(result("dock", sequence))
                    assert f'"sequence":{sequence},'.encode() in await reader.readuntil(b"\n\n")
            async with connected(server) as late:
                assert await is_alive(late)

    with caplog.at_level(logging.WARNING):
        serve(scenario)
    assert not [record for record in caplog.records if record.exc_info]
    assert len(caplog.records) <= 3


@contextmanager
def opened_sockets(count: int) -> Iterator[list[socket.socket]]:
    opened = [socket.socket() for _ in range(count)]
    for each in opened:
        each.setblocking(False)
    try:
        yield opened
    finally:
        for each in opened:
            each.close()


def test_a_burst_of_connections_waits_in_the_system_backlog() -> None:
    """They connect while the loop is busy; with a full queue they would wait for a second and more."""

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        with opened_sockets(300) as clients:
            for client in clients:
                client.settimeout(10)
                client.connect(("127.0.0.1", server.port))
            async with connected(server) as late:
                assert await is_alive(late)

    serve(scenario)


# --- addresses ----------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::", "[::]"])
def test_all_ipv6_addresses_include_ipv4(host: str) -> None:
    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        assert server.url == f"http://[::1]:{server.port}/"
        for address in ("127.0.0.1", "::1"):
            async with connected(server, address) as stream:
                assert await is_alive(stream)

    serve(scenario, HttpConfig(host=host, port=0))


@pytest.mark.parametrize(
    ("host", "access", "warns"),
    [
        ("0.0.0.0", {"allowAnonymous": True}, True),
        ("0.0.0.0", {"allowAnonymous": True, "token": "secret-token"}, False),
        ("127.0.0.2", {"allowAnonymous": True}, False),
    ],
)
def test_an_open_module_warns_once_with_the_remedy(
    host: str, access: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(_server: HttpServer, _module: FakeBackend) -> None:
        return

    serve(scenario, HttpConfig(host=host, port=0, **access))
    warnings = [record.getMessage() for record in caplog.records if "without a token" in record.getMessage()]
    assert len(warnings) == warns
    assert all(host in text and "http.token" in text for text in warnings)


# --- what is no request -------------------------------------------------------------------------------------

LONG = b"a://:" * 4_000
CHUNKED = "Transfer-Encoding: chunked"
MALFORMED = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    "bytes": (b"\x00\xff\x00\xff\r\n\r\n", 400),
    "no method": (b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a long method": (LONG + b" / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a blank in the path": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
    "a blank before the colon": (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "two lengths": (asks("/", "Content-Length: 3", "Content-Length: 4"), 400),
    "a length that is none": (asks("/", "Content-Length: -3"), 400),
    "a length and chunks": (asks("/", "Content-Length: 3", CHUNKED), 400),
    "a bad chunk": (asks("/api/v1/detect", CHUNKED, method="POST", body=b"zz\r\nabc\r\n"), 400),
    "an unknown version": (b"GET / HTTP/9.1\r\nHost: x\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a long header": (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + LONG + b"\r\n\r\n", 431),
    "a long path": (b"GET /" + LONG + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    "many headers": (asks("/", *[f"X-{number}: 1" for number in range(300)]), 431),
    "an impossible address": (b"GET http://[::1/x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "an unknown Expect": (asks("/api/v1/detect", "Expect: 200-ok", "Content-Length: 0", method="POST"), 417),
    "an Expect that is no text": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: \xff\xfe\r\n\r\n", 417),
}


@pytest.mark.parametrize("sent", MALFORMED)
def test_a_malformed_request_gets_an_error_document_and_one_log_line(
    sent: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Sent five times, it costs one line of the log, without any of the client's bytes."""
    data, status = MALFORMED[sent]

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        for _ in range(5):
            async with connected(server) as (reader, writer):
                writer.write(data)
                found, headers, body = await answer(reader)
                assert found == status
                assert headers["content-type"].startswith("application/json")
                assert headers["cross-origin-resource-policy"] == "same-origin"
                assert set(json.loads(body)["error"]) == {"code", "message"}
                assert len(body) < 300
                assert await reader.read() == b""

    with caplog.at_level(logging.DEBUG):
        serve(scenario)
    lines = [record for record in caplog.records if record.name != "asyncio"]
    assert len(lines) <= 1
    assert not any(record.exc_info or len(record.getMessage()) > 200 for record in lines)
    assert not any("a://" in record.getMessage() for record in lines)


def test_the_log_line_about_malformed_requests_has_their_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 100.0
    limiter = LogLimiter(logging.getLogger("some"), 10.0, lambda: now_s)
    for _ in range(5):
        limiter.warning("a client sent nonsense")
    now_s = 110.0
    limiter.warning("a client sent nonsense")
    assert [record.getMessage() for record in caplog.records] == [
        "a client sent nonsense",
        "a client sent nonsense (4 more such lines were suppressed)",
    ]


def test_a_malformed_request_of_the_inference_protocol_is_answered_in_its_shape() -> None:
    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            writer.write(asks("/v2/models/nano/infer", "Host: again", method="POST"))
            status, _, body = await answer(reader)
            assert (status, type(json.loads(body)["error"])) == (400, str)

    serve(scenario)


def test_a_wrong_later_chunk_ends_the_request_at_once() -> None:
    """The handler waits for the body then, and would until its time is up."""

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        for path in ("/v2/models/nano/infer", "/api/v1/detect"):
            async with connected(server) as (reader, writer):
                writer.write(asks(path, CHUNKED, method="POST", body=b"3\r\nabc\r\n"))
                await writer.drain()
                await until(lambda: "connections=1" in repr(server))
                writer.write(b"zz\r\n")
                status, _, body = await answer(reader)
                assert status == 400
                assert "malformed" in str(json.loads(body)["error"])
                assert await reader.read() == b""
            await until(lambda: "connections=0" in repr(server))

    serve(scenario)


# --- the plain handler of the newest frame ------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order() -> None:
    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            writer.write(asks(FRAME) + asks("/healthz") + asks("/api/v1/cameras/attic/frame"))
            assert [(await answer(reader))[0] for _ in range(3)] == [200, 200, 404]

    serve(scenario)


def test_the_newest_frame_is_answered_and_a_removed_camera_is_not() -> None:
    async def scenario(server: HttpServer, module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            for sequence in (7, 7, 8):
                module.latest_results.publish(result("dock", sequence))
                writer.write(asks(FRAME))
                _, headers, body = await answer(reader)
                assert headers["x-visionedge-sequence"] == str(sequence)
                assert f'"sequence":{sequence},'.encode() in body
            module.remove("dock")
            writer.write(asks(FRAME))
            assert (await answer(reader))[0] == 404

    serve(scenario)


def test_a_request_to_close_the_connection_is_followed() -> None:
    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        async with connected(server) as (reader, writer):
            writer.write(asks(FRAME, "Connection: close"))
            assert b"200 OK" in await reader.read()

    serve(scenario)


# --- twice the text takes twice the time --------------------------------------------------------------------

MALICIOUS = ("a://:", "a://b:c@", "a.a.", "key-", "Bearer a ", "[[", "\\u0000", "é")


def malicious_requests(size: int, piece: str) -> list[bytes]:
    """Such a text at every possible place of a request; heads are limited to 8 KiB."""
    body = (piece * size)[: size * 10].encode("utf-8", "replace")
    word = (piece * size)[: min(size, 3_500)].replace(" ", "_")
    quoted = json.dumps(body.decode())
    infer = f'{{"inputs":[{{"name":"images","datatype":"UINT8","shape":[1,8,16,3],"data":{quoted}}}]}}'
    sized = infer.replace('"data":', '"parameters":{"binary_data_size":').replace("}]}", "}}]}")
    posts = [("/v2/models/nano/infer", each.encode()) for each in (infer, sized, quoted)]
    posts.append(("/api/v1/detect", body))
    form = b"--x\r\nContent-Disposition: form-data; " + body + b"\r\n\r\nabc\r\n--x--\r\n"
    return [
        body + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
        asks(f"/{word}"),
        asks(f"/api/v1/cameras/{word}/frame"),
        asks(f"/api/v1/frames?camera={word}"),
        asks(f"{FRAME}?after={word}&timeout={word}"),
        asks(f"/v2/models/{word}/versions/{word}"),
        asks(f"/v2/models/{word}", method=word[:500]),
        asks("/healthz", f"Expect: {word}"),
        asks("/api/v1/detect", f"Origin: {word}", f"Sec-Fetch-Site: {word}", method="POST"),
        asks("/api/v1/status", f"Authorization: {word}").replace(b"127.0.0.1", word.encode("latin-1"), 1),
        asks("/api/v1/detect", f"Content-Encoding: {word}", "Content-Length: 1", method="POST", body=b"a"),
        asks(
            "/api/v1/detect",
            "Content-Type: multipart/form-data; boundary=x",
            f"Content-Length: {len(form)}",
            method="POST",
            body=form,
        ),
        *[asks(path, f"Content-Length: {len(data)}", method="POST", body=data) for path, data in posts],
    ]


async def time_of(server: HttpServer, requests: list[bytes]) -> list[float]:
    """Processor time of this process (client and server) for each request."""
    took = []
    for data in requests:
        began_s = time.process_time()
        async with connected(server) as (reader, writer):
            writer.write(data)
            await reader.readuntil(b"\r\n\r\n")
        took.append(time.process_time() - began_s)
    return took


@pytest.mark.parametrize("piece", MALICIOUS)
def test_parsing_time_grows_linearly_with_the_request(piece: str) -> None:
    """Through every answer and the log. A quadratic step anywhere would take seconds for these texts."""
    size = 20_000
    noise_s = 0.02

    async def scenario(server: HttpServer, _module: FakeBackend) -> None:
        short, long = malicious_requests(size, piece), malicious_requests(2 * size, piece)
        rounds = [(await time_of(server, short), await time_of(server, long)) for _ in range(3)]
        once = [min(times) for times in zip(*[pair[0] for pair in rounds], strict=True)]
        twice = [min(times) for times in zip(*[pair[1] for pair in rounds], strict=True)]
        ratios = [(two + noise_s) / (one + noise_s) for one, two in zip(once, twice, strict=True)]
        assert max(ratios) < 3.5, ratios

    serve(scenario)
