"""Common to all answers: the token, the headers, the page, the description, the address."""

import asyncio
import re
import socket
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from fake_backend import LABELS, Client, FakeBackend, error_of, result, run_scenario
from visionedge.config.schema import HttpConfig
from visionedge.errors import UnavailableError
from visionedge.frames.types import build_frame_document
from visionedge.web.access_control import AccessControl
from visionedge.web.documents import FrameDocument
from visionedge.web.openapi import build_openapi, build_schemas
from visionedge.web.server import HttpServer, make_app

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "bait-token-Ünïcode"


def route_set() -> set[tuple[str, str]]:
    """Method and path of every route of the application."""
    app = make_app(FakeBackend(), AccessControl(HttpConfig()))
    found = set()
    for route in app.router.routes():
        assert route.resource is not None
        if route.method != "HEAD":
            found.add((route.method.lower(), route.resource.canonical))
    return found


def test_with_a_token_only_health_checks_are_open() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result())
    routes = sorted(route_set())

    async def scenario(client: Client) -> None:
        for method, path in [*routes, ("get", "/nothing")]:
            async with client.request(method, path.replace("{name}", "dock")) as answer:
                if path in ("/healthz", "/readyz"):
                    assert answer.status == 200
                    continue
                assert answer.status == 401, path
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
                document = await answer.json()
                message = document["error"] if path.startswith("/v2") else document["error"]["message"]
                assert "Authorization" in message

    run_scenario(module, scenario, token=TOKEN)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        "Bearer \udcff",
        f"Bearer {TOKEN[:-1]}",
    ],
)
def test_a_wrong_token_is_refused(header: str) -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/status", headers={"Authorization": header}) as answer:
            assert (await error_of(answer))[:2] == (401, "unauthorized")

    run_scenario(FakeBackend(), scenario, token=TOKEN)


def test_the_correct_token_opens_everything() -> None:
    async def scenario(client: Client) -> None:
        for kind in ("Bearer", "bearer"):
            async with client.get("/api/v1/status", headers={"Authorization": f"{kind} {TOKEN}"}) as answer:
                assert answer.status == 200

    run_scenario(FakeBackend(), scenario, token=TOKEN)


def test_a_browser_without_a_token_gets_the_login_page() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/", headers={"Accept": "text/html,*/*"}) as answer:
            assert answer.status == 401
            assert answer.content_type == "text/html"
            text = await answer.text()
            assert "sign-in" in text
            assert TOKEN not in text

    run_scenario(FakeBackend(), scenario, token=TOKEN)


def test_the_page_is_one_document_that_needs_no_other_host() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/") as answer:
            assert answer.status == 200
            text = await answer.text()
            policy = answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "/*STYLE*/" not in text
        assert "/*SCRIPT*/" not in text
        assert not re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", text)
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy

    run_scenario(FakeBackend(), scenario)


def test_every_answer_forbids_type_sniffing_and_caching() -> None:
    async def scenario(client: Client) -> None:
        for path in ("/healthz", "/metrics", "/nothing", "/api/v1/cameras"):
            async with client.get(path) as answer:
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Cache-Control"] == "no-store"

    run_scenario(FakeBackend(), scenario)


def test_every_route_is_described_and_every_description_is_a_route() -> None:
    described = {
        (method, path)
        for path, item in build_openapi()["paths"].items()
        for method in item
        if method in ("get", "post", "put", "delete", "patch")
    }
    assert described == route_set()


def test_the_documentation_names_every_route() -> None:
    text = (REPOSITORY / "docs" / "http.md").read_text(encoding="utf-8")
    for method, path in route_set():
        assert f"`{method.upper()} {path}`" in text, path


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [name for item in value.values() for name in references(item)]
    if isinstance(value, list):
        return [name for item in value for name in references(item)]
    return []


def test_the_description_contains_every_referenced_shape() -> None:
    document = build_openapi()
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def conforms(value: Any, shape: dict[str, Any], where: str = "$") -> None:
    """A small reading of JSON Schema: types, values, required and closed keys, items, references, choices."""
    if "$ref" in shape:
        return conforms(value, build_schemas()[shape["$ref"].rsplit("/", 1)[1]], where)
    if "anyOf" in shape:
        assert any(fits(value, choice) for choice in shape["anyOf"]), where
    assert value == shape.get("const", value), where
    assert value in shape.get("enum", [value]), where
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    names = shape.get("type", [])
    names = [names] if isinstance(names, str) else names
    allowed = tuple(type(None) if name == "null" else kinds[name] for name in names)
    flat = tuple(kind for item in allowed for kind in (item if isinstance(item, tuple) else (item,)))
    assert not flat or isinstance(value, flat), where
    if isinstance(value, dict):
        known = shape.get("properties", {})
        assert set(shape.get("required", [])) <= set(value), where
        assert shape.get("additionalProperties", True) is not False or set(value) <= set(known), where
        for key in set(known) & set(value):
            conforms(value[key], known[key], f"{where}.{key}")
    for item in value if isinstance(value, list) else []:
        conforms(item, shape.get("items", {}), f"{where}[]")
    return None


def fits(value: Any, shape: dict[str, Any]) -> bool:
    try:
        conforms(value, shape)
    except AssertionError:
        return False
    return True


def described(name: str) -> dict[str, Any]:
    """A reference to a schema of the description."""
    return {"$ref": f"#/components/schemas/{name}"}


def test_answers_have_the_described_shapes() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result())
    module.unready = ["the engine warms up"]

    async def scenario(client: Client) -> None:
        for path, name in (
            ("/healthz", "Health"),
            ("/readyz", "Readiness"),
            ("/api/v1/status", "Status"),
            ("/api/v1/cameras", "Cameras"),
            ("/api/v1/cameras/dock", "Camera"),
            ("/api/v1/cameras/dock/frame", "Frame"),
            ("/api/v1/cameras/dock/scene", "Scene"),
            ("/api/v1/cameras/attic/scene", "Error"),
            ("/api/v1/events", "SceneEvents"),
            ("/api/v1/events?type=none", "Error"),
            ("/api/v1/cameras/dock/counts", "SceneCounts"),
            ("/api/v1/cameras/attic/counts", "Error"),
            ("/api/v1/doctor", "Doctor"),
            ("/api/v1/cameras/attic", "Error"),
            ("/v2/models/none", "ProtocolError"),
        ):
            async with client.get(path) as answer:
                conforms(await answer.json(), described(name))
        module.unhealthy = ["lane 0 died"]
        async with client.get("/healthz") as answer:
            conforms(await answer.json(), described("Health"))

    run_scenario(module, scenario)


@pytest.mark.parametrize("track_ids", [None, (7, None)])
@pytest.mark.parametrize("source", [None, "upload"])
def test_a_frame_object_has_exactly_the_described_keys(
    source: str | None, track_ids: tuple[int | None, ...] | None
) -> None:
    """It is built without its schema model, for every frame, so this test compares the two."""
    made = replace(result(boxes=[[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]), track_ids=track_ids, precision="fp16")
    frame = build_frame_document(made, source=source)
    assert FrameDocument.model_validate(frame, strict=True).dump() == frame
    conforms(frame, described("Frame"))
    more = {**frame, "more": 1}
    assert not fits(more, described("Frame"))
    with pytest.raises(ValidationError, match="more"):
        FrameDocument.model_validate(more)


def test_every_key_of_the_description_has_a_description_or_a_clear_name() -> None:
    """No name of a Python field and no title that repeats a key gets into the description."""
    for name, schema in build_schemas().items():
        assert not name.endswith("Document")
        assert schema["description"], name
        for key, shape in schema.get("properties", {}).items():
            assert re.fullmatch(r"[a-z][A-Za-z0-9]*|left-to-right|right-to-left", key), f"{name}.{key}"
            assert "title" not in shape, f"{name}.{key}"
            assert "default" not in shape, f"{name}.{key}"


def test_the_description_is_served() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/openapi.json") as answer:
            assert await answer.json() == build_openapi()
            assert (await answer.json())["openapi"].startswith("3.1")

    run_scenario(FakeBackend(), scenario)


def test_a_port_in_use_gives_a_one_line_error_with_the_remedy() -> None:
    async def scenario(port: int) -> None:
        with pytest.raises(UnavailableError, match=rf"127\.0\.0\.1:{port}: the port is in use.*--http"):
            await HttpServer.start(FakeBackend(), HttpConfig(port=port))

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asyncio.run(scenario(taken.getsockname()[1]))


def test_an_address_of_another_machine_gives_a_one_line_error_with_the_remedy() -> None:
    with pytest.raises(UnavailableError, match=r"192\.0\.2\.1:\d+: .*--http"):
        asyncio.run(HttpServer.start(FakeBackend(), HttpConfig(host="192.0.2.1", port=0)))


def test_the_address_shown_is_one_that_can_be_opened() -> None:
    async def scenario() -> None:
        for host in ("127.0.0.1", "0.0.0.0", "localhost"):
            server = await HttpServer.start(FakeBackend(), HttpConfig(host=host, port=0))
            shown = "127.0.0.1" if host == "0.0.0.0" else host
            assert server.url == f"http://{shown}:{server.port}/"
            await server.close()

    asyncio.run(scenario())


async def _until_data(lines: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The lines of an event stream up to its first frame."""
    async for line in lines:
        yield line
        if line.startswith(b"data:"):
            return


async def answered(url: str, token: str | None = None) -> int:
    """The status of a new connection; 0 if the port is closed."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with (
            aiohttp.ClientSession(trust_env=False) as client,
            client.get(url, headers=headers) as answer,
        ):
            return answer.status
    except aiohttp.ClientConnectionError:
        return 0


def test_the_address_can_change_while_viewers_stay_connected() -> None:
    """The old address does not answer any more, but a stream that was opened there continues."""

    async def scenario() -> None:
        module = FakeBackend()
        server = await HttpServer.start(module, HttpConfig(port=0))
        before = server.url
        async with (
            aiohttp.ClientSession(before, trust_env=False) as client,
            client.get("/api/v1/frames") as stream,
        ):
            await server.apply(HttpConfig(host="127.0.0.2", port=0))
            assert server.url != before
            assert await answered(f"{server.url}healthz") == 200
            assert await answered(f"{before}healthz") == 0
            module.latest_results.publish(result())
            lines = [line async for line in _until_data(stream.content)]
            assert lines[-1].startswith(b"data:")
        await server.close()

    asyncio.run(scenario())


def test_the_same_port_can_change_from_one_to_all_addresses() -> None:
    """The two overlap, so one must go before the other can come; and back again."""

    async def scenario() -> None:
        server = await HttpServer.start(FakeBackend(), HttpConfig(port=0))
        port = server.port
        for host in ("0.0.0.0", "127.0.0.1"):
            await server.apply(HttpConfig(host=host, port=port))
            assert await answered(f"http://127.0.0.1:{port}/healthz") == 200
        await server.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("other_port", [True, False])
def test_an_unusable_new_address_changes_nothing(other_port: bool) -> None:
    """The token included."""

    async def scenario() -> None:
        server = await HttpServer.start(FakeBackend(), HttpConfig(port=0, token=TOKEN))
        wanted = HttpConfig(host="192.0.2.1", port=0 if other_port else server.port, token="another")
        with pytest.raises(UnavailableError, match=r"192\.0\.2\.1"):
            await server.apply(wanted)
        assert await answered(f"{server.url}api/v1/status", TOKEN) == 200
        await server.close()

    asyncio.run(scenario())


def test_a_new_token_is_required_at_once() -> None:
    """And none, if none is configured any more."""

    async def scenario() -> None:
        server = await HttpServer.start(FakeBackend(), HttpConfig(port=0, token=TOKEN))
        url = f"{server.url}api/v1/status"
        await server.apply(HttpConfig(port=0, token="another-token"))
        assert [await answered(url, token) for token in (TOKEN, "another-token", None)] == [401, 200, 401]
        await server.apply(HttpConfig(port=0))
        assert await answered(url) == 200
        await server.close()

    asyncio.run(scenario())


def test_the_fake_backend_uses_only_known_labels() -> None:
    assert {found["label"] for found in build_frame_document(result())["detections"]} <= set(LABELS)
