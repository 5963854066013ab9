"""Direct methods: payloads, deadlines, errors and sizes, for any behaviour of a handler."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from telemetry_harness import PERSON_BOX, TelemetryHarness
from visionedge.app.direct_methods import MAX_JPEG_BYTES, DirectMethods, fit_problems, fit_status
from visionedge.app.http_backend import HttpBackend
from visionedge.camera.sources.images import read_picture_size
from visionedge.errors import SourceError
from visionedge.iothub.direct_methods import (
    MAX_RESULT_BYTES,
    DirectMethod,
    MethodDispatcher,
    MethodError,
    MethodResult,
    measure_result_bytes,
)
from visionedge.runtime.limits import BoundedExecutor
from visionedge.web.jpeg import encode_jpeg_within


async def echo(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload."""
    return dict(given)


async def fail(given: Mapping[str, Any]) -> dict[str, Any]:
    """As the payload wants it."""
    match given.get("camera"):
        case "method":
            raise MethodError(409, "not_running", "rtsp://me:hunter2@h does not run")
        case "ours":
            raise SourceError("rtsp://me:hunter2@h is lost")
        case "huge":
            return {"x": "y" * MAX_RESULT_BYTES}
        case "nan":
            return {"x": float("nan")}
    raise ValueError("hunter2")


async def hang(_given: Mapping[str, Any]) -> dict[str, Any]:
    """For ever."""
    await asyncio.Event().wait()
    return {}


METHODS = {
    "echo": DirectMethod(echo, 5, {"camera": str, "annotate": bool}),
    "any": DirectMethod(echo, 5, None),
    "fail": DirectMethod(fail, 5, {"camera": str}),
    "hang": DirectMethod(hang, 0.01),
}


def call(name: str, payload: Any = None) -> MethodResult:
    """The answer of a method."""
    return asyncio.run(MethodDispatcher(METHODS).answer(name, payload))


def code(answer: MethodResult) -> tuple[int, str]:
    """Status and code of an error, which has the one shape."""
    assert answer.document.keys() == {"error"}
    assert answer.document["error"].keys() == {"code", "message"}
    return answer.status, answer.document["error"]["code"]


@pytest.mark.parametrize("payload", [None, {}, ""])
def test_a_missing_payload_counts_as_an_empty_one(payload: Any) -> None:
    """IoT Hub sends null where none was given."""
    assert call("echo", payload) == MethodResult(200, {})


def test_a_valid_payload_reaches_the_method() -> None:
    """The payload is unchanged."""
    given = {"camera": "dock", "annotate": True}
    assert call("echo", given) == MethodResult(200, given)
    assert call("any", {"whatever": [1]}) == MethodResult(200, {"whatever": [1]})


@pytest.mark.parametrize(
    "payload",
    [[], "text", 5, True, {"camera": 5}, {"annotate": "yes"}, {"camera": None}, {"colour": 1}, {"": 1}],
)
def test_an_invalid_payload_is_answered_with_400(payload: Any) -> None:
    """The message names the key."""
    assert code(call("echo", payload)) == (400, "bad_payload")


@pytest.mark.parametrize("name", ["nonsense", "", "Echo", "x" * 5000])
def test_an_unknown_method_is_answered_with_404(name: str) -> None:
    """The message names the known methods."""
    answer = call(name)
    assert code(answer) == (404, "unknown_method")
    assert "known methods: any, echo, fail, hang" in answer.document["error"]["message"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("method", (409, "not_running")),
        ("ours", (500, "failed")),
        ("huge", (500, "too_large")),
        ("nan", (500, "internal")),
        ("else", (500, "internal")),
    ],
)
def test_every_outcome_of_a_method_is_an_answer_without_secrets(how: str, expected: tuple[int, str]) -> None:
    """Nothing is raised, and no internal error text is shown."""
    answer = call("fail", {"camera": how})
    assert code(answer) == expected
    assert "hunter2" not in str(answer.document)


def test_a_method_that_hangs_ends_at_its_deadline() -> None:
    """504, and its place is free again."""
    assert code(call("hang")) == (504, "timeout")


def test_the_number_of_concurrent_methods_is_limited() -> None:
    """The ninth gets `busy`; calls are counted by name and status, unknown names together."""

    async def scenario() -> None:
        methods = MethodDispatcher({"hang": DirectMethod(hang, 5)})
        waiting = [asyncio.create_task(methods.answer("hang", None)) for _ in range(8)]
        await asyncio.sleep(0)
        assert code(await methods.answer("hang", None)) == (503, "busy")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for name in ("a", "b"):
            await methods.answer(name, None)
        assert methods.counts == {("hang", 503): 1, ("unknown", 404): 2}

    asyncio.run(scenario())


def camera(number: int) -> dict[str, Any]:
    """A camera object with everything as long as it gets."""
    return {
        "name": f"{number:03}" + "c" * 61,
        "uri": "rtsp://***@h/" + "u" * 300,
        "state": "reconnecting",
        "lastError": "é" * 400,
        "dropped": dict.fromkeys(("replaced", "stale", "gated", "failed", "discarded"), 10**9),
    }


def test_the_status_of_very_many_cameras_is_cut_to_the_maximum_answer_size() -> None:
    """First to the important keys of each camera, then to as many cameras as fit; the rest is counted."""
    few = {"version": "1", "cameras": [camera(1)], "capacity": {}}
    assert fit_status(few) == few
    for count, omitted in ((200, False), (5000, True)):
        status = {
            "version": "1",
            "cameras": [camera(n) for n in range(count)],
            "capacity": {"x": "y" * 10**6},
        }
        cut = fit_status(status)
        assert measure_result_bytes(cut) <= MAX_RESULT_BYTES
        assert cut["camerasOmitted"] + len(cut["cameras"]) == count
        assert (cut["camerasOmitted"] > 0) is omitted
        assert cut["cameras"][0] == {"name": camera(0)["name"], "state": "reconnecting"}


def test_the_status_omits_the_scenes_of_cameras_where_they_do_not_fit() -> None:
    """Very many zones on one camera; the cameras and the state of the file stay."""
    zone = {"inside": 0, "entered": 99_999, "left": 99_999, "lost": 0}
    scenes = {"dock": {"tracks": 1, "zones": {f"zone {number}" * 20: zone for number in range(1000)}}}
    status = {"cameras": [camera(1)], "scenes": {"storage": None, "cameras": scenes}, "capacity": {}}
    cut = fit_status(status)
    assert measure_result_bytes(cut) <= MAX_RESULT_BYTES
    assert cut == {**status, "scenes": {"storage": None, "cameras": {}, "camerasOmitted": 1}}


def test_the_status_omits_the_measurements_of_the_plan_and_most_nodes() -> None:
    """Choice and reason are in the answer; measurements of lanes and batch are only in `/api/v1/status`."""
    plan = {"lanes": 2, "buckets": [1], "reason": "measured", "measured": {"table": [1] * 1000}}
    status: dict[str, Any] = {
        "cameras": [],
        "engine": {"effective": "cpu", "plan": plan, "nodesOnCpu": [f"n{n}" for n in range(500)]},
    }
    engine = fit_status(status)["engine"]
    assert engine["plan"] == {"lanes": 2, "buckets": [1], "reason": "measured"}
    assert (engine["effective"], len(engine["nodesOnCpu"]), engine["nodesOnCpuOmitted"]) == ("cpu", 20, 480)
    assert len(status["engine"]["nodesOnCpu"]) == 500


def test_very_many_problems_are_cut_and_counted() -> None:
    """A document of 128 KB can be wrong in many ways."""
    cut = fit_problems([f"{n}: " + "ü" * 400 for n in range(5000)])
    assert measure_result_bytes(cut) <= MAX_RESULT_BYTES
    assert (cut["valid"], cut["count"]) == (False, 5000)
    assert fit_problems([]) == {"valid": True, "count": 0, "problems": []}


class StubBackend:
    """The parts of the HTTP backend that `status` needs."""

    def __init__(self) -> None:
        self.examined = 0

    def status(self) -> dict[str, Any]:
        return {"ready": True, "cameras": []}

    async def doctor(self) -> dict[str, Any]:
        self.examined += 1
        return {"firstBroken": "passthrough", "chain": [{"found": "rtsp://me:hunter2@h"}]}


def test_the_status_contains_the_doctor_report_on_request() -> None:
    """Without secrets, and made only on request."""

    async def scenario() -> tuple[MethodResult, MethodResult]:
        nothing: Any = None
        executor = BoundedExecutor()
        methods = MethodDispatcher(
            DirectMethods(nothing, cast("HttpBackend", backend), executor, nothing).methods()
        )
        plain, asked = await methods.answer("status", {}), await methods.answer("status", {"doctor": True})
        executor.close()
        return plain, asked

    backend = StubBackend()
    plain, asked = asyncio.run(scenario())
    assert plain.document == backend.status()
    assert asked.document["doctor"]["firstBroken"] == "passthrough"
    assert "hunter2" not in str(asked.document)
    assert backend.examined == 1


@pytest.mark.parametrize(("width_px", "height_px"), [(2400, 1800), (90, 6000), (64, 48)])
def test_a_picture_is_reduced_until_it_fits(width_px: int, height_px: int) -> None:
    """Noise, which JPEG cannot compress well; the shape stays, and a fitting picture is unchanged."""
    noise = np.random.default_rng(1).integers(0, 256, (height_px, width_px, 3), np.uint8)
    frame = replace(
        TelemetryHarness().result([PERSON_BOX]).frame,
        width_px=width_px,
        height_px=height_px,
        full_picture=lambda: noise,
    )
    result = replace(TelemetryHarness().result([PERSON_BOX]), frame=frame)
    jpeg = encode_jpeg_within(result, MAX_JPEG_BYTES, annotated=True)
    assert len(jpeg) <= MAX_JPEG_BYTES
    size = read_picture_size(jpeg)
    assert size is not None
    assert size[0] / size[1] == pytest.approx(width_px / height_px, rel=0.05)
    assert (size == (width_px, height_px)) is (width_px == 64)
    with pytest.raises(SourceError, match="does not fit"):
        encode_jpeg_within(result, 100, annotated=False)
