"""POST /api/v1/detect over a real server: pictures that are taken, and all that is not."""

import asyncio
import gzip
import json
import struct
import zlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from fake_backend import Client, FakeBackend, error_of, grey, jpeg, run_scenario, until
from visionedge.errors import BusyError
from visionedge.runtime.limits import MemoryBudget
from visionedge.web import request_body


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp"])
def test_an_uploaded_picture_is_analysed_unchanged(kind: str) -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        body = jpeg(grey(40, 30, 200), kind)
        async with client.post("/api/v1/detect", data=body) as answer:
            document = await answer.json()
        assert answer.status == 200, document
        assert document["source"] == "upload"
        assert "camera" not in document
        assert (document["width"], document["height"]) == (40, 30)
        assert [found["label"] for found in document["detections"]] == ["person"]
        assert abs(int(module.seen[0].mean()) - 200) < 3

    run_scenario(module, scenario)


def test_a_picture_is_analysed_by_the_model_that_is_asked_for() -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        async with client.post("/api/v1/detect?model=nano", data=jpeg(grey(40, 30))) as answer:
            assert answer.status == 200
        async with client.post("/api/v1/detect?model=mega", data=jpeg(grey(40, 30))) as answer:
            status, _, text = await error_of(answer)
        assert (status, text) == (404, "no model is called 'mega'")

    run_scenario(module, scenario)


def test_a_picture_may_come_in_a_form() -> None:
    async def scenario(client: Client) -> None:
        form = aiohttp.FormData({"note": "hello"})
        form.add_field("file", jpeg(grey(40, 30)), filename="a.jpg", content_type="image/jpeg")
        async with client.post("/api/v1/detect", data=form) as answer:
            assert (await answer.json())["width"] == 40
        empty = aiohttp.FormData({"note": "hello"}, default_to_multipart=True)
        async with client.post("/api/v1/detect", data=empty) as answer:
            assert (await error_of(answer))[:2] == (400, "empty_body")

    run_scenario(FakeBackend(), scenario)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"hello", 415), (b"GIF89a" + bytes(50), 415), (b"\xff\xd8\xff" + bytes(50), 400)],
)
def test_a_body_that_is_not_a_picture_is_refused(body: bytes, status: int) -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        async with client.post("/api/v1/detect", data=body) as answer:
            assert (await error_of(answer))[0] == status
        assert module.seen == []

    run_scenario(module, scenario)


def test_a_broken_form_is_refused() -> None:
    async def scenario(client: Client) -> None:
        for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
            async with client.post("/api/v1/detect", data=b"none", headers={"Content-Type": kind}) as answer:
                assert (await error_of(answer))[0] == 400

    run_scenario(FakeBackend(), scenario)


def test_a_body_above_the_limit_is_refused_with_or_without_a_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_body, "UPLOAD_LIMIT_BYTES", 1000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield bytes(100)

    async def scenario(client: Client) -> None:
        for body in (bytes(1001), pieces()):
            async with client.post("/api/v1/detect", data=body) as answer:
                assert (await error_of(answer))[:2] == (413, "too_large")
        form = aiohttp.FormData()
        form.add_field("file", bytes(5000), filename="a.jpg")
        async with client.post("/api/v1/detect", data=form) as answer:
            assert (await error_of(answer))[:2] == (413, "too_large")

    run_scenario(FakeBackend(), scenario)


def test_a_body_that_does_not_arrive_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "UPLOAD_LIMIT_S", 0.05)

    async def scenario(client: Client) -> None:
        never = asyncio.Event()

        async def stuck() -> AsyncIterator[bytes]:
            yield b"\xff\xd8\xff"
            await never.wait()

        async with client.post("/api/v1/detect", data=stuck()) as answer:
            assert (await error_of(answer))[:2] == (408, "timeout")

    run_scenario(FakeBackend(), scenario)


def test_uploads_beyond_the_permits_get_retry_after() -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        module.hold = asyncio.Event()

        async def upload() -> int:
            async with client.post("/api/v1/detect", data=jpeg()) as answer:
                return answer.status

        held = [asyncio.create_task(upload()) for _ in range(request_body.UPLOADS_AT_ONCE)]
        await until(lambda: len(module.seen) == request_body.UPLOADS_AT_ONCE)
        async with client.post("/api/v1/detect", data=jpeg()) as answer:
            assert (await error_of(answer))[:2] == (503, "busy")
            assert answer.headers["Retry-After"] == "1"
        module.hold.set()
        assert await asyncio.gather(*held) == [200] * request_body.UPLOADS_AT_ONCE
        assert await upload() == 200

    run_scenario(module, scenario)


def test_a_busy_engine_sends_retry_after() -> None:
    module = FakeBackend()
    module.busy = True

    async def scenario(client: Client) -> None:
        async with client.post("/api/v1/detect", data=jpeg()) as answer:
            assert (await error_of(answer))[:2] == (503, "busy")
            assert answer.headers["Retry-After"] == "7"

    run_scenario(module, scenario)


def test_a_real_photo_reaches_the_detector(shared_data: Path) -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        for name, shape in (("photos/darknet_dog.jpg", (576, 768)), ("photos/coffee.png", (400, 600))):
            async with client.post("/api/v1/detect", data=(shared_data / name).read_bytes()) as answer:
                document = json.loads(await answer.read())
            assert (document["height"], document["width"]) == shape

    run_scenario(module, scenario)


def png_of(width_px: int, height_px: int, *more: bytes) -> bytes:
    """A PNG whose header has this size, with further chunks, and its end."""
    head = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), *((chunk[:4], chunk[4:]) for chunk in more), (b"IDAT", b""), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        async with client.post("/api/v1/detect", data=png_of(10_000, 10_000)) as answer:
            status, code, message = await error_of(answer)
        assert (status, code) == (413, "too_large")
        assert "40 megapixels" in message
        async with client.post("/api/v1/detect", data=png_of(8_000, 5_000)) as answer:
            assert (await error_of(answer))[1] == "bad_picture", "of this size it would be taken"
        assert module.seen == []

    run_scenario(module, scenario)


def test_pictures_that_need_too_much_memory_together_are_decoded_in_turn() -> None:
    async def scenario() -> None:
        budget = MemoryBudget(100, 10.0, "too large")
        order: list[str] = []

        async def take(name: str, size_bytes: int, until_set: asyncio.Event) -> None:
            async with budget.hold(size_bytes):
                order.append(name)
                await until_set.wait()

        first_ends, ends = asyncio.Event(), asyncio.Event()
        ends.set()
        first = asyncio.create_task(take("first", 60, first_ends))
        await until(lambda: order == ["first"])
        second = asyncio.create_task(take("second", 1_000, ends))
        third = asyncio.create_task(take("third", 40, ends))
        await third
        first_ends.set()
        await asyncio.gather(first, second)
        assert order == ["first", "third", "second"]
        assert budget.taken_bytes == 0

    asyncio.run(scenario())


def test_a_picture_that_gets_no_memory_in_time_gets_retry_after() -> None:
    async def scenario() -> None:
        budget = MemoryBudget(100, 0.01, "too many large pictures")
        async with budget.hold(100):
            with pytest.raises(BusyError, match="too many large"):
                async with budget.hold(1):
                    pass
        assert repr(budget) == "<MemoryBudget taken_bytes=0 waiting=0>"

    asyncio.run(scenario())


def test_a_permit_is_released_at_the_end_of_the_work_and_not_when_its_client_leaves() -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        module.hold = asyncio.Event()
        for number in range(1, request_body.UPLOADS_AT_ONCE + 1):
            gone = asyncio.create_task(client.post("/api/v1/detect", data=jpeg()))
            await until(partial(lambda wanted: len(module.seen) == wanted, number))
            gone.cancel()
            await asyncio.wait([gone])
        for _ in range(40):
            async with client.post("/api/v1/detect", data=jpeg()) as answer:
                assert (await error_of(answer))[:2] == (503, "busy")
        assert len(module.seen) == request_body.UPLOADS_AT_ONCE
        module.hold.set()

        async def answered() -> int:
            async with client.post("/api/v1/detect", data=jpeg()) as answer:
                return answer.status

        async with asyncio.timeout(5):
            while await answered() != 200:
                pass

    run_scenario(module, scenario)


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("gzip", gzip.compress(jpeg(), mtime=0), 200),
        ("x-gzip", gzip.compress(jpeg(), mtime=0), 200),
        ("deflate", zlib.compress(jpeg()), 200),
        ("deflate", zlib.compress(jpeg(), wbits=-15), 200),
        ("identity", jpeg(), 200),
        ("gzip", jpeg(), 400),
        ("deflate", jpeg(), 400),
        ("gzip", gzip.compress(jpeg(), mtime=0)[:-9], 400),
        ("gzip", b"", 400),
        ("gzip", gzip.compress(b"", mtime=0), 400),
        ("br", jpeg(), 415),
        ("zstd", jpeg(), 415),
        ("gzip, gzip", gzip.compress(jpeg(), mtime=0), 415),
        ("x" * 3000, jpeg(), 415),
        ("gzip", gzip.compress(bytes(2**26), 1, mtime=0), 413),
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/detect", "/v2/models/nano/infer"])
def test_a_body_is_decompressed_or_refused_in_the_format_of_its_path(
    path: str, coding: str, body: bytes, status: int
) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(path, data=body, headers={"Content-Encoding": coding}) as answer:
            if path.startswith("/v2"):
                # Unpacked, it is no inference request.
                assert answer.status == (400 if status == 200 else status)
                assert isinstance((await answer.json())["error"], str)
            elif status == 200:
                assert answer.status == 200
            else:
                assert (await error_of(answer))[0] == status

    run_scenario(FakeBackend(), scenario)


def test_a_compressed_form_and_a_form_with_a_broken_head_are_refused() -> None:
    heads = (
        b"Content",
        b"\x00\xff nonsense\r\n\r\nabc",
        b"Content-Disposition: " + b"a" * 30_000 + b"\r\n\r\nabc",
        b"Content-Type: multipart/mixed\r\n\r\nabc",
        b"".join(b"a%d: b\r\n" % number for number in range(5000)) + b"\r\nabc",
    )

    async def scenario(client: Client) -> None:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        for head in heads:
            body = b"--x\r\n" + head + b"\r\n--x--\r\n"
            async with client.post("/api/v1/detect", data=body, headers=headers) as answer:
                assert (await error_of(answer))[0] == 400
        headers["Content-Encoding"] = "gzip"
        packed = gzip.compress(b"--x--\r\n")
        async with client.post("/api/v1/detect", data=packed, headers=headers) as answer:
            assert (await error_of(answer))[0] == 415

    run_scenario(FakeBackend(), scenario)


def test_the_metadata_of_an_uploaded_picture_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """libpng quotes the profile's name on stderr where the profile is broken."""
    packed = jpeg(grey(8, 8), ".png")
    profile = b"iCCPwords of an uploader\x00\x00broken"
    chunk = struct.pack(">I", len(profile) - 4) + profile + struct.pack(">I", zlib.crc32(profile))
    remarked = packed[:33] + chunk + packed[33:]
    assert request_body.strip_png_metadata(remarked) == request_body.strip_png_metadata(packed)
    picture = request_body.decode_upload(remarked)
    assert picture.shape == (8, 8, 3)
    assert "uploader" not in capfd.readouterr().err
