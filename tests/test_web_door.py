"""The door in front of the application: the same answers as behind it, and whatever is unusual goes on."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from visionedge.config import HttpConfig
from visionedge.web.answers import Lock
from visionedge.web.api import Api
from visionedge.web.door import Door, question
from visionedge.web.server import Server
from web_module import FakeModule, result, until

TOKEN = "bait-token-of-the-door"
PATH = "/api/v1/cameras/dock/frame"


class Line:
    """One connection to the server, byte by byte."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self._reader = reader
        self._writer = writer

    @property
    def visitors(self) -> int:
        """How many connections are still at the door."""
        return int(repr(self.server).partition("visitors=")[2].rstrip(">"))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers by their lower-case names, body."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        return (
            int(head[0].split()[1]),
            headers,
            await self._reader.readexactly(int(headers["content-length"])),
        )

    async def end(self) -> bytes:
        """What comes until the server hangs up."""
        return await self._reader.read()

    def close(self) -> None:
        self._writer.close()


def asks(path: str = PATH, *headers: str, method: str = "GET") -> bytes:
    """A request as it goes over the line."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


@asynccontextmanager
async def line_to(server: Server) -> AsyncIterator[Line]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    line = Line(server, reader, writer)
    try:
        yield line
    finally:
        line.close()


def at_the_door(
    module: FakeModule, conversation: Callable[[Line], Awaitable[None]], *, token: str | None = None
) -> None:
    async def whole() -> None:
        server = await Server.start(module, HttpConfig(port=0, token=token))
        try:
            async with asyncio.timeout(20), line_to(server) as line:
                await conversation(line)
        finally:
            await server.close()

    asyncio.run(whole())


def module_with_a_frame() -> FakeModule:
    module = FakeModule("dock", "yard")
    module.board.publish(result("dock", 7))
    return module


@pytest.mark.parametrize("path", [PATH, "/api/v1/cameras/yard/frame", "/api/v1/cameras/attic/frame"])
def test_the_door_answers_as_the_application_does(path: str) -> None:
    """A frame, none yet, and no such camera: to the header, once by the one and once by the other."""

    async def conversation(line: Line) -> None:
        await line.send(asks(path))
        by_the_door = await line.answer()
        assert line.visitors == 1
        await line.send(asks(f"{path}?"))
        behind_it = await line.answer()
        assert line.visitors == 0
        for _, headers, _ in (by_the_door, behind_it):
            assert headers.pop("date").endswith("gmt")
        assert by_the_door == behind_it

    at_the_door(module_with_a_frame(), conversation)


def test_a_newer_frame_is_answered_with_itself() -> None:
    module = module_with_a_frame()

    async def conversation(line: Line) -> None:
        for sequence in (7, 7, 8):
            module.board.publish(result("dock", sequence))
            await line.send(asks())
            _, headers, body = await line.answer()
            assert headers["x-visionedge-sequence"] == str(sequence)
            assert f'"sequence":{sequence},'.encode() in body
        assert line.visitors == 1

    at_the_door(module, conversation)


def test_a_camera_that_was_removed_is_not_answered_from_memory() -> None:
    module = module_with_a_frame()

    async def conversation(line: Line) -> None:
        await line.send(asks())
        assert (await line.answer())[0] == 200
        module.remove("dock")
        await line.send(asks())
        assert (await line.answer())[0] == 404

    at_the_door(module, conversation)


def test_a_head_that_comes_in_pieces_is_for_the_application() -> None:
    async def conversation(line: Line) -> None:
        head = asks()
        await line.send(head[:30])
        await until(lambda: line.visitors == 0)
        await line.send(head[30:])
        assert (await line.answer())[0] == 200

    at_the_door(module_with_a_frame(), conversation)


def test_requests_that_come_at_once_are_answered_in_order() -> None:
    async def conversation(line: Line) -> None:
        await line.send(asks() + asks("/healthz") + asks("/api/v1/cameras/attic/frame"))
        assert [(await line.answer())[0] for _ in range(3)] == [200, 200, 404]

    at_the_door(module_with_a_frame(), conversation)


def test_a_connection_that_is_to_be_closed_is_closed() -> None:
    async def conversation(line: Line) -> None:
        await line.send(asks(PATH, "Connection: close"))
        assert b"200 OK" in await line.end()

    at_the_door(module_with_a_frame(), conversation)


def test_with_a_token_only_who_shows_it_is_answered_and_each_time_anew() -> None:
    async def conversation(line: Line) -> None:
        shown = f"Authorization: Bearer {TOKEN}"
        for headers, status, visitors in (
            ((shown,), 200, 1),
            ((shown,), 200, 1),
            ((), 401, 0),
            ((shown,), 200, 0),
            ((f"{shown}x",), 401, 0),
        ):
            await line.send(asks(PATH, *headers))
            assert (await line.answer())[0] == status
            assert line.visitors == visitors

    at_the_door(module_with_a_frame(), conversation, token=TOKEN)


class FullTransport(asyncio.Transport):
    """A transport whose other end takes nothing."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def test_who_takes_no_answers_is_heard_no_more_until_he_does() -> None:
    with socket.socket() as sock:
        transport = FullTransport(sock)
        visitor = Door(Api(FakeModule("dock")), Lock(None), asyncio.Protocol)()
        visitor.connection_made(transport)
        visitor.pause_writing()
        assert not transport.reading
        visitor.resume_writing()
        assert transport.reading


def test_the_end_of_the_server_ends_those_at_the_door() -> None:
    async def conversation(line: Line) -> None:
        await line.send(asks())
        await line.answer()
        await line.server.close()
        assert await line.end() == b""

    at_the_door(module_with_a_frame(), conversation)


@pytest.mark.parametrize(
    "head",
    [
        asks(method="POST"),
        asks(method="HEAD"),
        asks("/api/v1/cameras/dock/frame?after=3"),
        asks("/api/v1/cameras/Dock/frame"),
        asks("/api/v1/cameras/dock/frame/"),
        asks(PATH, "Content-Length: 3") + b"abc",
        asks(PATH, "Content-Length: 0"),
        asks(PATH, "Transfer-Encoding: chunked"),
        asks(PATH, "Expect: 100-continue"),
        asks(PATH, "Upgrade: h2c"),
        asks(PATH, "Connection: upgrade"),
        asks(PATH, "A header without a colon"),
        asks(PATH, "A: folded", " over two lines"),
        asks(PATH, "A: \x00"),
        asks(PATH, "A: \xfc"),
        asks(PATH, f"A: {'x' * 5000}"),
        asks().replace(b"HTTP/1.1", b"HTTP/1.0"),
        asks().replace(b"\r\n", b"\n"),
        asks()[:-2],
        asks() + b"G",
        b"",
    ],
)
def test_whatever_is_unusual_is_for_the_application(head: bytes) -> None:
    assert question(head, None) is None


@pytest.mark.parametrize(
    "headers", [(), ("Connection: keep-alive",), ("ACCEPT: */*", "User-Agent: a/1.0 (b; c)", "X-Empty:")]
)
def test_a_plain_question_is_understood(headers: tuple[str, ...]) -> None:
    assert question(asks(PATH, *headers), None) == "dock"


@pytest.mark.parametrize(
    ("headers", "camera"),
    [
        ((f"Authorization: Bearer {TOKEN}",), "dock"),
        ((f"authorization: bearer {TOKEN}",), "dock"),
        ((), None),
        ((f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}"), None),
        ((f"Authorization: Basic {TOKEN}",), None),
        ((f"Authorization: Bearer {TOKEN[:-1]}",), None),
    ],
)
def test_a_question_counts_only_with_the_token(headers: tuple[str, ...], camera: str | None) -> None:
    assert question(asks(PATH, *headers), TOKEN.encode()) == camera
