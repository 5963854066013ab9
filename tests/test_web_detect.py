"""POST /api/v1/detect over a real server: pictures that are taken, and all that is not."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from visionedge.web import pictures, uploads
from web_module import Client, FakeModule, error_of, grey, jpeg, talk, until


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp"])
def test_an_uploaded_picture_is_analysed_as_it_is(kind: str) -> None:
    module = FakeModule()

    async def conversation(client: Client) -> None:
        body = jpeg(grey(40, 30, 200), kind)
        async with client.post("/api/v1/detect", data=body) as answer:
            document = await answer.json()
        assert answer.status == 200, document
        assert document["source"] == "upload"
        assert "camera" not in document
        assert (document["width"], document["height"]) == (40, 30)
        assert [found["label"] for found in document["detections"]] == ["person"]
        assert abs(int(module.seen[0].mean()) - 200) < 3

    talk(module, conversation)


def test_a_picture_may_come_in_a_form() -> None:
    async def conversation(client: Client) -> None:
        form = aiohttp.FormData({"note": "hello"})
        form.add_field("file", jpeg(grey(40, 30)), filename="a.jpg", content_type="image/jpeg")
        async with client.post("/api/v1/detect", data=form) as answer:
            assert (await answer.json())["width"] == 40
        empty = aiohttp.FormData({"note": "hello"}, default_to_multipart=True)
        async with client.post("/api/v1/detect", data=empty) as answer:
            assert (await error_of(answer))[:2] == (400, "empty_body")

    talk(FakeModule(), conversation)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"hello", 415), (b"GIF89a" + bytes(50), 415), (b"\xff\xd8\xff" + bytes(50), 400)],
)
def test_a_body_that_is_no_picture_is_refused(body: bytes, status: int) -> None:
    module = FakeModule()

    async def conversation(client: Client) -> None:
        async with client.post("/api/v1/detect", data=body) as answer:
            assert (await error_of(answer))[0] == status
        assert module.seen == []

    talk(module, conversation)


def test_a_broken_form_is_refused() -> None:
    async def conversation(client: Client) -> None:
        for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
            async with client.post("/api/v1/detect", data=b"none", headers={"Content-Type": kind}) as answer:
                assert (await error_of(answer))[0] == 400

    talk(FakeModule(), conversation)


def test_a_body_above_the_limit_is_refused_whether_or_not_it_says_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "UPLOAD_LIMIT_BYTES", 1000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield bytes(100)

    async def conversation(client: Client) -> None:
        for body in (bytes(1001), pieces()):
            async with client.post("/api/v1/detect", data=body) as answer:
                assert (await error_of(answer))[:2] == (413, "too_large")
        form = aiohttp.FormData()
        form.add_field("file", bytes(5000), filename="a.jpg")
        async with client.post("/api/v1/detect", data=form) as answer:
            assert (await error_of(answer))[:2] == (413, "too_large")

    talk(FakeModule(), conversation)


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "UPLOAD_LIMIT_S", 0.05)

    async def conversation(client: Client) -> None:
        never = asyncio.Event()

        async def stuck() -> AsyncIterator[bytes]:
            yield b"\xff\xd8\xff"
            await never.wait()

        async with client.post("/api/v1/detect", data=stuck()) as answer:
            assert (await error_of(answer))[:2] == (408, "timeout")

    talk(FakeModule(), conversation)


def test_more_uploads_than_there_are_permits_are_told_to_come_again() -> None:
    module = FakeModule()

    async def conversation(client: Client) -> None:
        module.hold = asyncio.Event()

        async def upload() -> int:
            async with client.post("/api/v1/detect", data=jpeg()) as answer:
                return answer.status

        held = [asyncio.create_task(upload()) for _ in range(pictures.UPLOADS_AT_ONCE)]
        await until(lambda: len(module.seen) == pictures.UPLOADS_AT_ONCE)
        async with client.post("/api/v1/detect", data=jpeg()) as answer:
            assert (await error_of(answer))[:2] == (503, "busy")
            assert answer.headers["Retry-After"] == "1"
        module.hold.set()
        assert await asyncio.gather(*held) == [200] * pictures.UPLOADS_AT_ONCE
        assert await upload() == 200

    talk(module, conversation)


def test_a_busy_engine_says_when_to_come_again() -> None:
    module = FakeModule()
    module.busy = True

    async def conversation(client: Client) -> None:
        async with client.post("/api/v1/detect", data=jpeg()) as answer:
            assert (await error_of(answer))[:2] == (503, "busy")
            assert answer.headers["Retry-After"] == "7"

    talk(module, conversation)


def test_a_real_photo_is_taken_up_to_the_detector(shared_data: Path) -> None:
    module = FakeModule()

    async def conversation(client: Client) -> None:
        for name, shape in (("photos/darknet_dog.jpg", (576, 768)), ("photos/coffee.png", (400, 600))):
            async with client.post("/api/v1/detect", data=(shared_data / name).read_bytes()) as answer:
                document = json.loads(await answer.read())
            assert (document["height"], document["width"]) == shape

    talk(module, conversation)
