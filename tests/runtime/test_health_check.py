"""The health check of the images asks the address that the module listens on."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from visionedge.runtime.health_check import ADDRESS_FILE_NAME, find_address, keep_address, main


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Print nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_after_a_change_of_the_port_the_new_one_is_asked(url: str, tmp_path: Path) -> None:
    environ = {"VISIONEDGE_DATA": str(tmp_path), "VISIONEDGE_HTTP": "0.0.0.0:9"}
    assert main(environ) == 1
    keep_address(tmp_path, url)
    assert find_address(environ) == url
    assert main(environ) == 0


def test_without_a_kept_address_the_environment_gives_the_port(tmp_path: Path) -> None:
    environ = {"VISIONEDGE_DATA": str(tmp_path / "none"), "VISIONEDGE_HTTP": "0.0.0.0:8123"}
    assert find_address(environ) == "http://127.0.0.1:8123/"
    assert find_address({"VISIONEDGE_DATA": str(tmp_path)}) == "http://127.0.0.1:8080/"


@pytest.mark.parametrize("content", [b"", b"\xff", b"file:///etc/passwd", b"x" * 1000])
def test_a_damaged_file_is_ignored(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ADDRESS_FILE_NAME).write_bytes(content)
    assert find_address({"VISIONEDGE_DATA": str(tmp_path)}) == "http://127.0.0.1:8080/"


def test_an_address_that_cannot_be_kept_stops_nothing(tmp_path: Path) -> None:
    keep_address(tmp_path / "missing", "http://127.0.0.1:1/")


def test_nobody_listening_is_not_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_address(tmp_path, "http://127.0.0.1:9/")
    assert main({"VISIONEDGE_DATA": str(tmp_path)}) == 1
    assert capsys.readouterr().err.startswith("not healthy: ")
