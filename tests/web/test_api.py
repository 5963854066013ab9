"""The JSON API over a real server: what is answered, and how it says no."""

import asyncio

import numpy as np
import pytest

from visionedge.config.documents import Document
from visionedge.errors import ModelError, SourceError
from visionedge.frames.types import Picture, build_frame_document
from visionedge.web import handlers
from fake_backend import Client, FakeBackend, error_of, grey, jpeg, result, run_scenario, decode, until


def test_health_and_readiness_answer_200_or_503_with_every_reason() -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        for path, good in (("/healthz", "ok"), ("/readyz", "ready")):
            async with client.get(path) as answer:
                assert (answer.status, (await answer.json())["status"]) == (200, good)
        module.unhealthy = ["lane 0 died"]
        module.unready = ["the engine warms up", "rtsp://me:secret@192.0.2.5/ is away"]
        for path, reasons in (
            ("/healthz", ["lane 0 died"]),
            ("/readyz", ["the engine warms up", "rtsp://***@192.0.2.5/ is away"]),
        ):
            async with client.get(path) as answer:
                assert answer.status == 503
                document = await answer.json()
                assert document["reasons"] == reasons
                assert document["error"]["message"] == "; ".join(reasons)

    run_scenario(module, scenario)


def test_readiness_names_the_device() -> None:
    module = FakeBackend()
    module.engine |= {"requested": "cuda", "degraded": True}

    async def scenario(client: Client) -> None:
        async with client.get("/readyz") as answer:
            engine = (await answer.json())["engine"]
            assert engine == {"requested": "cuda", "effective": "cpu", "degraded": True}

    run_scenario(module, scenario)


def test_the_doctor_report_is_returned_with_secrets_masked() -> None:
    module = FakeBackend()
    remedy = {"instruction": "ask rtsp://me:secret@192.0.2.5/", "lines": []}
    link = {"name": "passthrough", "title": "GPU", "state": "broken", "found": "none", "remedies": [remedy]}
    module.doctor_report["chain"] = [link]

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/doctor") as answer:
            document = await answer.json()
            assert answer.status == 200
            assert document["firstBroken"] == "passthrough"
            assert document["chain"][0]["remedies"][0]["instruction"] == "ask rtsp://***@192.0.2.5/"

    run_scenario(module, scenario)


def test_the_newest_lines_of_the_log_are_text_with_secrets_masked() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/log") as answer:
            assert answer.content_type == "text/plain"
            assert await answer.text() == "camera dock is live at rtsp://***@192.0.2.5/\n"

    run_scenario(FakeBackend(), scenario)


def test_metrics_are_prometheus_text() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/metrics") as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert await answer.read() == b"visionedge_ready 1.0\n"

    run_scenario(FakeBackend(), scenario)


def test_status_and_cameras_are_returned_unchanged() -> None:
    module = FakeBackend("dock", "yard")

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/status") as answer:
            assert await answer.json() == module.status()
            assert answer.headers["Cache-Control"] == "no-store"
        async with client.get("/api/v1/cameras") as answer:
            assert await answer.json() == {"cameras": module.cameras()}
        async with client.get("/api/v1/cameras/yard") as answer:
            assert await answer.json() == module.camera("yard")
        async with client.get("/api/v1/cameras/attic") as answer:
            status, code, message = await error_of(answer)
            assert (status, code) == (404, "unknown_camera")
            assert "attic" in message

    run_scenario(module, scenario)


def test_secrets_in_documents_are_masked_even_if_the_module_did_not() -> None:
    module = FakeBackend("dock")
    module.last_error = "rtsp://admin:hunter2@192.0.2.5/s?token=abc cannot be opened"

    async def scenario(client: Client) -> None:
        for path in ("/api/v1/status", "/api/v1/cameras", "/api/v1/cameras/dock"):
            async with client.get(path) as answer:
                text = await answer.text()
                assert "***" in text
                assert "hunter2" not in text
                assert "abc" not in text

    run_scenario(module, scenario)


def test_the_latest_frame_is_its_frame_object() -> None:
    module = FakeBackend("dock")
    made = result("dock", 4711)
    module.latest_results.publish(made)

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/frame") as answer:
            assert answer.status == 200
            assert answer.content_type == "application/json"
            assert await answer.json() == build_frame_document(made)
            assert answer.headers["X-Visionedge-Sequence"] == "4711"
        async with client.get("/api/v1/cameras/attic/frame") as answer:
            assert (await error_of(answer))[:2] == (404, "unknown_camera")

    run_scenario(module, scenario)


def test_before_the_first_frame_the_answer_is_503_with_retry_after() -> None:
    async def scenario(client: Client) -> None:
        for leaf in ("frame", "snapshot.jpg", "frame?timeout=0.01"):
            async with client.get(f"/api/v1/cameras/dock/{leaf}") as answer:
                assert (await error_of(answer))[:2] == (503, "no_frame_yet")
                assert answer.headers["Retry-After"] == "1"

    run_scenario(FakeBackend("dock"), scenario)


def test_a_long_poll_waits_for_the_next_frame() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 5))

    async def scenario(client: Client) -> None:
        async def ask() -> int:
            async with client.get("/api/v1/cameras/dock/frame?after=5&timeout=15") as answer:
                return int((await answer.json())["sequence"])

        asked = asyncio.create_task(ask())
        await until(lambda: module.latest_results.statistics().waiting == 1)
        module.latest_results.publish(result("dock", 6))
        assert await asked == 6
        async with client.get("/api/v1/cameras/dock/frame?after=5") as answer:
            assert (await answer.json())["sequence"] == 6

    run_scenario(module, scenario)


def test_a_long_poll_without_a_newer_frame_ends_empty_with_204() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 5))

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/frame?after=5&timeout=0.05") as answer:
            assert answer.status == 204
            assert await answer.read() == b""

    run_scenario(module, scenario)


def test_a_long_poll_on_a_camera_that_is_removed_meanwhile_ends_with_404() -> None:
    module = FakeBackend("dock")

    async def scenario(client: Client) -> None:
        async def ask() -> int:
            async with client.get("/api/v1/cameras/dock/frame?after=0&timeout=15") as answer:
                return answer.status

        asked = asyncio.create_task(ask())
        await until(lambda: module.latest_results.statistics().waiting == 1)
        module.remove("dock")
        assert await asked == 404

    run_scenario(module, scenario)


@pytest.mark.parametrize(
    "query",
    [
        "after=x",
        "after=",
        "after=1.5",
        "after=1_0",
        "after=1&after=2",
        "timeout=-1",
        "timeout=nan",
        "timeout=1e3",
    ],
)
def test_invalid_numbers_are_refused(query: str) -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 5))

    async def scenario(client: Client) -> None:
        async with client.get(f"/api/v1/cameras/dock/frame?{query}") as answer:
            status, _, message = await error_of(answer)
            assert status == 400
            assert query.split("=", maxsplit=1)[0] in message

    run_scenario(module, scenario)


def test_a_snapshot_is_the_picture_of_the_latest_frame() -> None:
    module = FakeBackend("dock")
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, 32:] = (200, 120, 40)
    made = result("dock", 9, picture=picture)
    module.latest_results.publish(made)

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/snapshot.jpg") as answer:
            assert answer.content_type == "image/jpeg"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["X-Visionedge-Sequence"] == "9"
            assert answer.headers["X-Visionedge-Captured-At"] == "2026-11-22T10:00:00.123Z"
            plain = decode(await answer.read())
        assert plain.shape == picture.shape
        assert abs(plain.astype(int) - picture).mean() < 4
        async with client.get("/api/v1/cameras/dock/snapshot.jpg?annotate=1") as answer:
            drawn = decode(await answer.read())
        assert abs(drawn.astype(int) - plain)[12:36, 14:18].max() > 60, "the left line of the box"

    run_scenario(module, scenario)


def test_a_snapshot_is_scaled_down_on_demand_and_never_up() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 9, picture=grey(640, 480)))

    async def scenario(client: Client) -> None:
        for width, shape in ((320, (240, 320, 3)), (4000, (480, 640, 3))):
            async with client.get(f"/api/v1/cameras/dock/snapshot.jpg?annotate=1&width={width}") as answer:
                assert decode(await answer.read()).shape == shape

    run_scenario(module, scenario)


@pytest.mark.parametrize("query", ["annotate=maybe", "annotate=2", "width=0", "width=wide", "width=99999"])
def test_invalid_snapshot_options_are_refused(query: str) -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result())

    async def scenario(client: Client) -> None:
        async with client.get(f"/api/v1/cameras/dock/snapshot.jpg?{query}") as answer:
            assert (await error_of(answer))[0] == 400

    run_scenario(module, scenario)


def test_an_unavailable_picture_is_an_error_and_no_crash() -> None:
    def gone() -> Picture:
        raise SourceError("the decoded picture of dock was let go")

    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 1, full_picture=gone))

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/snapshot.jpg") as answer:
            assert (await error_of(answer))[:2] == (503, "no_picture")

    run_scenario(module, scenario)


def test_unknown_paths_and_methods_get_an_error_document() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/nothing") as answer:
            assert (await error_of(answer))[:2] == (404, "not_found")
        async with client.delete("/api/v1/status") as answer:
            assert (await error_of(answer))[:2] == (405, "method_not_allowed")
            assert answer.headers["Allow"] == "GET, HEAD"
        async with client.get("/api/v1/detect") as answer:
            assert (await error_of(answer))[0] == 405

    run_scenario(FakeBackend(), scenario)


def test_an_internal_error_is_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    module = FakeBackend()
    module.error = ZeroDivisionError("token=secret")

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/status") as answer:
            status, code, message = await error_of(answer)
            assert (status, code) == (500, "internal")
            assert "secret" not in message

    run_scenario(module, scenario)
    assert any(record.exc_info for record in caplog.records)


def test_an_error_for_users_keeps_its_message() -> None:
    module = FakeBackend()
    module.error = ModelError("the model gave NaN")

    async def scenario(client: Client) -> None:
        async with client.post("/api/v1/detect", data=jpeg()) as answer:
            assert await error_of(answer) == (500, "failed", "the model gave NaN")

    run_scenario(module, scenario)


def test_a_frame_request_does_not_build_the_camera_document() -> None:
    """With sixteen cameras those objects cost ten times what the rest of the answer does."""

    class Module(FakeBackend):
        def _document(self, name: str) -> Document:
            raise AssertionError(f"the object of {name} was made")

    module = Module("dock")
    module.latest_results.publish(result())

    async def scenario(client: Client) -> None:
        for path, status in (("dock/frame", 200), ("dock/snapshot.jpg", 200), ("attic/frame", 404)):
            async with client.get(f"/api/v1/cameras/{path}") as answer:
                assert answer.status == status

    run_scenario(module, scenario)


def test_concurrent_requests_share_an_expensive_document() -> None:
    now_s, made = 100.0, 0

    def make(took_s: float) -> dict[str, int]:
        nonlocal now_s, made
        now_s += took_s
        made += 1
        return {"made": made}

    slow = handlers.CachedDocument(lambda: make(0.04), 0.5, lambda: now_s)
    assert [slow.body() for _ in range(3)] == [b'{"made":1}\n'] * 3
    now_s += 0.41
    assert slow.document() == {"made": 2}
    very_slow = handlers.CachedDocument(lambda: make(2.0), 0.5, lambda: now_s)
    assert very_slow.document() is very_slow.document()
    now_s += 0.51
    assert very_slow.document() == {"made": 4}, "no older than that"
    quick = handlers.CachedDocument(lambda: make(0.0), 0.5, lambda: now_s)
    assert [quick.document()["made"] for _ in range(2)] == [5, 6], "always as it is now"
