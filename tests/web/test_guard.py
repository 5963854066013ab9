"""Access control: host names, origins, changing tokens, and shares of the stream places."""

import asyncio
import contextlib
from collections.abc import Sequence

import aiohttp
import pytest

from fake_backend import Client, FakeBackend, error_of, jpeg, result, run_scenario, until
from visionedge.config.load import parse_config
from visionedge.config.schema import HttpConfig
from visionedge.web import handlers
from visionedge.web.access_control import own_names
from visionedge.web.server import HttpServer

TOKEN = "bait-token-of-the-guard"
OPEN = HttpConfig(port=0, names=("Vision.example.", "hmi"))


async def status_with(client: Client, path: str, headers: dict[str, str], method: str = "GET") -> int:
    async with client.request(method, path, headers=headers) as answer:
        if answer.status == 403:
            assert (await error_of(answer))[1] in ("unknown_host", "foreign_origin")
        return answer.status


@pytest.mark.parametrize(
    "host",
    [
        *(
            "localhost",
            "LOCALHOST:8080",
            "localhost.",
            "127.0.0.1",
            "192.0.2.7:8080",
            "[::1]",
            "[2001:db8::7]:80",
        ),
        *("vision.example", "vision.example:443", "VISION.example.", "hmi"),
        *("edge-7", "vision:8080", "EDGE_7."),  # machines and containers of the local network
    ],
)
def test_without_a_token_ip_addresses_and_known_host_names_are_answered(host: str) -> None:
    async def scenario(client: Client) -> None:
        assert await status_with(client, "/api/v1/status", {"Host": host}) == 200

    run_scenario(FakeBackend(), scenario, http=OPEN)


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "edge-7.example",
            "",
            ".",
            "[edge-7]x",
            "edge 7",
            "hmi@evil.example",
        ),
        *(
            "[::1",
            "[::1]evil.example",
            "127.0.0.1:80:80",
            "evil.example:8080",
            "a" * 5000,
            "127.1",
            "hmi/evil",
        ),
    ],
)
def test_without_a_token_any_other_host_name_is_refused_with_the_remedy(host: str) -> None:
    """A page can make its own name lead here, and would read pictures under it."""

    async def scenario(client: Client) -> None:
        for path in ("/", "/api/v1/status", "/metrics", "/healthz", "/nothing"):
            async with client.get(path, headers={"Host": host}) as answer:
                status, code, message = await error_of(answer)
            assert (status, code) == (403, "unknown_host")
            assert "http.names" in message
            assert len(message) < 200

    run_scenario(FakeBackend(), scenario, http=OPEN)


def test_with_a_token_any_host_name_is_accepted() -> None:
    """No page of another site has the token."""

    async def scenario(client: Client) -> None:
        headers = {"Host": "evil.example", "Authorization": f"Bearer {TOKEN}"}
        assert await status_with(client, "/api/v1/status", headers) == 200

    run_scenario(FakeBackend(), scenario, token=TOKEN)


def test_metrics_alone_can_be_free_of_the_token() -> None:
    """Azure Monitor's collector sends no header. A page that rebinds its own name must not read them."""
    http = parse_config({"http": {"port": 0, "token": TOKEN, "metricsToken": "none"}}).http

    async def scenario(client: Client) -> None:
        async with client.get("/metrics", headers={"Host": "vision:8080"}) as answer:
            assert answer.status == 200
        async with client.get("/metrics", headers={"Host": "evil.example"}) as answer:
            assert (await error_of(answer))[:2] == (403, "unknown_host")
        for path in ("/api/v1/status", "/api/v1/log", "/metrics/", "/openapi.json"):
            async with client.get(path) as answer:
                assert (await error_of(answer))[0] == 401

    run_scenario(FakeBackend(), scenario, http=http)


def test_metrics_need_the_token_by_default() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/metrics") as answer:
            assert (await error_of(answer))[0] == 401

    run_scenario(FakeBackend(), scenario, token=TOKEN)


def test_inside_iot_edge_module_id_and_gateway_name_are_accepted() -> None:
    environ = {"IOTEDGE_MODULEID": "vision", "IOTEDGE_GATEWAYHOSTNAME": "Edge-7.local", "OTHER": "x"}

    async def scenario() -> None:
        server = await HttpServer.start(FakeBackend(), HttpConfig(port=0), own_names(environ))
        async with aiohttp.ClientSession(server.url, trust_env=False) as client:
            for host, status in (("vision:8080", 200), ("edge-7.local", 200), ("x.example", 403)):
                assert await status_with(client, "/api/v1/status", {"Host": host}) == status
            await server.apply(HttpConfig(port=server.port, names=("x.example",)))
            assert await status_with(client, "/api/v1/status", {"Host": "x.example"}) == 200
        await server.close()

    asyncio.run(scenario())
    assert own_names({}) == []


COSTLY: Sequence[tuple[str, str]] = (
    ("POST", "/api/v1/detect"),
    ("POST", "/v2/models/nano/infer"),
    ("GET", "/api/v1/doctor"),
    ("GET", "/api/v1/frames?camera=attic"),
    ("GET", "/api/v1/events/stream?camera=attic"),
    ("GET", "/api/v1/cameras/attic/stream.mjpg"),
)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://" + "a" * 5000},
        {"Origin": "file://hmi"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://hmi"},
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_page_of_another_site_cannot_send_expensive_requests(
    headers: dict[str, str], token: str | None
) -> None:
    shown = headers if token is None else {**headers, "Authorization": f"Bearer {token}"}

    async def scenario(client: Client) -> None:
        for method, path in COSTLY:
            async with client.request(method, path, headers=shown) as answer:
                assert answer.status == 403, path
        assert await status_with(client, "/api/v1/status", shown) == 200, "it changes nothing"

    run_scenario(FakeBackend("dock"), scenario, http=OPEN.model_copy(update={"token": token}))


def test_the_modules_page_and_programs_may_send_expensive_requests() -> None:
    async def scenario(client: Client) -> None:
        base = str(client._base_url).rstrip("/")
        for headers in (
            {},
            {"Origin": base},
            {"Origin": base.replace("http", "https")},
            {"Origin": "https://vision.example"},
            {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
            {"Sec-Fetch-Site": "none"},
        ):
            async with client.post("/api/v1/detect", data=jpeg(), headers=headers) as answer:
                assert answer.status == 200, headers
            assert await status_with(client, "/api/v1/doctor", headers) == 200

    run_scenario(FakeBackend(), scenario, http=OPEN)


def test_every_answer_forbids_embedding_by_other_sites() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result())

    async def scenario(client: Client) -> None:
        paths = (
            "/",
            "/healthz",
            "/nothing",
            "/api/v1/cameras/dock/frame",
            "/api/v1/cameras/dock/snapshot.jpg",
        )
        for path in (*paths, "/api/v1/cameras/dock/stream.mjpg"):
            async with client.get(path) as answer:
                assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"

    run_scenario(module, scenario)


def test_the_error_without_the_token_is_readable() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/status") as answer:
            assert "***" not in (await error_of(answer))[2]

    run_scenario(FakeBackend(), scenario, token=TOKEN)


def test_streams_and_waits_end_when_the_token_changes() -> None:
    async def scenario() -> None:
        module = FakeBackend("dock")
        module.latest_results.publish(result("dock", 1))
        server = await HttpServer.start(module, HttpConfig(port=0, token=TOKEN))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            asyncio.timeout(10),
            aiohttp.ClientSession(server.url, headers=headers, trust_env=False) as client,
            client.get("/api/v1/frames") as events,
            client.get("/api/v1/cameras/dock/stream.mjpg") as pictures,
        ):
            poll = asyncio.create_task(client.get("/api/v1/cameras/dock/frame?after=1&timeout=60"))
            await until(lambda: module.latest_results.statistics().waiting == 2)
            await server.apply(HttpConfig(port=server.port, token=TOKEN, names=("hmi",)))
            assert module.latest_results.statistics().viewers == 1, "the token is the same"
            await server.apply(HttpConfig(port=server.port, token="another-token"))
            await events.content.read()
            await pictures.content.read()
            assert (await error_of(await poll))[:2] == (401, "unauthorized")
        await server.close()

    asyncio.run(scenario())


async def waited(client: Client) -> int:
    async with client.get("/api/v1/cameras/dock/frame?after=1") as answer:
        return answer.status


def test_one_address_cannot_take_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 is another machine to the server."""
    monkeypatch.setattr(handlers, "EVENT_STREAMS_AT_ONCE", 4)
    monkeypatch.setattr(handlers, "PICTURE_STREAMS_AT_ONCE", 4)
    monkeypatch.setattr(handlers, "WAITS_AT_ONCE", 4)
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 1))

    async def scenario(client: Client) -> None:
        base = str(client._base_url)
        connector = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
        async with (
            aiohttp.ClientSession(base, connector=connector, trust_env=False) as other,
            contextlib.AsyncExitStack() as streams,
        ):
            for path in ("/api/v1/frames", "/api/v1/cameras/dock/stream.mjpg"):
                for viewer in (client, client, other):
                    answer = await streams.enter_async_context(viewer.get(path))
                    assert answer.status == 200
                async with client.get(path) as third:
                    status, code, message = await error_of(third)
                assert (status, code) == (503, "busy")
                assert "address" in message
            waits = [asyncio.create_task(waited(client)) for _ in range(2)]
            # Three streams of pictures wait as well.
            await until(lambda: module.latest_results.statistics().waiting == 5)
            async with client.get("/api/v1/cameras/dock/frame?after=1") as third:
                assert (await error_of(third))[:2] == (503, "busy")
            module.latest_results.publish(result("dock", 2))
            assert [await wait for wait in waits] == [200, 200]

    run_scenario(module, scenario)
