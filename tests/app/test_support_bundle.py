"""The support bundle by direct method: chunks that fit, kept for ten minutes, made at most once a minute."""

import asyncio
import base64
import hashlib
import json
import random
from typing import Any

import pytest

from visionedge.app import support_bundle
from visionedge.app.support_bundle import CHUNK_BYTES, MAX_BUNDLE_BYTES, SupportBundle
from visionedge.errors import BusyError
from visionedge.iothub.direct_methods import (
    MAX_RESULT_BYTES,
    DirectMethod,
    MethodDispatcher,
    MethodError,
    MethodResult,
)


class Maker:
    """Makes zips of a size; each is another one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.made: list[bytes] = []
        self.released: asyncio.Event | None = None

    async def __call__(self) -> bytes:
        if self.released is not None:
            await self.released.wait()
        noise = random.Random(len(self.made))  # noqa: S311 - content of a zip
        self.made.append(noise.randbytes(self.size))
        return self.made[-1]


class Calls:
    """The method behind its dispatcher, and a clock."""

    def __init__(self, size: int = 200_000) -> None:
        self.now_s = 0.0
        self.maker = Maker(size)
        bundle = SupportBundle(self.maker, lambda: self.now_s)
        method = DirectMethod(bundle.answer, 4.5, {"id": str, "chunk": int})
        self._dispatcher = MethodDispatcher({"bundle": method})

    async def __call__(self, payload: Any = None) -> MethodResult:
        return await self._dispatcher.answer("bundle", payload)


def code(answer: MethodResult) -> tuple[int, str]:
    """Status and code of an error."""
    return answer.status, answer.document["error"]["code"]


@pytest.mark.parametrize(
    "size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, MAX_BUNDLE_BYTES]
)
def test_the_chunks_give_the_zip_and_each_answer_fits(size: int) -> None:
    async def scenario() -> None:
        call = Calls(size)
        first = (await call()).document
        answers = [first]
        answers += [
            (await call({"id": first["id"], "chunk": number})).document
            for number in range(1, first["chunks"])
        ]
        data = b"".join(base64.b64decode(answer["data"]) for answer in answers)
        assert [data] == call.maker.made
        assert (first["bytes"], first["sha256"]) == (size, hashlib.sha256(data).hexdigest())
        assert [answer["chunk"] for answer in answers] == list(range(first["chunks"]))
        assert all(len(json.dumps(answer)) <= MAX_RESULT_BYTES for answer in answers)
        assert (await call({"id": first["id"], "chunk": 0})).document == first

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"id": "0" * 16, "chunk": 0}, (410, "gone")),
        ({"id": "", "chunk": 0}, (410, "gone")),
        ({"chunk": 1}, (400, "bad_payload")),
        ({"chunk": -1}, (400, "bad_payload")),
        ({"chunk": True}, (400, "bad_payload")),
        ({"chunk": "1"}, (400, "bad_payload")),
        ({"chunk": 1.5}, (400, "bad_payload")),
        ({"id": 7}, (400, "bad_payload")),
        ({"number": 7}, (400, "bad_payload")),
        ([], (400, "bad_payload")),
    ],
)
def test_a_wrong_call_gets_its_error(payload: Any, expected: tuple[int, str]) -> None:
    async def scenario() -> None:
        call = Calls()
        await call()
        assert code(await call(payload)) == expected

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [-1, 3, 10**30])
def test_a_chunk_that_does_not_exist_is_404(number: int) -> None:
    async def scenario() -> None:
        call = Calls(200_000)
        first = (await call()).document
        answer = await call({"id": first["id"], "chunk": number})
        assert code(answer) == (404, "unknown_chunk")
        assert answer.document["error"]["message"] == "chunks 0 to 2 exist"

    asyncio.run(scenario())


def test_a_bundle_is_kept_for_ten_minutes_and_made_at_most_once_a_minute() -> None:
    async def scenario() -> None:
        call = Calls()
        first = (await call()).document["id"]
        call.now_s = 59
        assert (await call()).document["id"] == first
        assert len(call.maker.made) == 1
        call.now_s = 599
        assert (await call({"id": first, "chunk": 1})).status == 200
        call.now_s = 600
        assert code(await call({"id": first, "chunk": 1})) == (410, "gone")
        second = (await call()).document["id"]
        assert second != first
        assert len(call.maker.made) == 2

    asyncio.run(scenario())


def test_while_it_is_made_callers_get_409_and_then_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_bundle, "_WAIT_S", 0.01)

    async def scenario() -> None:
        call = Calls()
        call.maker.released = asyncio.Event()
        assert {code(answer) for answer in await asyncio.gather(call(), call())} == {(409, "in_progress")}
        call.maker.released.set()
        answers = await asyncio.gather(call(), call(), call())
        assert len({answer.document["id"] for answer in answers}) == 1
        assert len(call.maker.made) == 1

    asyncio.run(scenario())


def test_a_failure_is_told_to_all_that_wait_and_the_next_call_tries_again() -> None:
    async def scenario() -> None:
        failures = [BusyError("a report is being made")]

        async def make() -> bytes:
            await asyncio.sleep(0)
            if failures:
                raise failures.pop()
            return b"zip"

        bundle = SupportBundle(make)
        both = await asyncio.gather(bundle.answer({}), bundle.answer({}), return_exceptions=True)
        assert [type(error) for error in both] == [BusyError, BusyError]
        assert (await bundle.answer({}))["bytes"] == 3

    asyncio.run(scenario())


def test_a_bundle_that_is_too_large_is_refused_and_not_kept() -> None:
    async def scenario() -> None:
        bundle = SupportBundle(Maker(MAX_BUNDLE_BYTES + 1))
        with pytest.raises(MethodError, match="more than 4 MiB"):
            await bundle.answer({})
        assert "none" in repr(bundle)

    asyncio.run(scenario())
